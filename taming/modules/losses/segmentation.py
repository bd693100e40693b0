"""Losses of an autoencoder of segmentation maps: each label is a yes or no per pixel.

Here ``inputs`` are one-hot maps (B, C, H, W) of C labels and ``reconstructions`` are their logits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from taming.modules.losses.base import AutoencoderLoss


class BCELoss(AutoencoderLoss):
    """Binary cross entropy per label and pixel, in nats; the codebook loss does not count."""

    discriminator = None

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
        """Compute the loss; see `AutoencoderLoss.forward`."""
        loss = F.binary_cross_entropy_with_logits(reconstructions.float(), inputs.float())
        return loss, {f"{split}/{name}": loss.detach() for name in ("total_loss", "bce_loss")}


class BCELossWithQuant(AutoencoderLoss):
    """Binary cross entropy per label and pixel, in nats, plus the codebook loss.

    Args:
        codebook_weight: Factor of the codebook loss.
    """

    discriminator = None

    def __init__(self, codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.codebook_weight = codebook_weight

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
        """Compute the loss; see `AutoencoderLoss.forward`."""
        bce_loss = F.binary_cross_entropy_with_logits(reconstructions.float(), inputs.float())
        quant_loss = codebook_loss.float().mean()
        loss = bce_loss + self.codebook_weight * quant_loss
        log = {"total_loss": loss, "bce_loss": bce_loss, "quant_loss": quant_loss}
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}
