"""The image tokenizer: encoder, quantizer, decoder, trained with a discriminator.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, T turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from taming.checkpoint import load_weights
from taming.models.autoencoder import QuantizedAutoencoder
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.util import start_orthogonal, tensor_of
from taming.modules.vqvae.base import LoopTrace, Quantizer, QuantizerOutput
from taming.modules.vqvae.heatmap import length_heat_map
from taming.modules.vqvae.quantize import GumbelQuantize, LoopyVectorQuantizer, VectorQuantizer2
from taming.modules.vqvae.rate import fewest_codes, lengths_within
from taming.util import instantiate_from_config

# Arguments of VQModel that go to the default quantizer.
OWN = {"beta": 0.25, "remap": None, "sane_index_shape": False, "legacy": True}


def build_quantizer(
    n_embed: int, embed_dim: int, config: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> Quantizer:
    """Build the quantizer of a config; without one, a `VectorQuantizer2` with arguments ``own``.

    Raises:
        ValueError: The config's quantizer has other sizes, or ``own`` would not reach it.
    """
    if config is None:
        return VectorQuantizer2(n_embed, embed_dim, **own)
    if lost := [name for name, value in own.items() if value != OWN[name]]:
        raise ValueError(f"{', '.join(lost)}: give it in quantizer_config.params")
    quantizer: Quantizer = instantiate_from_config(config)
    if (quantizer.n_e, quantizer.e_dim) != (n_embed, embed_dim):
        raise ValueError(
            f"n_embed {n_embed} and embed_dim {embed_dim} do not agree with the quantizer's "
            f"n_e {quantizer.n_e} and e_dim {quantizer.e_dim}"
        )
    return quantizer


def check_ddconfig(ddconfig: Mapping[str, Any]) -> None:
    """Refuse sizes of an encoder and a decoder that are none of a VQ model.

    Raises:
        ValueError: Says what does not fit.
    """
    if ddconfig.get("double_z", True):
        raise ValueError("ddconfig of a VQ model needs double_z: false, for one z, not two")
    if lacking := [n for n in ("in_channels", "out_ch", "z_channels") if n not in ddconfig]:
        raise ValueError(f"ddconfig lacks {', '.join(lacking)}")
    channels, out_ch = ddconfig["in_channels"], ddconfig["out_ch"]
    if channels != out_ch:
        raise ValueError(
            f"ddconfig has in_channels {channels}, but out_ch {out_ch}: what is decoded must be of "
            "the form of the input"
        )


class VQModel(QuantizedAutoencoder):
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
        trust_checkpoint: See `load_checkpoint`, for ``ckpt_path``.
        quantize_start: See `QuantizedAutoencoder`; 0 quantizes from the first step on.
        orthogonal_start: Start the linear layers on both sides of the latents orthogonal; see
            `start_orthogonal`.

    Raises:
        ValueError: The parts do not fit each other, or the checkpoint.
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
    ) -> None:
        check_ddconfig(ddconfig)
        own = {"beta": beta, "remap": remap, "sane_index_shape": sane_index_shape, "legacy": legacy}
        super().__init__(
            instantiate_from_config(lossconfig),
            build_quantizer(n_embed, embed_dim, quantizer_config, own),
            image_key,
            betas,
            None if scheduler_config is None else instantiate_from_config(scheduler_config),
            quantize_start,
        )
        self.monitor = monitor
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if orthogonal_start:
            linear = (self.quant_conv, self.post_quant_conv)
            start_orthogonal(*linear, self.encoder.conv_out, self.decoder.conv_in)
        self.colorize: Tensor | None
        projection = None if colorize_nlabels is None else torch.randn(3, colorize_nlabels, 1, 1)
        self.register_buffer("colorize", projection)
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights, as `load_weights` does; the original's name for it."""
        load_weights(self, path, ignore_keys)

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
            max_tokens: Most tokens of an image: slots written, which is not the length of the
                sequence that a prior reads.
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

        quantizer, (low, high) = self.quantize, self.value_range
        assert isinstance(quantizer, LoopyVectorQuantizer)
        path = quantizer.whole_path(z)  # walked once, then cut by each number of tokens

        def quality(tokens: Tensor) -> Tensor:
            tau = quantizer.thresholds(path, tokens)
            codes = path.end_at(lengths_within(path.distances, tau))
            x_rec = self.decode_code(codes.view(len(x), *z.shape[2:], -1))
            x_rec = self.as_input(x_rec).clamp(low, high)
            return peak_signal_noise_ratio(
                x_rec, x, data_range=high - low, dim=(1, 2, 3), reduction="none"
            )

        target = target_psnr.to(x).expand(len(x))
        return fewest_codes(quality, target, z[0, 0].numel(), quantizer.max_loops)

    def decode(self, quant: Tensor) -> Tensor:
        """Decode z_q (B, D, h, w) to images (B, C, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Decode codes to images (B, C, H, W).

        Args:
            code_b: int64 (B, h, w) or (B, h, w, T); or flat, with a shape.
            shape: (B, h, w, D) of flat codes.

        Raises:
            ValueError: Codes are flat, and nothing says which grid they fill.
        """
        if shape is None:
            if code_b.ndim < 3:
                raise ValueError(
                    f"codes of shape {tuple(code_b.shape)} need the shape (B, h, w, D) they fill"
                )
            batch, h, w = code_b.shape[:3]
            shape = (batch, h, w, self.quantize.e_dim)
        return self.decode(self.quantize.get_codebook_entry(code_b, shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, C, H, W); returns them and the quantizer's loss."""
        quant, loss, _ = self.encode(x)
        return self.decode(quant), loss

    def as_input(self, x_rec: Tensor) -> Tensor:
        """Bring what `decode` returns, (B, C, H, W), into the form of an input: here, leave it."""
        return x_rec

    def get_last_layer(self) -> Tensor:
        """Weight by whose gradients the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    def generator_parts(self) -> tuple[nn.Module, ...]:
        """Parts of the generator, in the order of the original's optimizer."""
        return self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Take images out of a batch: (B, H, W, C) or (B, H, W) -> (B, C, H, W) float32."""
        x = tensor_of(batch, k, "the model's image_key")
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    # --- as the condition of a prior -------------------------------------------------------------

    @property
    def condition_vocab_size(self) -> int:
        """Number of different tokens of a condition."""
        return self.quantize.sequence.vocab_size

    @property
    def condition_length(self) -> int:
        """Tokens of a condition of the size trained on.

        Raises:
            ValueError: Sites have different lengths.
        """
        if self.quantize.sequence.max_loops > 1:
            raise ValueError(
                f"the condition's {type(self.quantize).__name__} writes sequences of different "
                "lengths; a condition needs one of one code for each site, such as VectorQuantizer2"
            )
        return (self.encoder.resolution // self.encoder.factor) ** 2

    def condition_pictures(
        self, c: Tensor, quant_c: Tensor, size: tuple[int, int], datasets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return conditions and their reconstructions, (B, 3, H, W) (see `ConditionStage`)."""
        images = {"conditioning": c, "conditioning_rec": self.as_input(self.decode(quant_c))}
        return {k: v if v.shape[1] == 3 else self.to_rgb(v) for k, v in images.items()}

    # --- what people look at ---------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], **unused: Any) -> dict[str, Tensor]:
        """Pictures of a batch: inputs, reconstructions and, for a loopy quantizer, its depths.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1].
        """
        x = self.get_input(batch, self.image_key).to(self.device)
        _, quantized, x_rec = self._reconstruct(x)
        x_rec = self.as_input(x_rec)
        pictures = torch.cat([x, x_rec])  # together: the same colour for the same label
        shown, rebuilt = (pictures if x.shape[1] == 3 else self.to_rgb(pictures)).chunk(2)
        pictures = {"inputs": shown, "reconstructions": rebuilt}
        return pictures | self.code_pictures(quantized, (x.shape[2], x.shape[3]))

    def code_pictures(self, quantized: QuantizerOutput, size: tuple[int, int]) -> dict[str, Tensor]:
        """Pictures of the codes: their depths, for a loopy quantizer of several turns.

        Args:
            quantized: What `encode` returned.
            size: (H, W) in pixels.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1].
        """
        trace, turns = quantized.info.encodings, self.quantize.sequence.max_loops
        if not isinstance(trace, LoopTrace) or turns == 1:
            return {}
        return {"depths": length_heat_map(trace.lengths, turns, size)}

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
        return 2 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1


class VQSegmentationModel(VQModel):
    """Tokenizer of label maps: images are one-hot, and the decoder returns logits.

    Args:
        n_labels: C, number of labels.
        *args: See `VQModel`.
        **kwargs: See `VQModel`.

    Raises:
        ValueError: The decoder has other than ``n_labels`` outputs.
    """

    value_range = (0.0, 1.0)

    def __init__(self, n_labels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, colorize_nlabels=n_labels, **kwargs)
        if self.decoder.conv_out.out_channels != n_labels:
            raise ValueError(
                f"n_labels is {n_labels}, but ddconfig.out_ch {self.decoder.conv_out.out_channels}"
            )

    def as_input(self, x_rec: Tensor) -> Tensor:
        """Turn logits (B, C, H, W) into a one-hot map of the likeliest labels."""
        return torch.zeros_like(x_rec).scatter_(1, x_rec.argmax(dim=1, keepdim=True), 1.0)


class VQNoDiscModel(VQModel):
    """A `VQModel` that nothing is trained against.

    Args:
        *args: See `VQModel`.
        **kwargs: See `VQModel`.

    Raises:
        ValueError: The loss has a discriminator.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.loss.discriminator is not None:
            raise ValueError(
                f"VQNoDiscModel trains no discriminator, but {type(self.loss).__name__} has one; "
                "use VQModel, or a loss such as taming.modules.losses.segmentation.BCELossWithQuant"
            )


class GumbelVQ(VQModel):
    """A `VQModel` whose codes are drawn, at a temperature that falls while it trains.

    Args:
        ddconfig: See `VQModel`, as all that is not named here.
        lossconfig: See `VQModel`.
        n_embed: K, number of codes.
        embed_dim: D, channels of a latent.
        temperature_scheduler_config: ``{target, params}`` of the temperature by step.
        kl_weight: See `GumbelQuantize`.
        remap: See `GumbelQuantize`.
        **kwargs: See `VQModel`.
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
            "params": {
                "num_hiddens": embed_dim,
                "embedding_dim": embed_dim,
                "n_embed": n_embed,
                "kl_weight": kl_weight,
                "remap": remap,
            },
        }
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, quantizer_config=quantizer, **kwargs
        )
        self.temperature_scheduler: Callable[[int], float] = instantiate_from_config(
            temperature_scheduler_config
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the temperature of this step; it follows from the step, so resuming restores it."""
        super().on_train_batch_start(batch, batch_idx)
        self.quantize.temperature = self.temperature_scheduler(self.global_step)
        self.log("temperature", self.quantize.temperature)


class EMAVQ(VQModel):
    """A `VQModel` whose codes are moving averages of their latents.

    Args:
        ddconfig: See `VQModel`, as all that is not named here.
        lossconfig: See `VQModel`.
        n_embed: K, number of codes.
        embed_dim: D, channels of a latent.
        beta: See `EMAVectorQuantizer`.
        remap: See `EMAVectorQuantizer`.
        sane_index_shape: See `EMAVectorQuantizer`.
        **kwargs: See `VQModel`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        *,
        beta: float = 0.25,
        remap: str | None = None,
        sane_index_shape: bool = False,
        **kwargs: Any,
    ) -> None:
        quantizer = {
            "target": "taming.modules.vqvae.quantize.EMAVectorQuantizer",
            "params": {
                "n_embed": n_embed,
                "embedding_dim": embed_dim,
                "beta": beta,
                "remap": remap,
                "sane_index_shape": sane_index_shape,
            },
        }
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, quantizer_config=quantizer, **kwargs
        )
