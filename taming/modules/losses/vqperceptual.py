"""The VQGAN's loss: pixels, perception and an adversary (Esser et al. 2021, arXiv:2012.09841).

Axis letters: B images, C channels, H W image, h w grid of the discriminator's patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.distributed import sum_over_ranks
from taming.modules.losses.base import (
    AutoencoderLoss,
    LossAndLogs,
    Reconstructions,
    pixel_distance,
)
from taming.modules.losses.lpips import LPIPS
from taming.util import instantiate_from_config


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return ``value`` before the step ``threshold`` and ``weight`` from it on."""
    return weight if global_step >= threshold else value


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute a discriminator's hinge loss: 0 where real > 1 and fake < -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute a discriminator's cross entropy, averaged over real and fake, in nats."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


# Keeps gradients in half precision from underflowing; a power of two changes no digit.
SCALE = 1024.0


def adaptive_weight(
    nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor, max_weight: float
) -> Tensor:
    """Balance the adversary's gradient against the reconstruction's (equation 7).

    ``|d nll / d last_layer| / (|d g / d last_layer| + 1e-4)``, with gradients averaged over all
    ranks, so that the ranks agree. A step whose gradients overflow gets weight 0.

    Args:
        nll_loss: Scalar, reconstruction loss.
        g_loss: Scalar, adversarial loss of the generator.
        last_layer: Weight by which both are differentiated.
        max_weight: Upper bound of the result.

    Returns:
        Scalar float32 in [0, max_weight], without gradient.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss * SCALE, last_layer, retain_graph=True)[0].float() / SCALE
            for loss in (nll_loss, g_loss)
        ]
    )
    ranks = sum_over_ranks(gradients.new_ones(()))
    nll_norm, g_norm = (sum_over_ranks(gradients) / ranks).flatten(1).norm(dim=1)
    return (nll_norm / (g_norm + 1e-4)).nan_to_num(nan=0.0, posinf=0.0).clamp(max=max_weight)


class DummyLoss(AutoencoderLoss):
    """Placeholder for models that are used but not trained."""

    def generator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Refuse to train."""
        raise ValueError(
            "DummyLoss has no value to train on: set lossconfig.target to a loss such as "
            "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
        )


