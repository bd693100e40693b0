"""What is around a prior: images and conditions become tokens, and tokens images.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, S = h w sites, T turns,
L tokens.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.checkpoint import freeze, load_weights
from taming.lr_scheduler import scheduled
from taming.models.conditions import condition_pictures
from taming.models.vqgan import VQModel
from taming.models.vqvae2 import Level
from taming.modules.sequence.notations import PAD, TokenSequence
from taming.modules.transformer.permuter import Identity, Permuter
from taming.modules.util import SOSProvider, tensor_of
from taming.modules.vqvae.loop import Cascade
from taming.modules.vqvae.transforms import Attract
from taming.util import DataError, NonFiniteError, instantiate_from_config


def decayed_adamw(
    network: nn.Module,
    decayed: tuple[type[nn.Module], ...],
    learning_rate: float,
    schedule: Callable[[int], float] | None,
) -> Any:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that keeps only some weights small.

    Args:
        network: What to train.
        decayed: Kinds of layers on whose weights there is a decay of 0.01.
        learning_rate: Of all parameters.
        schedule: Factor of the learning rate by step; None for none.

    Returns:
        What ``configure_optimizers`` of a Lightning module may return.
    """
    names = {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, decayed)
    }
    parameters = dict(sorted(network.named_parameters()))
    groups = [
        {"params": [p for n, p in parameters.items() if n in names], "weight_decay": 0.01},
        {"params": [p for n, p in parameters.items() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    if schedule is None:
        return optimizer
    scheduler = scheduled(optimizer, schedule)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


# Parts of a tokenizer that have no say in which codes an image gets.
_AFTER = ("loss", "decoder", "post_quant_conv", "colorize")


def fingerprint(tokenizer: nn.Module, sequence: TokenSequence) -> str:
    """Return a number, in hexadecimal, that only tokenizers share which write the same tokens.

    Args:
        tokenizer: A `VQModel`.
        sequence: How it writes tokens.
    """
    digest = hashlib.sha256(f"{type(sequence).__name__} {sorted(vars(sequence).items())}".encode())
    if wide := [m.beam for m in tokenizer.modules() if isinstance(m, Cascade) and m.beam > 1]:
        digest.update(f"beam {wide}".encode())
    if steps := [m.step for m in tokenizer.modules() if isinstance(m, Attract)]:
        digest.update(f"step {steps}".encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if name.split(".")[0] not in _AFTER:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_cached(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is from a `taming.data.tokens.TokenCache`."""
    return "fingerprint" in batch


def cached_codes(
    batch: Mapping[str, Any], sequence: TokenSequence, own_fingerprint: str
) -> tuple[Tensor, int]:
    """Take the codes of images out of a batch of cached tokens.

    Args:
        batch: Has ``tokens`` (B, L), ``grid`` (B, 2), ``pixels`` (B,) and ``fingerprint``.
        sequence: How the tokenizer writes tokens.
        own_fingerprint: Its fingerprint.

    Returns:
        (B, h, w, T) int64, and the number of pixels of an image.

    Raises:
        DataError: Another tokenizer wrote the tokens.
    """
    for found in set(batch["fingerprint"]) - {own_fingerprint}:
        raise DataError(
            f"the token cache was written by another tokenizer (fingerprint {found[:12]}) than "
            f"that of first_stage_config ({own_fingerprint[:12]}): name the one that wrote it, or "
            "write the cache anew with scripts/encode.py"
        )
    h, w = batch["grid"][0].tolist()
    return sequence.decode(batch["tokens"], (h, w)), int(batch["pixels"][0])


def log_likelihood(
    model: pl.LightningModule, split: str, nats: Tensor, lengths: Tensor, pixels: int
) -> Tensor:
    """Log the likelihood of a batch per token, per image and per pixel.

    Args:
        model: The prior; it logs ``<split>/loss`` in nats per token, ``bits_per_token``,
            ``bits_per_image``, ``bits_per_pixel`` and ``tokens_per_image``.
        split: "train" or "val".
        nats: (B,) -log p of each image's tokens.
        lengths: (B,) int64, tokens of each image.
        pixels: H W of one image.

    Returns:
        The loss: mean -log p of a token in nats.

    Raises:
        NonFiniteError: It is not finite.
    """
    images, tokens = len(nats), int(lengths.sum())
    loss, bits = nats.sum() / tokens, nats.detach().sum() / math.log(2)
    if not torch.isfinite(loss):
        raise NonFiniteError(f"{split}/loss is not finite at step {model.global_step}")
    for name, value, weight in (
        ("loss", loss, tokens),
        ("bits_per_token", bits / tokens, tokens),
        ("bits_per_image", bits / images, images),
        ("bits_per_pixel", bits / (images * pixels), images),
        ("tokens_per_image", tokens / images, images),
    ):
        model.log(
            f"{split}/{name}",
            value,
            prog_bar=name == "loss",
            batch_size=weight,
            on_epoch=True,
            sync_dist=split == "val",
        )
    return loss


Grid = tuple[int, int]


class TokenizedBatch(NamedTuple):
    """What a prior sees of a batch.

    Attributes:
        codes: (B, h, w, T) int64.
        tokens: (B, L) int64, -1 after each sequence's end.
        c: The conditions, as their stage takes them.
        quant_c: What the stage made of them.
        condition: (B, L) int64, their tokens.
        pixels: H W of an image.
    """

    codes: Tensor
    tokens: Tensor
    c: Tensor
    quant_c: Tensor
    condition: Tensor
    pixels: int

    @property
    def grid(self) -> Grid:
        """Rows and columns of sites."""
        return self.codes.shape[1], self.codes.shape[2]


class Prior(pl.LightningModule, ABC):
    """A prior with a frozen tokenizer and a condition stage, and the tokens between them.

    What kind of network the prior is, subclasses say.

    Args:
        first_stage_config: See `Net2NetTransformer`, as all others.

    Raises:
        ValueError: The parts do not fit each other.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        permuter_config: Mapping[str, Any] | None,
        sequence_config: Mapping[str, Any] | None,
        first_stage_key: str,
        cond_stage_key: str,
        downsample_cond_size: int,
        sos_token: int,
        unconditional: bool,
    ) -> None:
        super().__init__()
        self.be_unconditional = unconditional or cond_stage_config == "__is_unconditional__"
        self.sos_token = sos_token
        self.first_stage_key = first_stage_key
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.downsample_cond_size = downsample_cond_size
        self.first_stage_model: VQModel = freeze(instantiate_from_config(first_stage_config))
        if not isinstance(self.first_stage_model, VQModel | Level):
            raise ValueError(
                "first_stage_config must name a tokenizer, a VQModel or one Level of a VQVAE2, got "
                f"a {type(self.first_stage_model).__name__}"
            )
        self.cond_stage_model = self._build_cond_stage(cond_stage_config)
        self.permuter: Permuter | Identity = (
            Identity() if permuter_config is None else instantiate_from_config(permuter_config)
        )
        own = self.first_stage_model.quantize.sequence
        self.sequence: TokenSequence = (
            own if sequence_config is None else instantiate_from_config(sequence_config)
        )
        # A site of one slot has no dummies in any case.
        names = ("n_e", "max_loops", "dummies") if own.max_loops > 1 else ("n_e", "max_loops")
        chosen, needed = (
            ", ".join(f"{name}={getattr(sequence, name)}" for name in names)
            for sequence in (self.sequence, own)
        )
        if chosen != needed:
            raise ValueError(f"the sequence is for {chosen}, but the tokenizer has {needed}")

    def _build_cond_stage(self, config: Mapping[str, Any] | str) -> Any:
        """What encodes conditions; frozen, and possibly the tokenizer itself."""
        if self.be_unconditional:
            return SOSProvider(self.sos_token)
        if config == "__is_first_stage__":
            return self.first_stage_model
        if isinstance(config, str):
            raise ValueError(
                f"cond_stage_config {config!r}: expected a block with a 'target', "
                "'__is_first_stage__' or '__is_unconditional__'"
            )
        stage = instantiate_from_config(config)
        return freeze(stage) if isinstance(stage, nn.Module) else stage

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights, as `load_weights` does; the original's name for it."""
        load_weights(self, path, ignore_keys)

    # --- training --------------------------------------------------------------------------------

    @abstractmethod
    def likelihood(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """Measure images: -log p (B,) float32 in nats, lengths included, and tokens (B,) int64."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Train on one batch."""
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Measure one batch."""
        return self._shared_step(batch, "val")

    def _shared_step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Mean -log p of a token (nats); see `log_likelihood` for what is logged."""
        seen = self.tokenize_batch(batch)
        return log_likelihood(self, split, *self.likelihood(seen), seen.pixels)

    # --- batches ---------------------------------------------------------------------------------

    def get_input(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        """Take a value out of a batch; images (B, H, W, C) and (B, H, W) become (B, C, H, W).

        Raises:
            DataError: The batch has no such tensor.
        """
        x = tensor_of(batch, key, "the prior's first_stage_key or cond_stage_key")
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2).contiguous()
        return x.float() if x.ndim == 4 or x.dtype == torch.float64 else x

    def get_xc(self, batch: Mapping[str, Any], N: int | None = None) -> tuple[Tensor, Tensor]:
        """Take the first N (all, if None) images and conditions out of a batch."""
        x = self.get_input(self.first_stage_key, batch)
        c = self.get_input(self.cond_stage_key, batch)
        return x[:N], c[:N]

    @torch.no_grad()
    def tokenize_batch(self, batch: Mapping[str, Any]) -> TokenizedBatch:
        """Encode a batch of images, or take one of cached tokens as it is.

        Raises:
            DataError: Tokens are another tokenizer's, or lack the condition.
        """
        if is_cached(batch):
            own = self.first_stage_model.quantize.sequence
            codes, pixels = cached_codes(batch, own, self.fingerprint)
            key = "tokens" if self.be_unconditional else self.cond_stage_key
            if key not in batch:
                raise DataError(
                    f"the token cache has no {key!r}, which the prior needs as its condition, only "
                    f"{', '.join(batch)}"
                )
            c = self.get_input(key, batch)
        else:
            x, c = self.get_xc(batch)
            codes, pixels = self.encode_to_codes(x)[1], x.shape[2] * x.shape[3]
        return TokenizedBatch(codes, self.write_tokens(codes), c, *self.encode_to_c(c), pixels)

    @cached_property
    def fingerprint(self) -> str:
        """What tells the tokenizer's tokens from those of others."""
        return fingerprint(self.first_stage_model, self.first_stage_model.quantize.sequence)

    # --- images <-> codes <-> tokens -------------------------------------------------------------

    @torch.no_grad()
    def encode_to_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn images (B, C, H, W) in [-1, 1] into z_q (B, D, h, w) and codes (B, h, w, T).

        The tokenizer runs in its own precision, so that codes are the same in training and after.
        """
        with torch.autocast(x.device.type, enabled=False):
            quant_z, _, info = self.first_stage_model.encode(x)
        batch, _, h, w = quant_z.shape
        return quant_z, info.indices.reshape(batch, h, w, -1)

    def write_tokens(self, codes: Tensor) -> Tensor:
        """Write codes (B, h, w, T) as tokens (B, L), in the prior's order of sites."""
        ordered = self.permuter(codes.flatten(1, 2)).reshape(codes.shape)
        return self.sequence.encode(ordered)[0]

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn images into token sequences.

        Args:
            x: (B, C, H, W) in [-1, 1].

        Returns:
            z_q (B, D, h, w) and tokens (B, L) int64, -1 after each sequence's end.
        """
        quant_z, codes = self.encode_to_codes(x)
        return quant_z, self.write_tokens(codes)

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Turn conditions into tokens.

        Args:
            c: A batch of conditions, as the condition stage takes them.

        Returns:
            What the stage made of them, and tokens (B, Lc) int64, all of one length.
        """
        if self.downsample_cond_size > -1 and c.ndim == 4:  # a class has no size
            c = F.interpolate(c, size=(self.downsample_cond_size, self.downsample_cond_size))
        with torch.autocast(c.device.type, enabled=False):
            quant_c, _, (_, _, indices) = self.cond_stage_model.encode(c)
        return quant_c, indices.reshape(len(c), -1)

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: Sequence[int]) -> Tensor:
        """Turn token sequences back into images.

        Args:
            index: (B, L) int64.
            zshape: (B, D, h, w).

        Returns:
            (B, C, H, W), about in [-1, 1].

        Raises:
            ValueError: A sequence breaks the grammar.
        """
        _, channels, h, w = zshape
        codes = self.decode_to_codes(index, (h, w))
        return self.first_stage_model.decode_code(codes, (len(index), h, w, channels))

    @torch.no_grad()
    def decode_to_codes(self, index: Tensor, grid: Grid) -> Tensor:
        """Turn token sequences (B, L) back into codes (B, h, w, T); see `decode_to_img`."""
        codes = self.sequence.decode(index, grid)
        return self.permuter(codes.flatten(1, 2), reverse=True).reshape(codes.shape)

    def draw_picture(self, index: Tensor, zshape: Sequence[int], quant_c: Tensor) -> Tensor:
        """Turn tokens into images, as `decode_to_img` does, knowing their conditions.

        Args:
            index: See `decode_to_img`, as ``zshape``.
            quant_c: What the condition stage made of the conditions; here, it plays no part.
        """
        return self.decode_to_img(index, zshape)

    def show(self, images: Tensor) -> Tensor:
        """Colour images (B, C, H, W), given or decoded: (B, 3, H, W), about in [-1, 1]."""
        if images.shape[1] == 3:
            return images
        return self.first_stage_model.to_rgb(self.first_stage_model.as_input(images))

    def show_condition(self, seen: TokenizedBatch, images: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of the conditions, of the size of images; none of a class."""
        size = images.shape[3], images.shape[2]
        stage, key, c = self.cond_stage_model, self.cond_stage_key, seen.c
        pictures = condition_pictures(stage, key, c, seen.quant_c, size, self._trainer)
        colours = (stage if isinstance(stage, VQModel) else self.first_stage_model).to_rgb
        return {k: v if v.shape[1] == 3 else colours(v) for k, v in pictures.items()}

    def first_sites(self, tokens: Tensor, sites: int) -> Tensor:
        """Keep what (B, L) sequences write for their first sites; -1 and cut off after that."""
        kept = tokens.masked_fill(self.sequence.states(tokens).site >= sites, PAD)
        return kept[:, : int((kept >= 0).sum(dim=1).max())]
