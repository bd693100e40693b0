"""Losses of autoencoders of segmentation maps: one binary decision per label and pixel.

``inputs`` are one-hot maps (B, C, H, W) of C labels; ``reconstructions`` are their logits.
"""

from __future__ import annotations

import torch.nn.functional as F

from taming.modules.losses.base import AutoencoderLoss, LossAndLogs, Reconstructions


class BCELoss(AutoencoderLoss):
    """Binary cross entropy per label and pixel, in nats, without the codebook loss."""

    def generator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Compute the cross entropy."""
        loss = F.binary_cross_entropy_with_logits(batch.fakes, batch.images)
        return loss, {"total_loss": loss, "bce_loss": loss}


class BCELossWithQuant(BCELoss):
    """Binary cross entropy per label and pixel, in nats, plus the codebook loss.

    Args:
        codebook_weight: Factor of the codebook loss.
    """

    def __init__(self, codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.codebook_weight = codebook_weight

    def generator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Add the weighted codebook loss to the cross entropy."""
        bce_loss, logs = super().generator_loss(batch)
        loss = bce_loss + self.codebook_weight * batch.quant_loss
        return loss, logs | {"total_loss": loss, "quant_loss": batch.quant_loss}