class VQLPIPSWithDiscriminator(AutoencoderLoss):
    """Pixel and perceptual difference, codebook loss, and a patch discriminator.

    Args:
        disc_start: Generator step from which the discriminator trains and counts.
        codebook_weight: Factor of the codebook loss.
        pixelloss_weight: Factor of the pixel difference.
        disc_num_layers: Strided convolutions of the discriminator.
        disc_in_channels: C of the images, plus C' of the condition if ``disc_conditional``.
        disc_factor: Factor of both adversarial losses; 0 turns the adversary off.
        disc_weight: Factor of the generator's adversarial loss, beside the adaptive weight.
        perceptual_weight: Factor of LPIPS; 0 does not build its network.
        use_actnorm: Normalise the discriminator by `ActNorm` instead of batch norm.
        disc_conditional: Condition the discriminator on ``cond``.
        disc_ndf: Channels of the discriminator's first layer.
        disc_loss: "hinge" or "vanilla".
        disc_ramp_steps: Generator steps after ``disc_start`` over which the generator's adversarial
            term grows linearly from 0, while the discriminator already trains at full weight.
        max_d_weight: Upper bound of the adaptive weight.
        perceptual_pretrained: Fetch the weights of LPIPS; False if a checkpoint holds them.
        perceptual_config: ``{target, params}`` of another perceptual distance, such as
            `taming.modules.losses.st_lpips.STLPIPS`, whose weights need no download.
        distance: Pixel distance: "l1" as in the original, or "l2", which learns colours sooner.
        disc_sync_batchnorm: Take the statistics of the discriminator's batch norm over the images
            of all processes; False: of each process's own, as the original does.

    Raises:
        ValueError: ``disc_loss`` or ``distance`` is unknown, or a step count or weight is negative.
    """

    discriminator: NLayerDiscriminator

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        disc_ramp_steps: int = 0,
        max_d_weight: float = 1e4,
        perceptual_pretrained: bool = True,
        distance: str = "l1",
        disc_sync_batchnorm: bool = True,
        perceptual_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pixel_distance = pixel_distance(distance)
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"disc_loss must be 'hinge' or 'vanilla', got {disc_loss!r}")
        if min(disc_start, disc_ramp_steps, max_d_weight, perceptual_weight) < 0:
            raise ValueError(
                "disc_start, disc_ramp_steps, max_d_weight and perceptual_weight must not be "
                f"negative, got {(disc_start, disc_ramp_steps, max_d_weight, perceptual_weight)}"
            )
        self.disc_start, self.disc_ramp_steps = disc_start, disc_ramp_steps
        self.disc_factor, self.disc_weight = disc_factor, disc_weight
        self.codebook_weight, self.pixel_weight = codebook_weight, pixelloss_weight
        self.perceptual_weight, self.max_d_weight = perceptual_weight, max_d_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.perceptual_loss: LPIPS | None = None
        if perceptual_weight:
            distance_config = perceptual_config or {"target": "taming.modules.losses.lpips.LPIPS"}
            self.perceptual_loss = instantiate_from_config(
                distance_config, pretrained=perceptual_pretrained
            )
        self.discriminator = NLayerDiscriminator(
            disc_in_channels, disc_ndf, disc_num_layers, use_actnorm, disc_sync_batchnorm
        ).apply(weights_init)

    def fetch_weights(self) -> None:
        """Load the weights of LPIPS, unless a checkpoint had them."""
        if self.perceptual_loss is not None:
            self.perceptual_loss.fetch_weights()

    def generator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Compute the autoencoder's loss: equation 6, with a perceptual distance."""
        rec_loss, p_loss = self.reconstruction_loss(batch.images, batch.fakes)
        factor = self.generator_factor(batch.global_step)
        loss = rec_loss + self.codebook_weight * batch.quant_loss
        logs = {}
        if factor or batch.all_logs:
            g_loss = -self.judge(batch.fakes, batch.cond).mean()
            d_weight = self.weigh_adversary(rec_loss, g_loss, batch.last_layer)
            logs = {"d_weight": d_weight, "g_loss": g_loss}
            if factor:
                loss = loss + d_weight * factor * g_loss
        return loss, {
            "total_loss": loss,
            "quant_loss": batch.quant_loss,
            "nll_loss": rec_loss,
            "rec_loss": rec_loss,
            "p_loss": p_loss,
            "disc_factor": loss.new_tensor(factor),
            **logs,
        }

    def discriminator_loss(self, batch: Reconstructions) -> LossAndLogs:
        """Compute the discriminator's loss; no gradient reaches the autoencoder.

        Before ``disc_start`` the loss is 0 without gradient.
        """
        factor = adopt_weight(self.disc_factor, batch.global_step, threshold=self.disc_start)
        if not (factor or batch.all_logs):
            loss = batch.images.new_zeros(())
            return loss, {"disc_loss": loss}
        with torch.set_grad_enabled(bool(factor) and torch.is_grad_enabled()):
            logits_real = self.judge(batch.images.detach(), batch.cond)
            logits_fake = self.judge(batch.fakes.detach(), batch.cond)
        loss = factor * self.disc_loss(logits_real, logits_fake)
        return loss, {
            "disc_loss": loss,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }

    def reconstruction_loss(self, images: Tensor, fakes: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixel plus perceptual distance, weighted, and the mean LPIPS alone; scalars."""
        rec_loss = self.pixel_weight * self.pixel_distance(fakes, images)
        if self.perceptual_loss is None:
            return rec_loss, rec_loss.new_zeros(())
        p_loss = self.perceptual_loss(images, fakes).mean()
        return rec_loss + self.perceptual_weight * p_loss, p_loss

    def judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Map images (B, C, H, W) and their condition, if any, to logits (B, 1, h, w)."""
        if self.disc_conditional != (cond is not None):
            raise ValueError(
                f"disc_conditional is {self.disc_conditional}, but a condition is "
                f"{'missing' if cond is None else 'given'}"
            )
        return self.discriminator(images if cond is None else torch.cat((images, cond), dim=1))

    def weigh_adversary(
        self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None
    ) -> Tensor:
        """Return the adversary's weight, or 0 without gradients, as in validation."""
        if not nll_loss.requires_grad:
            return nll_loss.new_zeros(())
        if last_layer is None:
            raise ValueError("training needs last_layer, the weight of the decoder's last layer")
        if not last_layer.requires_grad:
            return nll_loss.new_zeros(())
        return self.disc_weight * adaptive_weight(nll_loss, g_loss, last_layer, self.max_d_weight)

    def generator_factor(self, global_step: int) -> float:
        """Return the factor of the adversarial term: 0, then the ramp, then ``disc_factor``."""
        factor = adopt_weight(self.disc_factor, global_step, threshold=self.disc_start)
        if factor and self.disc_ramp_steps:
            factor *= min(1.0, (global_step - self.disc_start) / self.disc_ramp_steps)
        return factor
