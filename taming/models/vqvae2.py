"""VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446): codes at several scales.

`VQVAE2` is a `VQModel` whose quantizer is a `Hierarchy`, so it trains as any other does. A prior
sees it through a `Level`; the priors are in `taming.models.level_prior`.

Axis letters: B images, C channels, H W image, D latent channels of all levels, h w grid of the
finest, L tokens. What belongs to one level has an index l; its *stack* is z_q of this level and of
all above, enlarged to its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taming.models.vqgan import VQModel
from taming.modules.vqvae.base import LoopTrace, Quantizer, QuantizerInfo, QuantizerOutput
from taming.modules.vqvae.heatmap import length_heat_map
from taming.modules.vqvae.hierarchy import Hierarchy, HierarchyOutput, pile
from taming.util import instantiate_from_config


class VQVAE2(VQModel):
    """VQ-VAE with codes at several scales.

    ``encode`` returns the codes of all levels, a tuple with the top first, each (B, h_l, w_l, T_l);
    ``decode_code`` takes them. Everything else is as in `VQModel`: encoder and decoder are those
    between the image and the finest level.

    Args:
        ddconfig: See `VQModel`.
        lossconfig: See `VQModel`.
        n_embed: Codes of all levels together.
        embed_dim: D, channels of all levels together.
        quantizer_config: ``{target, params}`` of a `Hierarchy`.
        **kwargs: See `VQModel`.

    Raises:
        ValueError: The quantizer is no hierarchy, or the parts do not fit each other.
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
        if not isinstance(self.quantize, Hierarchy):
            raise ValueError(
                f"VQVAE2 needs a Hierarchy of quantizers, not a {type(self.quantize).__name__}; "
                "with one quantizer, use taming.models.vqgan.VQModel"
            )

    def decode_code(self, code_b: Sequence[Tensor], shape: None = None) -> Tensor:
        """Decode the codes of all levels, the top first, to images (B, C, H, W).

        Codes of the upper levels alone show what these say: the others are as if z_q were zero.

        Args:
            code_b: (B, h_l, w_l, T_l) int64 of each level.
            shape: Plays no part; the codes are never flat.

        Raises:
            ValueError: The codes do not fit the levels.
        """
        return self.decode_stack(self.quantize.get_codebook_entry(code_b))

    def decode_stack(self, stack: Tensor) -> Tensor:
        """Decode the stack of any level to images (B, C, H, W); levels below it count as zero."""
        return self.decode(self.quantize.complete(stack))

    def code_pictures(self, quantized: HierarchyOutput, size: tuple[int, int]) -> dict[str, Tensor]:
        """Pictures of the codes: what the upper levels show alone, and depths of loopy levels.

        Args:
            quantized: What `encode` returned.
            size: (H, W) in pixels.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1].
        """
        pictures, codes = {}, quantized.info.indices
        for number, (name, level) in enumerate(quantized.info.encodings.items()):
            if number + 1 < len(codes):
                shown = self.as_input(self.decode_code(codes[: number + 1]))
                pictures[f"{name}_only"] = shown if shown.shape[1] == 3 else self.to_rgb(shown)
            trace, turns = level.quantized.info.encodings, codes[number].shape[-1]
            if isinstance(trace, LoopTrace) and turns > 1:
                pictures[f"{name}_depths"] = length_heat_map(trace.lengths, turns, size)
        return pictures


class LevelScale(NamedTuple):
    """Attributes: resolution, side of images in pixels; factor, pixels per site of a level."""

    resolution: int
    factor: int


