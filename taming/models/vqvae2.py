"""VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446): codes at several scales.

`VQVAE2` is a `VQModel` whose quantizer is a `Hierarchy`, and trains as any other. A prior takes
one `Level` of it as its tokenizer; the priors are in `taming.models.level_prior`.

Axis letters: B images, C channels, H W image, D latent channels of all levels, h w grid of the
finest, T turns, L tokens. What belongs to one level has an index l; its *stack* is z_q of this
level and of all above, enlarged to its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming.models.first_stage import FirstStage
from taming.models.vqgan import VQModel
from taming.modules.recorded import Recorded
from taming.modules.vqvae.base import GridShape, Quantizer, QuantizerInfo, QuantizerOutput
from taming.modules.vqvae.hierarchy import Hierarchy, HierarchyOutput, extend_stack
from taming.util import instantiate_from_config


class VQVAE2(VQModel):
    """VQ-VAE with codes at several scales.

    ``encode_to_codes`` and ``encode(x).info.indices`` give a tuple of the codes (B, h_l, w_l, T_l)
    of all levels, the top first, and ``decode_code`` takes it. Encoder and decoder lead from the
    image to the finest level and back. Takes the arguments of `VQModel`, among them:

    Args:
        ddconfig: Keyword arguments of `Encoder` and `Decoder`.
        lossconfig: ``{target, params}`` of an `AutoencoderLoss`.
        n_embed: Codes of all levels together.
        embed_dim: D, channels of all levels together.
        quantizer_config: ``{target, params}`` of a `Hierarchy`.
        **kwargs: Further arguments of `VQModel`.

    Raises:
        ValueError: The quantizer is not a hierarchy, or the parts do not fit each other.
    """

    quantize: Hierarchy

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        quantizer_config: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, quantizer_config=quantizer_config, **kwargs
        )
        quantizer = self.quantize
        if not quantizer.names:
            raise ValueError(
                f"VQVAE2 needs a Hierarchy of quantizers, not a {type(quantizer).__name__}; "
                "with one quantizer, use taming.models.vqgan.VQModel"
            )
        if (quantizer.n_e, quantizer.e_dim) != (n_embed, embed_dim):
            raise ValueError(
                f"n_embed is {n_embed} and embed_dim {embed_dim}, but the levels "
                f"{', '.join(quantizer.names)} have {quantizer.n_e} codes and {quantizer.e_dim} "
                "channels together"
            )

    @property
    def levels(self) -> dict[str, Quantizer]:
        """Quantizers by the name of their level, the top first."""
        return self.quantize.by_name

    def codes_by_level(self, quantized: HierarchyOutput) -> dict[str, Tensor]:
        """Return the codes (B, h_l, w_l, T_l) in what ``encode`` returned, by level name."""
        return dict(zip(self.quantize.names, quantized.info.indices, strict=True))

    @property
    def factor(self) -> int:
        """Side in pixels of a site of the top level."""
        return self.encoder.factor * self.quantize.factors[0]

    def decode_code(self, code_b: Sequence[Tensor], shape: None = None) -> Tensor:
        """Decode codes of all levels, or of the upper ones only, to images (B, C, H, W).

        Args:
            code_b: (B, h_l, w_l, T_l) int64 of each level, the top first; z_q of missing ones is 0.
            shape: Not used: the codes are never flat.

        Raises:
            ValueError: The codes do not fit the levels.
        """
        return self.decode_stack(self.quantize.get_codebook_entry(code_b))

    def decode_stack(self, stack: Tensor) -> Tensor:
        """Decode the stack of any level to images (B, C, H, W); levels below it count as zero."""
        return self.decode(self.quantize.pad_stack(stack))

    def code_pictures(self, quantized: HierarchyOutput, size: tuple[int, int]) -> dict[str, Tensor]:
        """Show what the upper levels decode to without those below, and the lengths."""
        codes = quantized.info.indices
        upper = {
            f"{name}_only": self.to_rgb(self.as_input(self.decode_code(codes[:number])))
            for number, name in enumerate(self.quantize.names[:-1], start=1)
        }
        return upper | super().code_pictures(quantized, size)


class Level(Recorded, nn.Module, FirstStage):
    """One level of a `VQVAE2` as the tokenizer of a prior.

    ``encode`` returns the codes of this level alone, and the level's stack. As a condition, a level
    gives the codes of all levels above.

    Args:
        model_config: ``{target, params}`` of the `VQVAE2`, such as
            ``taming.run.folder.model_from_run`` with the ``run``.
        level: Name of the level.

    Attributes:
        above: Number of levels above this one.

    Raises:
        ValueError: The model is not a `VQVAE2`, or has no such level.
    """

    built_from = {"model_config": "model"}

    def __init__(self, model_config: Mapping[str, Any], level: str) -> None:
        super().__init__()
        model = instantiate_from_config(model_config)
        names = [name for name in getattr(model, "levels", {}) if name]
        if not names:
            raise ValueError(f"a Level needs a VQVAE2, not a {type(model).__name__}")
        if level not in names:
            raise ValueError(f"unknown level {level!r}: expected one of {', '.join(names)}")
        self.model: VQVAE2 = model
        self.above = names.index(level)
        self.value_range = model.value_range

    @property
    def whole(self) -> VQVAE2:
        """The model with all its levels."""
        return self.model

    @property
    def quantize(self) -> Quantizer:
        """This level's quantizer."""
        return self.model.quantize.levels[self.above]

    @property
    def channels(self) -> int:
        """C, channels of an image."""
        return self.model.channels

    @property
    def factor(self) -> int:
        """Side in pixels of a site of this level."""
        return self.model.encoder.factor * self.model.quantize.factors[self.above]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of sites (h_l, w_l) of a training image."""
        return self._grid_of(self.above)

    def _grid_of(self, number: int) -> tuple[int, int]:
        """Return the grid of a training image at the level of a number, counted from the top."""
        sites = self.model.quantize.factors[0] // self.model.quantize.factors[number]
        h, w = self.model.grid
        return h * sites, w * sites

    @property
    def condition_vocab_size(self) -> int:
        """Number of different tokens in `condition_tokens`."""
        upper = self.model.quantize.levels[: self.above]
        return max((q.sequence.n_e + (q.sequence.max_loops > 1) for q in upper), default=0)

    @property
    def condition_length(self) -> int:
        """Number of `condition_tokens` of a training image."""
        upper = enumerate(self.model.quantize.levels[: self.above])
        grids = ((*self._grid_of(number), level.sequence.max_loops) for number, level in upper)
        return sum(h * w * turns for h, w, turns in grids)

    def encode(self, x: Tensor, **rate: Any) -> QuantizerOutput:
        """Encode images (B, C, H, W): the level's stack, its quantizer's loss, its codes."""
        info: Any = self.model.encode(x, **rate).info
        codes = info.indices[: self.above + 1]
        own = list(info.encodings.values())[self.above].quantized
        stack = self.model.quantize.get_codebook_entry(codes)
        return QuantizerOutput(
            stack, own.loss, QuantizerInfo(own.info.perplexity, own.info.encodings, codes[-1])
        )

    def codes_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode images (B, C, H, W): codes (B, h_l, w_l, T_l) of all levels down to this one."""
        return self.model.encode_to_codes(x)[: self.above + 1]

    def condition_of(self, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Turn codes of the levels above into their stack and their `condition_tokens`."""
        return self.model.quantize.get_codebook_entry(codes), self.condition_tokens(codes)

    def condition_tokens(self, codes: Sequence[Tensor]) -> Tensor:
        """Turn codes of the levels above into tokens (B, L), with K for each absent code."""
        upper = zip(self.model.quantize.levels, codes, strict=False)
        return torch.cat([c.masked_fill(c < 0, q.n_e).flatten(1) for q, c in upper], dim=1)

    def decode(self, quant: Tensor) -> Tensor:
        """Decode the stack of this or a higher level to images (B, C, H, W)."""
        return self.model.decode_stack(quant)

    def decode_code(self, code_b: Tensor, shape: GridShape | None = None) -> Tensor:
        """Decode codes of the top level to images (B, C, H, W), without the levels below.

        Args:
            code_b: (B, h_l, w_l, T_l) int64.
            shape: Not used: the codes are never flat.

        Raises:
            ValueError: The level is not the top.
        """
        if self.above:
            name = self.model.quantize.names[self.above]
            raise ValueError(
                f"codes of {name!r} make no image without those of the levels above; sample all "
                "levels with scripts/sample_hierarchy.py"
            )
        return self.model.decode_code([code_b])

    def decode_under(self, code_b: Tensor, above: Tensor) -> Tensor:
        """Decode codes (B, h_l, w_l, T_l) under the stack of the level above to images."""
        batch, h, w = code_b.shape[:3]
        shape = (batch, h, w, self.quantize.e_dim)
        return self.decode(extend_stack(above, self.quantize.get_codebook_entry(code_b, shape)))

    def as_input(self, x_rec: Tensor) -> Tensor:
        """Bring decoded images (B, C, H, W) into the form of an input, as the model does."""
        return self.model.as_input(x_rec)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Colour images (B, C, H, W) as the model does."""
        return self.model.to_rgb(x)
