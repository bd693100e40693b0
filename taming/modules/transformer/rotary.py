"""Rotary embedding of places: attention sees how far apart on the grid two inputs predict.

The place of an input is that of the token which it predicts, the next one.

Axis letters: B sequences, L tokens, N heads, E channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotations by row, column and depth, each on a third of the channels of a head.

    Rotary embedding is that of Su et al. 2021 (arXiv:2104.09864), shared out among axes as in Heo
    et al. 2024 (arXiv:2403.13298, section 3.1) with its lower base, since grids are short.

    Args:
        channels: E, even and at least 6.
        base: Ratio of the highest to the lowest frequency.

    Raises:
        ValueError: The number of channels is odd, or too small.
    """

    frequency: Tensor
    axis: Tensor

    def __init__(self, channels: int, base: float = 100.0) -> None:
        super().__init__()
        if channels % 2 or channels < 6:
            raise ValueError(
                "rotary embedding turns pairs of channels, at least one for each of row, column "
                f"and depth: n_embd / n_head must be even and at least 6, got {channels}"
            )
        pair = torch.arange(channels // 2)
        share = (pair // 3).float() / ((channels // 2 + 2) // 3)
        self.register_buffer("frequency", base**-share, persistent=False)
        self.register_buffer("axis", pair % 3, persistent=False)

    def forward(self, sites: Tensor | None, length: int) -> Tensor | None:
        """Compute the rotations of L inputs.

        Args:
            sites: (B, S, 3) int64, places of the last S inputs; None if no input has one.
            length: L. Inputs without a place are not turned.

        Returns:
            (2, B, 1, L, E / 2) float32, cosines and sines; None where nothing turns.
        """
        if sites is None:
            return None
        angles = sites[..., self.axis] * self.frequency
        angles = F.pad(angles, (0, 0, length - sites.shape[1], 0))[:, None]
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn queries or keys (B, N, L, E) by (2, B, 1, L, E / 2) cosines and sines."""
    cos, sin = rotation.unbind(0)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
