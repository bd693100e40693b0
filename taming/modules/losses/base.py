"""The contract of an autoencoder's loss: one ``forward`` for all, two hooks for each.

Axis letters: B images, C channels, H W image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.util import NonFiniteError

GENERATOR, DISCRIMINATOR = 0, 1
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}

# A scalar to minimise, and scalars to log by name.
LossAndLogs = tuple[Tensor, dict[str, Tensor]]


def pixel_distance(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean distance per value by name: "l1" (absolute) or "l2" (squared).

    Raises:
        ValueError: The name is unknown.
    """
    if name not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(sorted(DISTANCES))}, got {name!r}")
    return DISTANCES[name]


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Refuse scalars that are not finite.

    Raises:
        NonFiniteError: Names them.
    """
    finite = torch.stack([value.detach().float() for value in values.values()]).isfinite()
    if not finite.all():  # one wait for the GPU rather than one per value
        wrong = [name for name, good in zip(values, finite.tolist(), strict=True) if not good]
        raise NonFiniteError(f"{', '.join(wrong)} not finite")


class Reconstructions(NamedTuple):
    """Arguments of a loss, in float32.

    Attributes:
        images: (B, C, H, W) inputs.
        fakes: (B, C, H, W) reconstructions.
        quant_loss: Codebook loss, a scalar.
        global_step: Generator steps so far.
        last_layer: Weight of the decoder's last convolution, or None.
        cond: (B, C', H, W) condition of the discriminator, or None.
        all_logs: Compute the logged values of terms whose factor is 0 as well.
    """

    images: Tensor
    fakes: Tensor
    quant_loss: Tensor
    global_step: int
    last_layer: Tensor | None
    cond: Tensor | None
    all_logs: bool


class AutoencoderLoss(nn.Module, ABC):
    """Loss of an autoencoder and, if it has one, of its discriminator.

    Attributes:
        discriminator: Network trained against the autoencoder by its own optimizer, or None.
    """

    discriminator: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = None

    def fetch_weights(self) -> None:
        """Load pretrained weights, if the loss has any, unless a checkpoint had them.

        Called when training starts rather than in the constructor: a resumed run has them already.
        """

    @abstractmethod
    def generator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Compute the autoencoder's loss and the scalars to log."""

    def discriminator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Compute the discriminator's loss and the scalars to log."""
        raise ValueError(f"{type(self).__name__} has no discriminator: optimizer_idx must be 0")

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
        all_logs: bool = True,
    ) -> LossAndLogs:
        """Compute the loss of one optimizer in float32, regardless of autocast.

        Args:
            codebook_loss: The quantizer's loss, of any shape; its mean counts.
            inputs: (B, C, H, W) images in [-1, 1].
            reconstructions: (B, C, H, W), any float type.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: Generator steps so far.
            last_layer: Weight of the decoder's last convolution; an adversarial loss is balanced
                by its gradients and needs it in training.
            cond: (B, C', H, W) condition of the discriminator.
            split: Prefix of the logged names: "train" or "val".
            all_logs: Compute the logged values of an adversary that does not count yet; False
                saves its time.

        Returns:
            The loss, a scalar, and detached scalars to log by ``{split}/{name}``.

        Raises:
            ValueError: ``optimizer_idx`` is unknown, or ``last_layer`` or ``cond`` do not fit.
        """
        if optimizer_idx not in (GENERATOR, DISCRIMINATOR):
            raise ValueError(f"optimizer_idx must be 0 or 1, got {optimizer_idx}")
        batch = Reconstructions(
            images=inputs.float(),
            fakes=reconstructions.float(),
            quant_loss=codebook_loss.float().mean(),
            global_step=global_step,
            last_layer=last_layer,
            cond=None if cond is None else cond.float(),
            all_logs=all_logs,
        )
        losses = (self.generator_loss, self.discriminator_loss)
        with torch.autocast(inputs.device.type, enabled=False):
            loss, logs = losses[optimizer_idx](batch)
        return loss, {f"{split}/{name}": value.detach() for name, value in logs.items()}
