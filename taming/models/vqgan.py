"""The image tokenizer: encoder, quantizer, decoder, trained with or without a discriminator.

`compute_loss` computes an image's loss; a loopy site ends at its first turn within the threshold.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, K codes, M codebooks,
T turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taming.checkpoint import freeze_parts, load_weights
from taming.models.first_stage import FirstStage
from taming.models.gan import ManualOptimization
from taming.modules.batches import images_of, pixels_inside
from taming.modules.diffusionmodules.model import Decoder, Encoder, check_ddconfig
from taming.modules.diffusionmodules.shortcut import LinearShortcut
from taming.modules.losses.base import DISCRIMINATOR, GENERATOR, AutoencoderLoss, check_finite
from taming.modules.util import start_at_zero, start_orthogonal
from taming.modules.vqvae.base import GridShape, QuantizerOutput
from taming.modules.vqvae.build import build_quantizer
from taming.modules.vqvae.quantize import GumbelQuantize
from taming.modules.vqvae.rate import one_rate
from taming.util import instantiate_from_config

if TYPE_CHECKING:
    from torchmetrics.image import PeakSignalNoiseRatio

    from taming.modules.vqvae.metrics import SplitMetrics

MOST_SITES = 1 << 24  # of an image to decode; an empty batch may state a larger grid at no cost


class VQModel(ManualOptimization, FirstStage):
    """VQ-VAE or VQGAN (Esser et al. 2021, arXiv:2012.09841) with any quantizer.

    Args:
        ddconfig: Keyword arguments of `Encoder` and `Decoder`.
        lossconfig: ``{target, params}`` of an `AutoencoderLoss`; one with a discriminator makes
            the model a GAN.
        n_embed: K, number of codes.
        embed_dim: D, channels of a latent.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        image_key: Key of the image in a batch.
        colorize_nlabels: Number of input channels, if not 1 or 3, to project to colours.
        monitor: Logged value by which the best checkpoints are kept.
        remap: Path of an .npy of used codes, for the default quantizer.
        sane_index_shape: Let the default quantizer return indices (B, h, w) rather than flat ones.
        quantizer_config: ``{target, params}`` of a `Quantizer`, which gets K and D from here; None
            builds a `VectorQuantizer2`.
        beta: Commitment weight of the default quantizer.
        legacy: Put beta on the codebook term of the default quantizer, as the original did.
        betas: Coefficients of both Adam optimizers. The original's suit a GAN; without an
            adversary, or for a short run, (0.9, 0.99) learns faster.
        scheduler_config: ``{target, params}`` of a factor of both learning rates by step.
        trust_checkpoint: Allow ``ckpt_path`` to run code while it is unpickled.
        quantize_start: Generator step from which the decoder sees codes in training. Before it,
            the decoder gets the latents themselves and the quantizer learns from them without
            influencing the encoder, which then uses more directions of the latent space.
        orthogonal_start: Start the linear layers on both sides of the latents orthogonal.
        linear_shortcut: Add a `LinearShortcut` around both networks, whose output starts at zero.
        compile: Compile encoder and decoder when they are first used, by ``torch.compile``.
        freeze: Names of `parts` that stay as they are, averages and statistics included.

    Example:
        >>> sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> sizes |= {"in_channels": 3, "out_ch": 3, "z_channels": 8, "resolution": 16}
        >>> loss = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
        >>> model = VQModel({**sizes, "double_z": False}, loss, n_embed=64, embed_dim=4).eval()
        >>> x = torch.rand(2, 3, 16, 16) * 2 - 1
        >>> (codes := model.encode_to_codes(x)).shape
        torch.Size([2, 8, 8, 1])
        >>> torch.equal(model.decode_code(codes), model(x)[0])
        True
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
        trust_checkpoint: bool = False,
        quantize_start: int = 0,
        orthogonal_start: bool = False,
        linear_shortcut: bool = False,
        compile: bool = False,
        freeze: Sequence[str] = (),
    ) -> None:
        check_ddconfig(ddconfig)
        super().__init__(betas, scheduler_config)
        own = {"beta": beta, "remap": remap, "sane_index_shape": sane_index_shape, "legacy": legacy}
        self.image_key, self.monitor, self.quantize_start = image_key, monitor, quantize_start
        self.loss: AutoencoderLoss = instantiate_from_config(lossconfig)
        self.quantize = build_quantizer(quantizer_config, own, n_e=n_embed, e_dim=embed_dim)
        if quantize_start and not self.quantize.trains_without_decoder:
            raise ValueError(
                f"{type(self.quantize).__name__} learns from the decoder and has no quantize_start;"
                " set model.params.quantize_start=0"
            )
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if orthogonal_start:
            linear = (self.quant_conv, self.post_quant_conv)
            start_orthogonal(*linear, self.encoder.conv_out, self.decoder.conv_in)
        self.shortcut: LinearShortcut | None = None
        if linear_shortcut:
            sizes = (ddconfig["in_channels"], self.encoder.factor, embed_dim)
            self.shortcut = LinearShortcut(*sizes)
            start_at_zero(self.quant_conv, self.decoder.conv_out)
        if compile:
            self.encoder.compile()
            self.decoder.compile()
        projection = None if colorize_nlabels is None else torch.randn(3, colorize_nlabels, 1, 1)
        self.register_buffer("colorize", projection)
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)
        freeze_parts(self.parts, freeze)
        if "decoder" in freeze and self.loss.discriminator is not None:
            raise ValueError("freeze: a discriminator is weighed by gradients of the decoder")

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Parts that the generator's optimizer trains, in the order of the original's state."""
        names = ["encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"]
        if self.shortcut is not None:
            names += ["shortcut.pixels_to_latent", "shortcut.latent_to_pixels"]
        return {name: self.get_submodule(name) for name in names}

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights as `load_weights` does, under the original's name."""
        load_weights(self, path, ignore_keys)

    # --- image -> latents -> codes -> image ------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, C, H, W); return them and the quantizer's loss."""
        quant, loss, _ = self.encode(x)  # (B, D, h, w)
        return self.decode(quant), loss  # (B, C, H, W)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as latents z (B, D, h, w)."""
        z = self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype)))
        return z if self.shortcut is None else z + self.shortcut.encode(x)

    def encode(
        self,
        x: Tensor,
        threshold: float | Tensor | None = None,
        max_codes: int | Tensor | None = None,
        target_psnr: float | Tensor | None = None,
        max_tokens: int | Tensor | None = None,
        rate: float | Tensor | None = None,
        target_bits: float | Tensor | None = None,
        size: Sequence[int] | Tensor | None = None,
    ) -> QuantizerOutput:
        """Encode images: ``quant, loss, (perplexity, encodings, indices)``.

        Args:
            x: (B, C, H, W) in [-1, 1].
            threshold: Distance at which a loop ends, in the space of z (``quantize.latent_std`` is
                the latents' standard deviation); one for all or one per image (B,), as below.
            max_codes: Largest number of codes of an image.
            target_psnr: PSNR in dB to reach with the fewest codes; out of reach, all turns.
            max_tokens: Alias of ``max_codes``.
            rate: lambda >= 0: codes and ends of least ``|z - z_q|^2 / latent_std^2 + lambda bits``,
                by the quantizer's `EntropyTables`.
            target_bits: Largest number of those bits of an image, at the smallest lambda.
            size: (H, W) of the picture at the top left of x, whose PSNR counts; one for all or one
                per image (B, 2). None for all of x.

        Raises:
            ValueError: More than one rate is given, or the quantizer's rate is fixed.
        """
        z = self.encode_to_prequant(x)  # (B, D, h, w)
        rates = {"threshold": threshold, "max_codes": max_codes, "target_psnr": target_psnr}
        rates |= {"rate": rate, "target_bits": target_bits}
        if max_tokens is not None:
            rates["max_codes" if max_codes is None else "max_tokens"] = max_tokens
        rates = one_rate(rates)
        self.check_rate(rates)
        if target_psnr is not None:
            target = torch.as_tensor(target_psnr, dtype=torch.float32, device=x.device)
            return self._reach(target, x, z, pixels_inside(x, size))
        return self.quantize(z, **rates)

    def check_rate(self, rates: Iterable[str]) -> None:
        """Refuse names of rates, keywords of `encode`, that cannot be given together or at all.

        Raises:
            ValueError: More than one rate is given, or the quantizer's rate is fixed.
        """
        for name in one_rate(dict.fromkeys(rates, True)):
            if not self.quantize.variable_rate:
                raise ValueError(f"{type(self.quantize).__name__} has a fixed rate: omit {name}")

    def _reach(self, target_psnr: Tensor, x: Tensor, z: Tensor, inside: Tensor) -> QuantizerOutput:
        """Quantize with the fewest codes with which images reach a PSNR, () or (B,), in dB.

        It is that of the pixels (B, H, W) inside.
        """
        if self.training:
            raise ValueError("target_psnr needs the model in eval mode: a search must not train it")
        if target_psnr.isnan().any():
            raise ValueError(f"target_psnr must be a number of dB, got {target_psnr.tolist()}")
        low, high = self.value_range

        def psnr(codes: Tensor) -> Tensor:
            x_rec = self.as_input(self.decode_code(codes)).float().clamp(low, high)
            error = (x_rec - x.float()).square().mean(dim=1)  # (B, H, W)
            error = (error * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))  # (B,)
            return 10 * ((high - low) ** 2 / error).log10()

        return self.quantize.reach(z, psnr, target_psnr)

    def decode(self, quant: Tensor) -> Tensor:
        """Decode z_q (B, D, h, w) to images (B, C, H, W), roughly in [-1, 1].

        Raises:
            ValueError: A grid has no sites, or more than a memory holds.
        """
        h, w = quant.shape[2:]
        if not 0 < h * w <= MOST_SITES:
            raise ValueError(f"a grid of {h}x{w} sites: expected 1 to {MOST_SITES} sites")
        x_rec = self.decoder(self.post_quant_conv(quant.to(self.post_quant_conv.weight.dtype)))
        return x_rec if self.shortcut is None else x_rec + self.shortcut.decode(quant)

    def decode_code(self, code_b: Tensor, shape: GridShape | None = None) -> Tensor:
        """Decode codes to images (B, C, H, W).

        Args:
            code_b: Integers (B, h, w) or (B, h, w, T), or flat with a shape.
            shape: (B, h, w, D) of flat codes.

        Raises:
            ValueError: They are not codes of the quantizer (see its ``get_codebook_entry``).
        """
        if shape is None:
            axes = [*getattr(code_b, "shape", ())]
            if len(axes) not in (3, 4):
                raise ValueError(
                    f"codes of shape {tuple(axes)} need the shape (B, h, w, D) they fill"
                )
            shape = (axes[0], axes[1], axes[2], self.quantize.e_dim)
        return self.decode(self.quantize.get_codebook_entry(code_b, shape))

    # --- training --------------------------------------------------------------------------------

    codebook: SplitMetrics
    val_psnr: PeakSignalNoiseRatio

    def setup(self, stage: str) -> None:
        """Build what measures an epoch, with torchmetrics, whose import takes seconds."""
        from torchmetrics.image import PeakSignalNoiseRatio

        from taming.modules.vqvae.metrics import SplitMetrics

        splits = ("train", "val")
        self.codebook = SplitMetrics({s: self.quantize.codebook_metrics() for s in splits})
        self.val_psnr = PeakSignalNoiseRatio(data_range=self.value_range[1] - self.value_range[0])

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Train the generator, then the discriminator, on one batch."""
        x = self.get_input(batch, self.image_key)  # (B, C, H, W)
        z, quantized, x_rec = self.reconstruct(x)
        self.codebook.update("train", z, quantized)
        generator, *discriminator = self.optimizer_list()
        with self.toggled_optimizer(generator):
            loss, logs = self.compute_loss(x, quantized, x_rec, GENERATOR, "train")
            self.backward_and_step(generator, loss, batch_idx)
        for optimizer in discriminator:  # at most one
            with self.toggled_optimizer(optimizer):
                d_loss, d_logs = self.compute_loss(x, quantized, x_rec, DISCRIMINATOR, "train")
                self.backward_and_step(optimizer, d_loss, batch_idx)
            logs |= d_logs | {"train/discloss": d_loss.detach()}
        self.log("train/aeloss", loss.detach(), prog_bar=True, batch_size=len(x))
        self.log_dict(logs, batch_size=len(x))
        return loss.detach()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, QuantizerOutput, Tensor]:
        """Return latents, the quantizer's output and reconstructions of images (B, C, H, W)."""
        z = self.encode_to_prequant(x)  # (B, D, h, w)
        continuous = self.training and self.global_step < self.quantize_start
        # A frozen quantizer, always in evaluation mode, has one rate; the decoder learns them all.
        frozen = self.training and not self.quantize.training
        rates = self.quantize.sample_rates(z) if frozen else {}
        with self.locating_non_finite(x):
            quantized = self.quantize(z.detach() if continuous else z, **rates)
        x_rec = self.decode(z if continuous else quantized.z_q)  # (B, C, H, W)
        return z, quantized, x_rec

    def compute_loss(
        self, x: Tensor, quantized: QuantizerOutput, x_rec: Tensor, optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the generator (0) or discriminator (1), and the values to log."""
        step, last_layer = self.global_step, self.get_last_layer()
        trainer = self._trainer if split == "train" else None
        # Values of an adversary that does not count yet are computed only where they are logged.
        logged = trainer is None or trainer._logger_connector.should_update_logs
        loss, logs = self.loss(
            quantized.loss, x, x_rec, optimizer_idx, step, last_layer, split=split, all_logs=logged
        )
        with self.locating_non_finite(x):
            check_finite(logs)
        return loss, logs

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Measure one batch."""
        x = self.get_input(batch, self.image_key)  # (B, C, H, W)
        z, quantized, x_rec = self.reconstruct(x)
        self.codebook.update("val", z, quantized)
        self.val_psnr.update(self.as_input(x_rec).float().clamp(*self.value_range), x)
        loss, logs = self.compute_loss(x, quantized, x_rec, GENERATOR, "val")
        if self.loss.discriminator is not None:
            logs |= self.compute_loss(x, quantized, x_rec, DISCRIMINATOR, "val")[1]
        logs["val/aeloss"] = loss
        self.log_dict(logs, batch_size=len(x), sync_dist=True)
        self.log("val/psnr", self.val_psnr, prog_bar=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        """Build the optimizers."""
        generator = (p for part in self.parts.values() for p in part.parameters())
        return self.adam(generator, self.loss.discriminator)

    def get_last_layer(self) -> Tensor:
        """Return the weight by whose gradients the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Take images out of a batch: (B, H, W, C) or (B, H, W) -> (B, C, H, W) float32.

        Raises:
            DataError: The batch has no such images (see `images_of`).
        """
        x = images_of(batch, k, "the model's image_key", self.channels, self.value_range)
        return x.permute(0, 3, 1, 2).contiguous().float()

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse a batch that is still on the CPU, and whose images are not the model's."""
        images_of(batch, self.image_key, "the model's image_key", self.channels, self.value_range)

    def fetch_weights(self) -> None:
        """Fetch the loss's pretrained weights, unless a checkpoint had them."""
        self.loss.fetch_weights()

    def on_fit_start(self) -> None:
        """Fetch the loss's pretrained weights, after a resumed run has restored its own."""
        self.fetch_weights()

    def on_train_epoch_end(self) -> None:
        """Log the use of the codebook over the epoch."""
        self.log_dict(self.codebook.pop("train", self.quantize.tracked_scalars()), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the use of the codebook over the validation set."""
        self.log_dict(self.codebook.pop("val", self.quantize.tracked_scalars()), sync_dist=True)

    def codebook_histograms(self) -> dict[str, Tensor]:
        """Return counts of codes (M K,) and lengths (T + 1,) so far by ``{split}/{name}``."""
        return self.codebook.histograms()

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], **unused: Any) -> dict[str, Tensor]:
        """Show inputs, reconstructions and lengths: name -> (B, 3, H, W) in [-1, 1]."""
        x = self.get_input(batch, self.image_key).to(self.device)
        _, quantized, x_rec = self.reconstruct(x)
        # Together, so that a label has the same colour in both.
        shown, rebuilt = self.to_rgb(torch.cat([x, self.as_input(x_rec)])).chunk(2)
        pictures = {"inputs": shown, "reconstructions": rebuilt}
        return pictures | self.code_pictures(quantized, (x.shape[2], x.shape[3]))


class VQSegmentationModel(VQModel):
    """A `VQModel` of maps of n_labels labels: inputs are one-hot, the decoder returns logits."""

    value_range = (0.0, 1.0)

    def __init__(self, n_labels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, colorize_nlabels=n_labels, **kwargs)
        if (out_ch := self.decoder.conv_out.out_channels) != n_labels:
            raise ValueError(f"n_labels is {n_labels}, but ddconfig.out_ch {out_ch}")

    def as_input(self, x_rec: Tensor) -> Tensor:
        """Turn logits (B, C, H, W) into a one-hot map of the likeliest labels."""
        return torch.zeros_like(x_rec).scatter_(1, x_rec.argmax(dim=1, keepdim=True), 1.0)


class VQNoDiscModel(VQModel):
    """A `VQModel` that refuses a loss with a discriminator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.loss.discriminator is not None:
            raise ValueError(
                f"VQNoDiscModel trains no discriminator, but {type(self.loss).__name__} has one: "
                "use VQModel, or a loss without one"
            )


class GumbelVQ(VQModel):
    """A `VQModel` with a `GumbelQuantize`, whose temperature falls during training.

    Takes the arguments of `VQModel` and:

    Args:
        temperature_scheduler_config: ``{target, params}`` of the temperature by step.
        kl_weight: Weight of the codes' divergence from the uniform distribution.
    """

    quantize: GumbelQuantize

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        temperature_scheduler_config: Mapping[str, Any],
        *,
        kl_weight: float = 1e-8,
        remap: str | None = None,
        **kwargs: Any,
    ) -> None:
        quantizer = {
            "target": "taming.modules.vqvae.quantize.GumbelQuantize",
            "params": {"kl_weight": kl_weight, "remap": remap},
        }
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, quantizer_config=quantizer, **kwargs
        )
        self.temperature_scheduler = instantiate_from_config(temperature_scheduler_config)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the temperature of this step, which needs no checkpoint to be restored."""
        super().on_train_batch_start(batch, batch_idx)
        self.quantize.temperature = self.temperature_scheduler(self.global_step)
        self.log("temperature", self.quantize.temperature)


class EMAVQ(VQModel):
    """A `VQModel` whose codes are moving averages of their latents: an `EMAVectorQuantizer`."""

    def __init__(
        self,
        *args: Any,
        beta: float = 0.25,
        remap: str | None = None,
        sane_index_shape: bool = False,
        **kwargs: Any,
    ) -> None:
        quantizer = {
            "target": "taming.modules.vqvae.quantize.EMAVectorQuantizer",
            "params": {"beta": beta, "remap": remap, "sane_index_shape": sane_index_shape},
        }
        super().__init__(*args, quantizer_config=quantizer, **kwargs)
