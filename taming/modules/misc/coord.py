"""The place of each site in an image, as the condition of a prior that samples parts of images.

Axis letters: B images, H W image, h w grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from taming.modules.util import ConditionStage, Quantized, checks_values


class CoordStage(ConditionStage):
    """Rounds a map of coordinates to tokens.

    Args:
        n_embed: Tokens from 0 to 1; a coordinate of exactly 1 becomes token ``n_embed``.
        down_factor: Divisor of height and width.
    """

    condition_length = None  # follows from the size of the map
    channels, value_range = 1, (0.0, 1.0)

    def __init__(self, n_embed: int, down_factor: int) -> None:
        self.n_embed = n_embed
        self.condition_vocab_size = n_embed  # the mean coordinate of a site is below 1
        self.down_factor = down_factor

    def eval(self) -> CoordStage:
        """Return the stage; it has only one mode."""
        return self

    def encode(self, c: Tensor) -> Quantized:
        """Average coordinates over each site and round them.

        Args:
            c: (B, 1, H, W) in [0, 1].

        Returns:
            The rounded numbers (B, 1, h, w) as floats, and as tokens in the form of a first
            stage's ``encode``.

        Raises:
            ValueError: There are several channels, or values outside [0, 1].
        """
        if c.shape[1] != 1 or (checks_values(c) and (c.min() < 0 or c.max() > 1)):
            raise ValueError(
                f"CoordStage takes one channel of values in [0, 1], got {c.shape[1]} "
                f"in [{c.min():.3g}, {c.max():.3g}]"
            )
        c = F.interpolate(c, scale_factor=1 / self.down_factor, mode="area").clamp(0, 1)
        quantized = (self.n_embed * c).round()
        return quantized, None, (None, None, quantized.long())

    def decode(self, c: Tensor) -> Tensor:
        """Map rounded numbers (B, 1, h, w) to coordinates (B, 1, H, W) in [0, 1]."""
        return F.interpolate(c / self.n_embed, scale_factor=self.down_factor, mode="nearest")

    def condition_pictures(
        self, c: Tensor, quant_c: Tensor, size: tuple[int, int], datasets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the maps (B, 3, H, W), given and decoded, in shades of grey."""
        maps = {"conditioning": c, "conditioning_rec": self.decode(quant_c)}
        return {name: picture.expand(-1, 3, -1, -1) for name, picture in maps.items()}
