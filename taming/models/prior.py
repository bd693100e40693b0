"""The way from a batch to nats, and from a prior to codes: what all priors share.

Read `Prior` from top to bottom; `taming.models.cond_transformer` adds the transformer.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, T turns, L tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.checkpoint import freeze, load_weights
from taming.lr_scheduler import scheduled
from taming.models.conditions import UNCONDITIONAL, build_cond_stage
from taming.models.module import Model
from taming.models.sampling import (
    Completion,
    Condition,
    Grid,
    ProgressCallback,
    Report,
    Window,
    condition_in,
    known_mask,
    pictures_of,
)
from taming.modules.batches import images_of, tensor_of
from taming.modules.distributed import share_of_rank
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.transformer.generate import DEFAULT_SAMPLING, SamplingParams
from taming.modules.transformer.permuter import Identity, Permuter
from taming.util import DataError, NonFiniteError, instantiate_from_config


def is_cached(batch: Mapping[str, Any]) -> bool:
    """Return True if a batch comes from a `taming.data.tokens.TokenCache`."""
    return "fingerprint" in batch


class TokenizedBatch(NamedTuple):
    """A batch as a prior sees it."""

    codes: Tensor  # (B, h, w, T) int64
    tokens: Tensor  # (B, L) int64, -1 after each sequence's end
    c: Tensor  # the conditions, as their stage takes them
    quant_c: Tensor  # the first output of the stage's ``encode``
    condition: Tensor  # (B, L) int64, the conditions' tokens
    pixels: float  # H W of an image, the mean of several sizes

    @property
    def grid(self) -> Grid:
        """Rows and columns of sites."""
        return self.codes.shape[1], self.codes.shape[2]


def _sizes_of(sequence: TokenSequence) -> str:
    """Describe the codes of a sequence; their form does not matter where a site has one code."""
    form = "fixed_length=True" if sequence.fixed_length else f"dummies={sequence.dummies}"
    several = f", {form}" if sequence.max_loops > 1 else ""
    return f"n_e={sequence.n_e}, max_loops={sequence.max_loops}{several}"


class Prior(Model, ABC):
    """A distribution over the codes of a frozen tokenizer, given a condition.

    The arguments are those of a `Net2NetTransformer`.

    Attributes:
        be_unconditional: True without a condition.
        condition_dropout: Share of images whose condition was hidden in training; above 0, samples
            can be guided.
        learning_rate: Set by the caller before training.

    Raises:
        ValueError: The parts do not fit each other.
    """

    condition_dropout: float = 0.0
    built_from = {
        "first_stage_config": "first_stage_model",
        "cond_stage_config": "cond_stage_model",
    }

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        *,
        first_stage_key: str,
        cond_stage_key: str,
        permuter_config: Mapping[str, Any] | None = None,
        sequence_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        downsample_cond_size: int = -1,
        sos_token: int = 0,
    ) -> None:
        super().__init__()
        self.learning_rate = 4.5e-6
        self.be_unconditional = cond_stage_config == UNCONDITIONAL
        self.sos_token = sos_token
        self.first_stage_key = first_stage_key
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.downsample_cond_size = downsample_cond_size
        tokenizer: Any = freeze(instantiate_from_config(first_stage_config))
        own = getattr(getattr(tokenizer, "quantize", None), "sequence", None)
        if own is None:
            raise ValueError(
                "first_stage_config must name a tokenizer, a VQModel or one Level of a VQVAE2, got "
                f"a {type(tokenizer).__name__}"
            )
        self.first_stage_model = tokenizer
        self.cond_stage_model = build_cond_stage(cond_stage_config, tokenizer, sos_token)
        permuter, sequence, self.schedule = (
            None if config is None else instantiate_from_config(config)
            for config in (permuter_config, sequence_config, scheduler_config)
        )
        self.permuter: Permuter | Identity = permuter or Identity()
        self.sequence: TokenSequence = sequence or own
        chosen, needed = _sizes_of(self.sequence), _sizes_of(own)
        if chosen != needed:
            raise ValueError(f"the sequence is for {chosen}, but the tokenizer has {needed}")

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The part that is trained."""

    @property
    def grid(self) -> Grid:
        """Rows and columns of sites of an image of the size trained on."""
        return self.first_stage_model.grid

    @property
    def n_classes(self) -> int | None:
        """Number of classes of a class-conditional prior, None for others."""
        return getattr(self.cond_stage_model, "n_classes", None)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights, as `load_weights` does; the original's name for it."""
        load_weights(self, path, ignore_keys)

    # --- training: batch -> nats -> log ----------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the token caches among the data before any batch is read.

        Raises:
            DataError: Another tokenizer wrote one of them.
        """
        for data in self._datasets.values():
            self._check_fingerprints([data.fingerprint] if hasattr(data, "fingerprint") else [])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Train on one batch."""
        return self._mean_nats(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Measure one batch."""
        return self._mean_nats(batch, "val")

    @abstractmethod
    def measure_nats(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """Measure -log p of images' tokens, lengths of sites included: (B,) float32, in nats.

        The second output is the number of tokens of each, (B,) int64.
        """

    def _mean_nats(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Return -log p of a token, in nats; log it, and the bits per token, image and pixel."""
        seen = self.tokenize_batch(batch)
        nats, lengths = self.measure_nats(seen)
        images, tokens = len(nats), int(lengths.sum())
        loss, bits = nats.sum() / tokens, nats.detach().sum() / math.log(2)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"{split}/loss is not finite at step {self.global_step}")
        for name, value, weight in (
            ("loss", loss, tokens),
            ("bits_per_token", bits / tokens, tokens),
            ("bits_per_image", bits / images, images),
            ("bits_per_pixel", bits / (images * seen.pixels), images),
            ("tokens_per_image", tokens / images, images),
        ):
            options: dict[str, Any] = {"prog_bar": name == "loss", "sync_dist": split == "val"}
            self.log(f"{split}/{name}", value, on_epoch=True, batch_size=weight, **options)
        return loss * share_of_rank(tokens, loss) if split == "train" else loss

    def configure_optimizers(self) -> Any:
        """AdamW (arXiv:1711.05101) with weight decay on linear and convolution layers only."""
        decayed = {
            f"{name}.weight"
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        parameters = sorted(self.network.named_parameters())
        groups = [
            {"params": [p for n, p in parameters if n in decayed], "weight_decay": 0.01},
            {"params": [p for n, p in parameters if n not in decayed], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        if self.schedule is None:
            return optimizer
        scheduler = scheduled(optimizer, self.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # --- batch -> codes and tokens ---------------------------------------------------------------

    @torch.no_grad()
    def tokenize_batch(self, batch: Mapping[str, Any]) -> TokenizedBatch:
        """Encode a batch of images, or take the codes of one from a token cache.

        Raises:
            DataError: Cached tokens are another tokenizer's, or lack the condition.
        """
        if is_cached(batch):
            codes, pixels = self._cached_codes(batch), float(batch["pixels"].float().mean())
            key = "tokens" if self.be_unconditional else self.cond_stage_key
            if key not in batch:
                raise DataError(
                    f"the token cache has no {key!r}, which the prior needs as its condition, only "
                    f"{', '.join(batch)}"
                )
            c = self.get_input(key, batch)
        else:
            x, c = self.get_xc(batch)
            codes, pixels = self.encode_codes(x), x.shape[2] * x.shape[3]
        return TokenizedBatch(codes, self.codes_to_tokens(codes), c, *self.encode_to_c(c), pixels)

    def _cached_codes(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the codes (B, h, w, T) of a batch from a token cache."""
        self._check_fingerprints(batch["fingerprint"])
        (h, w), *others = batch["grid"].unique(dim=0).tolist()
        if others:
            raise DataError(
                f"a batch of cached tokens has grids of {h}x{w} and {others[0][0]}x{others[0][1]} "
                "sites: leave wrap and other data sets around a TokenCache out of the configuration"
            )
        return self.first_stage_model.quantize.sequence.decode(batch["tokens"], (h, w))

    def _check_fingerprints(self, names: Iterable[str]) -> None:
        """Refuse the fingerprint of a cache that another tokenizer wrote."""
        for found in {*names} - {self.fingerprint}:
            raise DataError(
                f"the token cache was written by another tokenizer (fingerprint {found[:12]}) than "
                f"that of first_stage_config ({self.fingerprint[:12]}), or the tokenizer was "
                "trained further since: name the one that wrote it, or write the cache anew with "
                "`taming encode`"
            )

    @cached_property
    def fingerprint(self) -> str:
        """The tokenizer's fingerprint (see `FirstStage.fingerprint`)."""
        return self.first_stage_model.fingerprint()

    def get_input(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        """Take a tensor out of a batch; images (B, H, W, C) or (B, H, W) become (B, C, H, W).

        Raises:
            DataError: The batch has no such tensor, or it is not what the tokenizer or the
                condition stage takes.
        """
        x = self._checked_input(key, batch)
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2).contiguous()
        return x.float() if x.ndim == 4 or x.dtype == torch.float64 else x

    def _checked_input(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        """Take a tensor out of a batch as it is, and refuse what its part does not take."""
        is_image = key == self.first_stage_key
        part: Any = self.first_stage_model if is_image else self.cond_stage_model
        parameter = f"the prior's {'first' if is_image else 'cond'}_stage_key"
        if channels := getattr(part, "channels", None):
            return images_of(batch, key, parameter, channels, part.value_range)
        x = tensor_of(batch, key, parameter)
        if check := getattr(part, "check", None):
            check(x)
        return x

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that is still on the CPU, and whose images or conditions do not fit."""
        for key in {self.first_stage_key, self.cond_stage_key} & {*batch}:  # not all in a cache
            self._checked_input(key, batch)

    def get_xc(self, batch: Mapping[str, Any], N: int | None = None) -> tuple[Tensor, Tensor]:
        """Take the first N (all, if None) images and conditions out of a batch."""
        x = self.get_input(self.first_stage_key, batch)
        same = self.cond_stage_key == self.first_stage_key
        return x[:N], x[:N] if same else self.get_input(self.cond_stage_key, batch)[:N]

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Encode conditions: the first output of their stage, and tokens (B, L) int64."""
        if self.downsample_cond_size > -1 and c.ndim == 4:  # a class has no size
            c = F.interpolate(c, size=(self.downsample_cond_size, self.downsample_cond_size))
        with torch.autocast(c.device.type, enabled=False):
            quant_c, _, (_, _, indices) = self.cond_stage_model.encode(c)
        return quant_c, indices.reshape(len(c), -1 if len(c) else 1)  # (B, L)

    # --- images <-> codes <-> tokens -------------------------------------------------------------

    def encode_codes(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as codes (B, h, w, T) int64."""
        return self._encode(x)[1]

    @torch.no_grad()
    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as z_q (B, D, h, w) and codes (B, h, w, T).

        The tokenizer runs in its own precision, so that codes are the same in training and after.
        """
        with torch.autocast(x.device.type, enabled=False):
            quant_z, _, info = self.first_stage_model.encode(x)
        batch, _, h, w = quant_z.shape
        return quant_z, info.indices.reshape(batch, h, w, self.sequence.max_loops)  # (B, h, w, T)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, quant_c: Tensor | None = None) -> Tensor:
        """Decode codes (B, h, w, T) to images (B, C, H, W), about in [-1, 1].

        ``quant_c`` is the first output of the condition stage, which a `LowerLevelPrior` needs.
        """
        batch, h, w, _ = codes.shape
        shape = (batch, h, w, self.first_stage_model.quantize.e_dim)
        return self.first_stage_model.decode_code(codes, shape)

    def codes_to_tokens(self, codes: Tensor) -> Tensor:
        """Encode codes (B, h, w, T) as tokens (B, L), in the prior's order of sites."""
        ordered = self.permuter(codes.flatten(1, 2)).reshape(codes.shape)
        return self.sequence.encode(ordered)[0]

    def tokens_to_codes(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Decode tokens (B, L) of a grid (h, w) to codes (B, h, w, T).

        Raises:
            ValueError: A sequence breaks the grammar.
        """
        codes = self.sequence.decode(tokens, grid)
        return self.permuter(codes.flatten(1, 2), reverse=True).reshape(codes.shape)

    def encode_to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, C, H, W) as z_q (B, D, h, w) and tokens (B, L); the original's."""
        quant_z, codes = self._encode(x)
        return quant_z, self.codes_to_tokens(codes)

    def decode_to_img(self, index: Tensor, zshape: Sequence[int]) -> Tensor:
        """Decode tokens (B, L) to images, given ``zshape`` (B, D, h, w); the original's."""
        return self.decode_codes(self.tokens_to_codes(index, (zshape[2], zshape[3])))

    # --- prior -> codes -> images ----------------------------------------------------------------

    @torch.no_grad()
    def sample_codes(
        self,
        condition: Condition,
        params: SamplingParams = DEFAULT_SAMPLING,
        *,
        codes: Tensor | None = None,
        known: int | Tensor = 0,
        grid: Grid | None = None,
        window: Grid | None = None,
        callback: ProgressCallback | None = None,
    ) -> Tensor:
        """Sample codes, or complete given ones, in eval mode. Arguments are not changed.

        Args:
            condition: Tokens (B, L) int64; or a function that returns those for a `Window`.
            params: How tokens are sampled.
            codes: (B, h, w, T) int64, of which the known sites stay; None for nothing known.
            known: Known sites: their number, from the first in raster order; or (h, w) bool. A
                sampled site depends on those before it in the prior's order, not on later ones.
            grid: (h, w) to sample without ``codes``; None for the one trained on.
            window: (h, w) of the window through which a larger grid is sampled; None for the grid
                trained on. Networks that need no window ignore it.
            callback: Called after each step, which samples a token of each image or a turn.

        Returns:
            (B, h, w, T) int64.

        Raises:
            ValueError: A value is out of range, or the prior cannot do what is asked.
        """
        size = (grid or self.grid) if codes is None else (codes.shape[1], codes.shape[2])
        empty = self.empty_codes(len(condition_in(condition, Window(0, 0, *size))), size)
        kept = known_mask(0 if codes is None else known, size, empty.device)  # (h, w)
        start = empty if codes is None else torch.where(kept[..., None], codes, empty)
        report = Report(int((~kept).sum()) * self.sequence.site_tokens, callback)
        return self._complete(Completion(start, kept, condition, params, window, report))

    @abstractmethod
    def _complete(self, task: Completion) -> Tensor:
        """Sample the unknown sites of codes: (B, h, w, T) int64."""

    def empty_codes(self, batch: int, grid: Grid) -> Tensor:
        """Return codes (B, h, w, T) int64 that stand for nothing: code 0 everywhere."""
        fill = 0 if self.sequence.fixed_length else -1
        codes = torch.full((batch, *grid, self.sequence.max_loops), fill, device=self.device)
        codes[..., 0] = 0
        return codes

    def show(self, images: Tensor) -> Tensor:
        """Colour images (B, C, H, W), given or decoded: (B, 3, H, W), about in [-1, 1]."""
        return self.first_stage_model.to_rgb(self.first_stage_model.as_input(images))

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], temperature: float = 1.0, top_k: int = 100, **unused: Any
    ) -> dict[str, Tensor]:
        """Return pictures (B, 3, H, W) of at most 4 images of a batch (see `pictures_of`)."""
        return pictures_of(self, batch, SamplingParams(temperature, top_k), self._datasets)

    @property
    def _datasets(self) -> Mapping[str, Any]:
        """The data sets of the training by split, if there is a data module that shows them."""
        return getattr(getattr(self._trainer, "datamodule", None), "datasets", {})
