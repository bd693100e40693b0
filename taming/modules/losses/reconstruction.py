"""Pixel distance between image and reconstruction: an autoencoder without an adversary."""

from __future__ import annotations

from taming.modules.losses.base import (
    AutoencoderLoss,
    LossAndLogs,
    Reconstructions,
    pixel_distance,
)


class ReconstructionLoss(AutoencoderLoss):
    """Mean distance per value plus the codebook loss.

    Args:
        distance: "l1" (absolute difference) or "l2" (squared difference).
        codebook_weight: Factor of the codebook loss.

    Raises:
        ValueError: ``distance`` is unknown.

    Example:
        >>> import torch
        >>> images, fakes = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.5)
        >>> loss, logs = ReconstructionLoss("l2")(torch.tensor(1.0), images, fakes, 0, 0)
        >>> loss.item(), logs["train/rec_loss"].item()
        (1.25, 0.25)
    """

    def __init__(self, distance: str = "l1", codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.pixel_distance = pixel_distance(distance)
        self.codebook_weight = codebook_weight

    def generator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Add the weighted codebook loss to the pixel distance."""
        rec_loss = self.pixel_distance(batch.fakes, batch.images)
        loss = rec_loss + self.codebook_weight * batch.quant_loss
        logs = {"total_loss": loss, "quant_loss": batch.quant_loss}
        return loss, logs | {"nll_loss": rec_loss, "rec_loss": rec_loss}
