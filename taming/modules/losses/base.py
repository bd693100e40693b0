"""What every loss of an autoencoder looks like from outside.

Axis letters: B batch, C channels, H W image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

GENERATOR, DISCRIMINATOR = 0, 1
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


def pixel_distance(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean distance of two images per value, by name: "l1" (absolute) or "l2" (squared).

    Raises:
        ValueError: There is no distance of that name.
    """
    if name not in DISTANCES:
        raise ValueError(f"distance must be one of {sorted(DISTANCES)}, got {name!r}")
    return DISTANCES[name]


class AutoencoderLoss(nn.Module, ABC):
    """Loss of an autoencoder and, where it has one, of its discriminator.

    Attributes:
        discriminator: The network trained against the autoencoder, by an optimizer of its own; None
            if there is none.
    """

    discriminator: nn.Module | None

    def fetch_weights(self) -> None:
        """Load pretrained weights that no checkpoint has brought; by default there are none.

        They are not loaded when the loss is built: a run that is resumed has them already.
        """

    @abstractmethod
    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one optimizer, in float32 whatever autocast says.

        Args:
            codebook_loss: Scalar or any shape; its mean counts.
            inputs: (B, C, H, W) images in [-1, 1].
            reconstructions: (B, C, H, W), any float type.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: Generator steps so far.
            last_layer: Weight of the decoder's last convolution, where gradients are compared.
            cond: (B, C', H, W) condition of the discriminator.
            split: Prefix of the logged names: "train" or "val".

        Returns:
            Scalar loss, and detached scalars to log, named ``{split}/{name}``.
        """