class Level(nn.Module):
    """One level of a `VQVAE2`, in the form in which a prior takes its tokenizer.

    Its ``encode`` gives the codes of this level alone, and the level's stack.

    Args:
        model_config: ``{target, params}`` of the `VQVAE2`, such as
            ``taming.run.folder.model_from_run`` with the ``run``.
        level: Name of the level.

    Attributes:
        above: How many levels are above this one.

    Raises:
        ValueError: The model is no `VQVAE2`, or has no such level.
    """

    def __init__(self, model_config: Mapping[str, Any], level: str) -> None:
        super().__init__()
        model = instantiate_from_config(model_config)
        if not isinstance(model, VQVAE2):
            raise ValueError(f"a level is that of a VQVAE2, not of a {type(model).__name__}")
        names = model.quantize.names
        if level not in names:
            raise ValueError(f"there is no level {level!r}, only {', '.join(names)}")
        self.model = model
        self.above = names.index(level)

    @property
    def quantize(self) -> Quantizer:
        """This level's quantizer."""
        return self.model.quantize.levels[self.above]

    @property
    def encoder(self) -> LevelScale:
        """Scale at which the model's encoder and the levels' leave this level."""
        encoder = self.model.encoder
        factor = encoder.factor * self.model.quantize.factors[self.above]
        return LevelScale(encoder.resolution, factor)

    @property
    def condition_vocab_size(self) -> int:
        """Number of different tokens of `condition_tokens`."""
        upper = self.model.quantize.levels[: self.above]
        return max((q.sequence.n_e + (q.sequence.max_loops > 1) for q in upper), default=0)

    @property
    def condition_length(self) -> int:
        """Tokens of `condition_tokens` for images of the size trained on."""
        encoder, quantizer = self.model.encoder, self.model.quantize
        upper = zip(quantizer.levels[: self.above], quantizer.factors, strict=False)
        sides = ((encoder.resolution // encoder.factor // f, q) for q, f in upper)
        return sum(side * side * q.sequence.max_loops for side, q in sides)

    def condition_pictures(
        self, c: Tensor, quant_c: Tensor, size: tuple[int, int], datasets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return images and what the levels above show of them (see `ConditionStage`)."""
        images = {"conditioning": c, "conditioning_rec": self.as_input(self.decode(quant_c))}
        return {k: v if v.shape[1] == 3 else self.to_rgb(v) for k, v in images.items()}

    def encode(self, x: Tensor) -> QuantizerOutput:
        """Encode images (B, C, H, W): the level's stack, its quantizer's loss, its codes."""
        info = self._encode_all(x).info
        codes = info.indices[: self.above + 1]
        own = list(info.encodings.values())[self.above].quantized
        stack = self.model.quantize.get_codebook_entry(codes)
        return QuantizerOutput(
            stack, own.loss, QuantizerInfo(own.info.perplexity, own.info.encodings, codes[-1])
        )

    def codes_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encode images (B, C, H, W): codes (B, h_l, w_l, T_l) of all levels down to this."""
        return self._encode_all(x).info.indices[: self.above + 1]

    def condition_of(self, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Turn codes of the levels above into their stack, and into tokens (B, L)."""
        return self.model.quantize.get_codebook_entry(codes), self.condition_tokens(codes)

    def _encode_all(self, x: Tensor) -> HierarchyOutput:
        """Encode images (B, C, H, W) by all levels."""
        return self.model.quantize(self.model.encode_to_prequant(x))

    def condition_tokens(self, codes: Sequence[Tensor]) -> Tensor:
        """Write codes of the levels above as tokens (B, L): all slots, K where one is absent."""
        upper = zip(self.model.quantize.levels, codes, strict=False)
        return torch.cat([c.masked_fill(c < 0, q.n_e).flatten(1) for q, c in upper], dim=1)

    def decode(self, quant: Tensor) -> Tensor:
        """Decode the stack of this or a higher level; see `VQVAE2.decode_stack`."""
        return self.model.decode_stack(quant)

    def decode_code(self, code_b: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Decode codes of the top level to images (B, C, H, W) of what it says alone.

        Args:
            code_b: (B, h_l, w_l, T_l) int64.
            shape: Plays no part.

        Raises:
            ValueError: The level is not the top.
        """
        if self.above:
            name = self.model.quantize.names[self.above]
            raise ValueError(
                f"codes of {name!r} make no image without those of the levels above; draw all "
                "levels with scripts/sample_hierarchy.py"
            )
        return self.model.decode_code([code_b])

    def decode_under(self, code_b: Tensor, above: Tensor) -> Tensor:
        """Decode codes (B, h_l, w_l, T_l) under the stack of the level above to images."""
        batch, h, w = code_b.shape[:3]
        shape = (batch, h, w, self.quantize.e_dim)
        return self.decode(pile(above, self.quantize.get_codebook_entry(code_b, shape)))

    def as_input(self, x_rec: Tensor) -> Tensor:
        """Bring what is decoded, (B, C, H, W), into the form of an input; see `VQModel`."""
        return self.model.as_input(x_rec)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Colour images of other than 3 channels; see `VQModel.to_rgb`."""
        return self.model.to_rgb(x)
