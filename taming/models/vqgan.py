"""The image tokenizer: encoder, quantizer, decoder, trained with a discriminator.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, T turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import PeakSignalNoiseRatio

from taming.checkpoint import load_weights
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.losses.vqperceptual import AutoencoderLoss
from taming.modules.util import first_non_finite
from taming.modules.vqvae.base import LoopTrace, Quantizer, QuantizerOutput
from taming.modules.vqvae.heatmap import depth_heat_map
from taming.modules.vqvae.metrics import CodebookMetrics
from taming.modules.vqvae.quantize import LoopyVectorQuantizer, VectorQuantizer2
from taming.modules.vqvae.rate import fewest_tokens
from taming.util import NonFiniteError, instantiate_from_config


class VQModel(pl.LightningModule):
    """VQ-VAE or VQGAN (Esser et al. 2021, arXiv:2012.09841), with any quantizer.

    Args:
        ddconfig: Keyword arguments of `Encoder` and `Decoder`.
        lossconfig: ``{target, params}`` of an `AutoencoderLoss`; with a discriminator, it is a GAN.
        n_embed: K, number of codes.
        embed_dim: D, channels of a latent.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        image_key: Key of the image in a batch.
        colorize_nlabels: Number of labels, for pictures of inputs with other than 3 channels.
        monitor: Logged value by which the best checkpoints are kept.
        remap: See `VectorQuantizer2`.
        sane_index_shape: See `VectorQuantizer2`.
        quantizer_config: ``{target, params}`` of a `Quantizer`; None for `VectorQuantizer2`.
        beta: Commitment weight of the default quantizer.
        legacy: See `VectorQuantizer2`, for the default quantizer.
        betas: Of both Adam optimizers. The original's suit an adversary; without one, or for a
            short run, (0.9, 0.99) learns faster.
        scheduler_config: ``{target, params}`` of a factor of both learning rates by step.

    Attributes:
        learning_rate: Set by the caller before training.
        accumulate_grad_batches: Batches per optimizer step.
        gradient_clip_val: Largest gradient norm or value; None does not clip.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        remap: str | None = None,
        sane_index_shape: bool = False,
        quantizer_config: Mapping[str, Any] | None = None,
        beta: float = 0.25,
        legacy: bool = True,
        betas: tuple[float, float] = (0.5, 0.9),
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.betas = betas
        self.schedule: Callable[[int], float] | None = (
            None if scheduler_config is None else instantiate_from_config(scheduler_config)
        )
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"
        self.image_key = image_key
        self.monitor = monitor

        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss: AutoencoderLoss = instantiate_from_config(lossconfig)
        self.quantize: Quantizer
        if quantizer_config is None:
            self.quantize = VectorQuantizer2(
                n_embed, embed_dim, beta, remap, sane_index_shape=sane_index_shape, legacy=legacy
            )
        else:
            self.quantize = instantiate_from_config(quantizer_config)
        if (self.quantize.n_e, self.quantize.e_dim) != (n_embed, embed_dim):
            raise ValueError(
                f"n_embed {n_embed} and embed_dim {embed_dim} do not agree with the quantizer's "
                f"n_e {self.quantize.n_e} and e_dim {self.quantize.e_dim}"
            )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.colorize: Tensor | None
        projection = None if colorize_nlabels is None else torch.randn(3, colorize_nlabels, 1, 1)
        self.register_buffer("colorize", projection)
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys)
        self.loss.fetch_weights()

        turns = self.quantize.sequence.max_loops
        self.train_codebook = CodebookMetrics(n_embed, turns)
        self.val_codebook = CodebookMetrics(n_embed, turns)
        self.val_psnr = PeakSignalNoiseRatio(data_range=2.0)

    # --- image -> latents -> codes -> image ------------------------------------------------------

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as latents z (B, D, h, w)."""
        return self.quant_conv(self.encoder(x))

    def encode(
        self,
        x: Tensor,
        threshold: float | Tensor | None = None,
        max_tokens: int | Tensor | None = None,
        target_psnr: float | Tensor | None = None,
    ) -> QuantizerOutput:
        """Encode images (B, C, H, W) in [-1, 1]: ``quant, loss, (perplexity, encodings, indices)``.

        With a loopy quantizer, one of three arguments sets the rate; each is one number or one per
        image (B,), and an image's codes do not depend on the others in its batch.

        Args:
            x: Images.
            threshold: Distance at which a loop ends, in the space of z
                (``quantize.latent_std`` is the latents' standard deviation).
            max_tokens: Most tokens, which are the slots written, of an image.
            target_psnr: Fewest tokens whose decoded image has this PSNR, in dB; all turns where
                nothing reaches it.

        Returns:
            quant (B, D, h, w), the quantizer's loss, and what it knows of the codes.

        Raises:
            ValueError: More than one rate is given, or the quantizer has none to set.
        """
        z = self.encode_to_prequant(x)
        rates = (threshold, max_tokens, target_psnr)
        if rates == (None, None, None):
            return self.quantize(z)
        if sum(rate is not None for rate in rates) > 1:
            raise ValueError("give one of threshold, max_tokens and target_psnr")
        if not isinstance(self.quantize, LoopyVectorQuantizer):
            raise ValueError(f"{type(self.quantize).__name__} has one rate, which cannot be set")
        if target_psnr is not None:
            max_tokens = self._tokens_for(torch.as_tensor(target_psnr, device=x.device), x, z)
        return self.quantize(z, threshold, max_tokens)

    @torch.no_grad()
    def _tokens_for(self, target_psnr: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Fewest tokens (B,) with which images (B, C, H, W) reach a PSNR in dB."""
        if self.training:
            raise ValueError("target_psnr needs the model in eval mode: a search must not train it")

        def quality(tokens: Tensor) -> Tensor:
            x_rec = self.decode(self.quantize(z, max_tokens=tokens).z_q).clamp(-1, 1)
            return peak_signal_noise_ratio(
                x_rec, x, data_range=2.0, dim=(1, 2, 3), reduction="none"
            )

        target = target_psnr.to(x).expand(len(x))
        return fewest_tokens(quality, target, z[0, 0].numel(), self.quantize.sequence.max_loops)

    def decode(self, quant: Tensor) -> Tensor:
        """Decode z_q (B, D, h, w) to images (B, C, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Decode codes to images (B, C, H, W).

        Args:
            code_b: int64 (B, h, w) or (B, h, w, T); or flat, with a shape.
            shape: (B, h, w, D) of flat codes.
        """
        if shape is None:
            batch, h, w = code_b.shape[:3]
            shape = (batch, h, w, self.quantize.e_dim)
        return self.decode(self.quantize.get_codebook_entry(code_b, shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, C, H, W); returns them and the quantizer's loss."""
        quant, loss, _ = self.encode(x)
        return self.decode(quant), loss

    def get_last_layer(self) -> Tensor:
        """Weight by whose gradients the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Take images out of a batch: (B, H, W, C) or (B, H, W) -> (B, C, H, W) float32."""
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    # --- training --------------------------------------------------------------------------------

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
        logs["train/aeloss"] = loss.detach()

        if opt_disc:
            self.toggle_optimizer(opt_disc[0])
            disc_loss, disc_logs = self._loss(quantized, x, x_rec, 1, "train")
            self._step(opt_disc[0], disc_loss, batch_idx)
            self.untoggle_optimizer(opt_disc[0])
            logs |= disc_logs | {"train/discloss": disc_loss.detach()}

        self.log("train/aeloss", logs.pop("train/aeloss"), prog_bar=True, batch_size=len(x))
        self.log_dict(logs, batch_size=len(x))
        return loss.detach()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Measure one batch."""
        x = self.get_input(batch, self.image_key)
        z, quantized, x_rec = self._reconstruct(x)
        self.val_codebook.update(z, quantized)
        self.val_psnr.update(x_rec.float().clamp(-1, 1), x)
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
        try:
            quantized = self.quantize(z)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} at step {self.global_step}; the first module whose output is not finite "
                f"is {self._culprit(x)}"
            ) from error
        return z, quantized, self.decode(quantized.z_q)

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
        wrong = [name for name, value in logs.items() if not torch.isfinite(value)]
        if wrong:
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
        schedulers = self.lr_schedulers() or []
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

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients; Lightning calls this after it has undone any loss scaling."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """Adam for the generator and, for a GAN, another for the discriminator; their schedules."""
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        groups = [[p for part in parts for p in part.parameters() if p.requires_grad]]
        if self.loss.discriminator is not None:
            groups.append(list(self.loss.discriminator.parameters()))
        optimizers = [torch.optim.Adam(g, self.learning_rate, betas=self.betas) for g in groups]
        if self.schedule is None:
            return optimizers, []
        return optimizers, [LambdaLR(optimizer, self.schedule) for optimizer in optimizers]

    # --- what people look at ---------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Log what the codebook did over the epoch."""
        self._log_codebook(self.train_codebook, "train")

    def on_validation_epoch_end(self) -> None:
        """Log what the codebook did over the validation set."""
        self._log_codebook(self.val_codebook, "val")

    def _log_codebook(self, metrics: CodebookMetrics, split: str) -> None:
        if not metrics.update_called:  # a run resumed at the very end of an epoch
            return
        values = {k: v for k, v in metrics.compute().items() if v.ndim == 0}
        self.log_dict({f"{split}/{key}": v for key, v in values.items()}, sync_dist=True)
        metrics.reset()

    def codebook_histograms(self) -> dict[str, Tensor]:
        """Counts of codes (K,) and of lengths (T + 1,) so far, by ``split/name``."""
        return {
            f"{split}/{key}": value
            for split, metrics in (("train", self.train_codebook), ("val", self.val_codebook))
            if metrics.update_called
            for key, value in metrics.compute().items()
            if value.ndim == 1
        }

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], **unused: Any) -> dict[str, Tensor]:
        """Pictures of a batch: inputs, reconstructions and, for a loopy quantizer, its depths.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1].
        """
        x = self.get_input(batch, self.image_key).to(self.device)
        quantized = self.encode(x)
        x_rec = self.decode(quantized.z_q)
        pictures = {"inputs": x, "reconstructions": x_rec}
        if x.shape[1] != 3:
            pictures = {name: self.to_rgb(picture) for name, picture in pictures.items()}
        trace = quantized.info.encodings
        if isinstance(trace, LoopTrace):
            turns = self.quantize.sequence.max_loops
            pictures["depths"] = depth_heat_map(trace.lengths, turns, (x.shape[2], x.shape[3]))
        return pictures

    def to_rgb(self, x: Tensor) -> Tensor:
        """Colour images (B, C, H, W) of other than 3 channels by a fixed random projection.

        Raises:
            ValueError: There is no projection for that many channels.
        """
        if x.shape[1] == 1:
            return x.expand(-1, 3, -1, -1)
        if self.colorize is None:
            raise ValueError(f"set colorize_nlabels={x.shape[1]} to show {x.shape[1]} channels")
        x = F.conv2d(x, self.colorize)
        return 2 * (x - x.min()) / (x.max() - x.min()) - 1
