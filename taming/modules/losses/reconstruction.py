"""Plain distance between image and reconstruction: an autoencoder without an adversary."""

from __future__ import annotations

from torch import Tensor

from taming.modules.losses.base import AutoencoderLoss, pixel_distance


class ReconstructionLoss(AutoencoderLoss):
    """Mean distance per value, plus the codebook loss.

    Args:
        distance: "l1" (absolute difference) or "l2" (squared difference).
        codebook_weight: Factor of the codebook loss.

    Raises:
        ValueError: ``distance`` is neither.
    """

    discriminator = None

    def __init__(self, distance: str = "l1", codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.pixel_distance = pixel_distance(distance)
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
        rec_loss = self.pixel_distance(reconstructions.float(), inputs.float())
        quant_loss = codebook_loss.float().mean()
        loss = rec_loss + self.codebook_weight * quant_loss
        log = {"total_loss": loss, "quant_loss": quant_loss, "nll_loss": rec_loss}
        log["rec_loss"] = rec_loss
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}
