"""How a tokenizer trains: a step of its generator, a step of the discriminator, and what is logged.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, K codes, T turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.image import PeakSignalNoiseRatio

from taming.lr_scheduler import scheduled
from taming.modules.losses.base import AutoencoderLoss
from taming.modules.util import first_non_finite
from taming.modules.vqvae.base import Quantizer, QuantizerOutput
from taming.modules.vqvae.metrics import CodebookMetrics, HierarchyMetrics
from taming.util import NonFiniteError


class QuantizedAutoencoder(pl.LightningModule, ABC):
    """Trains an autoencoder with a quantizer and, if its loss has one, a discriminator against it.

    Lightning leaves stepping to models with two optimizers, and with it accumulation and clipping.

    Args:
        loss: What it minimises; with a discriminator, it is a GAN.
        quantize: The quantizer.
        image_key: Key of the image in a batch.
        betas: Of both Adam optimizers.
        schedule: Factor of both learning rates by step; None for none.
        quantize_start: Generator step from which the decoder sees codes while training. Before it,
            the decoder sees the latents as they are, and the quantizer learns from them without
            asking anything of the encoder, which so finds more directions to write along.

    Attributes:
        value_range: Smallest and largest value of an input.
        learning_rate: Set by the caller before training.
        accumulate_grad_batches: Batches per optimizer step.
        gradient_clip_val: Largest gradient norm or value; None does not clip.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.

    Raises:
        ValueError: There is a ``quantize_start``, but the quantizer learns from the decoder.
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        loss: AutoencoderLoss,
        quantize: Quantizer,
        image_key: str,
        betas: tuple[float, float],
        schedule: Callable[[int], float] | None,
        quantize_start: int = 0,
    ) -> None:
        super().__init__()
        if quantize_start and not quantize.learns_alone:
            raise ValueError(
                f"{type(quantize).__name__} learns from the decoder and has no quantize_start"
            )
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"
        self.betas = betas
        self.schedule = schedule
        self.quantize_start = quantize_start
        self.image_key = image_key
        self.loss = loss
        self.quantize = quantize
        self.train_codebook = quantize.codebook_metrics()
        self.val_codebook = quantize.codebook_metrics()
        low, high = self.value_range
        self.val_psnr = PeakSignalNoiseRatio(data_range=high - low)

    @abstractmethod
    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as latents z (B, D, h, w)."""

    @abstractmethod
    def decode(self, quant: Tensor) -> Tensor:
        """Decode z_q (B, D, h, w) to images (B, C, H, W)."""

    @abstractmethod
    def as_input(self, x_rec: Tensor) -> Tensor:
        """Bring what `decode` returns, (B, C, H, W), into the form of an input."""

    @abstractmethod
    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Take images (B, C, H, W) out of a batch."""

    @abstractmethod
    def get_last_layer(self) -> Tensor:
        """Weight by whose gradients the adversarial loss is balanced."""

    @abstractmethod
    def generator_parts(self) -> tuple[nn.Module, ...]:
        """Parts of the generator, in the order in which its optimizer keeps them."""

    # --- training --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Fetch what the loss needs, once a resumed run has restored what its checkpoint holds."""
        self.loss.fetch_weights()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Train the generator, then the discriminator, on one batch."""
        x = self.get_input(batch, self.image_key)
        z, quantized, x_rec = self._reconstruct(x)
        self.train_codebook.update(z, quantized)
        opt_ae, *opt_disc = self._optimizers()

        self.toggle_optimizer(opt_ae)
        loss, logs = self._loss(quantized, x, x_rec, 0, "train")
        self._step(opt_ae, loss, batch_idx)
        self.untoggle_optimizer(opt_ae)

        if opt_disc:
            self.toggle_optimizer(opt_disc[0])
            disc_loss, disc_logs = self._loss(quantized, x, x_rec, 1, "train")
            self._step(opt_disc[0], disc_loss, batch_idx)
            self.untoggle_optimizer(opt_disc[0])
            logs |= disc_logs | {"train/discloss": disc_loss.detach()}

        self.log("train/aeloss", loss.detach(), prog_bar=True, batch_size=len(x))
        self.log_dict(logs, batch_size=len(x))
        return loss.detach()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Measure one batch."""
        x = self.get_input(batch, self.image_key)
        z, quantized, x_rec = self._reconstruct(x)
        self.val_codebook.update(z, quantized)
        self.val_psnr.update(self.as_input(x_rec).float().clamp(*self.value_range), x)
        loss, logs = self._loss(quantized, x, x_rec, 0, "val")
        if self.loss.discriminator is not None:
            logs |= self._loss(quantized, x, x_rec, 1, "val")[1]
        logs["val/aeloss"] = loss
        self.log_dict(logs, batch_size=len(x), sync_dist=True)
        self.log("val/psnr", self.val_psnr, prog_bar=True, batch_size=len(x))
        return loss

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, QuantizerOutput, Tensor]:
        """Latents, codes and reconstruction; stops at the first value that is not finite."""
        z = self.encode_to_prequant(x)
        continuous = self.training and self.global_step < self.quantize_start
        try:
            quantized = self.quantize(z.detach() if continuous else z)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} at step {self.global_step}; the first module whose output is not finite "
                f"is {self._culprit(x)}"
            ) from error
        return z, quantized, self.decode(z if continuous else quantized.z_q)

    def _culprit(self, x: Tensor) -> str | None:
        """Name the first module whose output is not finite; in eval mode, which learns nothing."""
        self.eval()
        return first_non_finite(self, x)

    def _loss(
        self, quantized: QuantizerOutput, x: Tensor, x_rec: Tensor, optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the generator (0) or the discriminator (1), checked, with its log values."""
        loss, logs = self.loss(
            quantized.loss,
            x,
            x_rec,
            optimizer_idx,
            self.global_step,
            last_layer=self.get_last_layer(),
            split=split,
        )
        values = torch.stack([value.detach().to(loss) for value in logs.values()])
        if not (finite := values.isfinite()).all():  # one wait for the GPU, not one for each
            wrong = [name for name, good in zip(logs, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"{', '.join(wrong)} not finite at step {self.global_step}; the first module whose "
                f"output is not finite is {self._culprit(x) or 'the loss'}"
            )
        return loss, logs

    def _optimizers(self) -> list[LightningOptimizer]:
        """Optimizers of the generator and, for a GAN, the discriminator."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _schedulers(self) -> list[LambdaLR]:
        """Schedules of the optimizers' learning rates; none without a ``scheduler_config``."""
        schedulers: Any = self.lr_schedulers() or []
        return schedulers if isinstance(schedulers, list) else [schedulers]

    def _step(self, optimizer: LightningOptimizer, loss: Tensor, batch_idx: int) -> None:
        """Backward pass and, once enough batches are accumulated, a step.

        The Trainer's own counter counts steps of its wrapped optimizers. The discriminator's step
        goes past the wrapper, with precision and hooks as usual, so ``global_step``, ``max_steps``,
        schedules and file names count generator steps only.
        """
        self.manual_backward(loss / self.accumulate_grad_batches)
        if (batch_idx + 1) % self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        if optimizer is self._optimizers()[0]:
            optimizer.step()
        else:
            inner = optimizer.optimizer
            self.trainer.strategy.optimizer_step(inner, lambda: None, model=self)
        optimizer.zero_grad()
        for scheduler in self._schedulers():
            if scheduler.optimizer is optimizer.optimizer:
                scheduler.step()

    def on_validation_model_zero_grad(self) -> None:
        """Keep what is accumulated; by default, Lightning drops gradients before validation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let logs count generator steps; Lightning's counter counts batches here."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients; Lightning calls this after it has undone any loss scaling."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """Adam for the generator and, for a GAN, another for the discriminator; their schedules.

        Raises:
            ValueError: Gradients of both would be accumulated at one changing scale.
        """
        accumulates = self.accumulate_grad_batches > 1 and self.loss.discriminator is not None
        if accumulates and self.trainer.precision == "16-mixed":
            raise ValueError(
                "with 16-mixed, accumulate_grad_batches would sum gradients of the discriminator "
                "at different scales: train with bf16-mixed, or without accumulation"
            )
        groups = [
            [p for part in self.generator_parts() for p in part.parameters() if p.requires_grad]
        ]
        if self.loss.discriminator is not None:
            groups.append(list(self.loss.discriminator.parameters()))
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(group, self.learning_rate, betas=self.betas) for group in groups
        ]
        if self.schedule is None:
            return optimizers, []
        return optimizers, [scheduled(optimizer, self.schedule) for optimizer in optimizers]

    # --- what the codebook did -------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Log what the codebook did over the epoch."""
        self._log_codebook(self.train_codebook, "train")

    def on_validation_epoch_end(self) -> None:
        """Log what the codebook did over the validation set."""
        self._log_codebook(self.val_codebook, "val")

    def _log_codebook(self, metrics: CodebookMetrics | HierarchyMetrics, split: str) -> None:
        if not metrics.update_called:  # a run resumed at the very end of an epoch
            return
        values = {k: v for k, v in metrics.compute().items() if v.ndim == 0}
        values |= self.quantize.followed()
        self.log_dict({f"{split}/{key}": v for key, v in values.items()}, sync_dist=True)
        metrics.reset()

    def codebook_histograms(self) -> dict[str, Tensor]:
        """Counts of codes (K,) and of lengths (T + 1,) so far, by ``split/name``.

        Of a hierarchy, for each level by ``split/level_name``.
        """
        return {
            f"{split}/{key}": value
            for split, metrics in (("train", self.train_codebook), ("val", self.val_codebook))
            if metrics.update_called
            for key, value in metrics.compute().items()
            if value.ndim == 1
        }
