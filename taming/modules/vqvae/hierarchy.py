"""Latent maps at several scales, each with its own quantizer: VQ-VAE-2.

From Razavi et al. 2019 (arXiv:1906.00446, section 3.1). The latents z of the finest level are
encoded further, level by level. Quantization then comes down from the coarsest level, the top:
every level sees what the levels above have kept, decoded to its own scale, and quantizes what is
left to be said.

Axis letters: B images, D channels of all levels, h w grid of the finest level, K codes, T turns.
What belongs to one level has an index l; its *stack* is z_q of this level and of all above, those
enlarged to this level's grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.vqvae.base import LoopTrace, Quantizer, QuantizerOutput
from taming.modules.vqvae.metrics import HierarchyMetrics
from taming.util import instantiate_from_config


class LevelOutput(NamedTuple):
    """Attributes: z (B, D_l, h_l, w_l), the latents of a level; what its quantizer made of them."""

    z: Tensor
    quantized: QuantizerOutput


class HierarchyInfo(NamedTuple):
    """What is known of the codes, the top level first.

    Attributes:
        perplexity: Of each level; None where not computed.
        encodings: Name of a level -> what went into its quantizer and came out.
        indices: (B, h_l, w_l, T_l) int64 of each level.
    """

    perplexity: tuple[Tensor | None, ...]
    encodings: dict[str, LevelOutput]
    indices: tuple[Tensor, ...]


class HierarchyOutput(NamedTuple):
    """Attributes: z_q (B, D, h, w), the finest level's stack; loss, summed over levels; info."""

    z_q: Tensor
    loss: Tensor
    info: HierarchyInfo


def pile(above: Tensor, z_q: Tensor) -> Tensor:
    """Stack of a level: z_q (B, D_l, h_l, w_l), after the stack above it, enlarged to its grid."""
    return torch.cat([F.interpolate(above, size=z_q.shape[2:]), z_q], dim=1)


class Hierarchy(Quantizer):
    """Quantizers at several scales, in place of one: VQ-VAE-2.

    Args:
        quantizers: Name -> ``{target, params}`` of the quantizer of each level, the top first.
        ddconfig: Keyword arguments of `Encoder` and `Decoder`, which lead from each level to the
            one above and back; its ``resolution`` is the height h of the finest level. Channels
            follow from the quantizers.
        level_dropout: Share of training images of which the stack holds only the upper levels,
            down to one drawn at random, and zeros for those below, as in `complete`. Each level
            then says what it can say alone; without it, the lowest may leave nothing to the others.

    Attributes:
        n_e: Codes of all levels together.
        e_dim: D, channels of all levels together.
        factors: How many times smaller than the finest grid each level's is, the top first.

    Raises:
        ValueError: There are fewer than two levels, or ``level_dropout`` is no share.
    """

    learns_alone = False

    def __init__(
        self,
        quantizers: Mapping[str, Mapping[str, Any]],
        ddconfig: Mapping[str, Any],
        level_dropout: float = 0.0,
    ) -> None:
        if len(quantizers) < 2:
            raise ValueError(f"a hierarchy needs two levels or more, got {list(quantizers)}")
        if not 0 <= level_dropout <= 1:
            raise ValueError(f"level_dropout must be in [0, 1], got {level_dropout}")
        built: dict[str, Quantizer] = {
            name: instantiate_from_config(config) for name, config in quantizers.items()
        }
        super().__init__(sum(q.n_e for q in built.values()), sum(q.e_dim for q in built.values()))
        self.level_dropout = level_dropout
        self.names = tuple(built)
        self.levels = tuple(built.values())
        self.quantizers = nn.ModuleDict(built)
        self.encoders, self.decoders, self.merges = (nn.ModuleList() for _ in range(3))
        self.factors = (1,)
        below = self.e_dim
        for quantizer in self.levels[:0:-1]:
            above = below - quantizer.e_dim
            sizes = {"in_channels": below, "out_ch": below, "z_channels": above, "double_z": False}
            sizes["resolution"] = ddconfig["resolution"] // self.factors[0]
            encoder = Encoder(**{**ddconfig, **sizes})
            self.encoders.insert(0, encoder)
            self.decoders.insert(0, Decoder(**{**ddconfig, **sizes}))
            self.merges.insert(0, nn.Conv2d(2 * below, quantizer.e_dim, 1))
            self.factors = (self.factors[0] * encoder.factor, *self.factors)
            below = above

    @property
    def sequence(self) -> TokenSequence:
        """Only each level has a sequence.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "codes at several scales are not one sequence; a prior is over one level of them, "
            "taming.models.vqvae2.Level"
        )

    def forward(self, z: Tensor) -> HierarchyOutput:
        """Quantize latents.

        Args:
            z: (B, D, h, w), h and w multiples of the largest factor.

        Raises:
            ValueError: The sides are no such multiples.
        """
        self._check(z)
        *features, latents = self._features(z)
        levels = {self.names[0]: LevelOutput(latents, self.levels[0](latents))}
        stack = levels[self.names[0]].quantized.z_q
        for name, quantizer, decoder, merge in zip(
            self.names[1:], self.levels[1:], self.decoders, self.merges, strict=True
        ):
            latents = merge(torch.cat([features.pop(), decoder(stack)], dim=1))
            levels[name] = LevelOutput(latents, quantizer(latents))
            stack = pile(stack, levels[name].quantized.z_q)
        if self.training and self.level_dropout > 0:
            stack = self._drop_levels(stack)
        quantized = [level.quantized for level in levels.values()]
        info = HierarchyInfo(
            tuple(q.info.perplexity for q in quantized),
            levels,
            tuple(q.info.indices.reshape(len(z), *q.z_q.shape[2:], -1) for q in quantized),
        )
        return HierarchyOutput(stack, torch.stack([q.loss for q in quantized]).sum(), info)

    def _drop_levels(self, stack: Tensor) -> Tensor:
        """Put zeros in place of the lower levels of some images of a stack (B, D, h, w)."""
        channels = torch.tensor([q.e_dim for q in self.levels], device=stack.device)
        kept = torch.randint(1, len(channels), (len(stack),), device=stack.device)
        dropped = torch.rand(len(stack), device=stack.device) < self.level_dropout
        kept = torch.where(dropped, channels.cumsum(0)[kept - 1], self.e_dim)
        of_kept = torch.arange(self.e_dim, device=stack.device) < kept[:, None]
        return stack * of_kept[:, :, None, None]

    def traces(self, output: HierarchyOutput) -> dict[str, LoopTrace]:
        """Return the trace of each level that has one, by the level's name."""
        levels = zip(self.levels, output.info.encodings.items(), strict=True)
        traces = {name: q.traces(level.quantized) for q, (name, level) in levels}
        return {name: trace[""] for name, trace in traces.items() if trace}

    def codebook_metrics(self) -> HierarchyMetrics:
        """Return new metrics that count the codes of each level."""
        levels = zip(self.names, self.levels, strict=True)
        return HierarchyMetrics({name: level.codebook_metrics() for name, level in levels})

    def followed(self) -> dict[str, Tensor]:
        """What is worth following in each level (see `Quantizer`), by ``level_name``."""
        levels = zip(self.names, self.levels, strict=True)
        return {f"{name}_{k}": v for name, level in levels for k, v in level.followed().items()}

    def _check(self, z: Tensor) -> None:
        """Refuse latents whose sides cannot be divided into sites of the top level."""
        h, w = z.shape[2:]
        if h % self.factors[0] or w % self.factors[0]:
            raise ValueError(
                f"a grid of {h}x{w} does not fit {self.names[0]!r}, which is {self.factors[0]} "
                f"times smaller: its sides must be multiples of {self.factors[0]}"
            )

    def _features(self, z: Tensor) -> list[Tensor]:
        """Features of each level, the finest first; those of the top are its latents."""
        features = [z]
        for encoder in reversed(self.encoders):
            features.append(encoder(features[-1]))
        return features

    def get_codebook_entry(
        self, indices: Sequence[Tensor], shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Turn the codes of all levels, or of the upper ones only, back into their stack.

        Args:
            indices: (B, h_l, w_l, T_l) int64 of each level, the top first.
            shape: Plays no part; the codes are never flat.

        Returns:
            Stack of the last level given: of all levels, exactly z_q of `forward` in eval mode.

        Raises:
            ValueError: There are codes of no level or of too many, or a grid does not fit.
        """
        if not 1 <= len(indices) <= len(self.names):
            raise ValueError(f"got codes of {len(indices)} levels, there are {list(self.names)}")
        top = indices[0].shape[1:3]
        stack = None
        for name, quantizer, codes, factor in zip(
            self.names, self.levels, indices, self.factors, strict=False
        ):
            h, w = (side * self.factors[0] // factor for side in top)
            if codes.shape[1:3] != (h, w):
                raise ValueError(
                    f"codes of {name!r} are {tuple(codes.shape)}, not (B, {h}, {w}, T)"
                )
            z_q = quantizer.get_codebook_entry(codes, (len(codes), h, w, quantizer.e_dim))
            stack = z_q if stack is None else pile(stack, z_q)
        assert stack is not None
        return stack

    def complete(self, stack: Tensor) -> Tensor:
        """Enlarge the stack of any level to (B, D, h, w), with zeros for the levels below."""
        channels = 0
        for quantizer, factor in zip(self.levels, self.factors, strict=True):
            channels += quantizer.e_dim
            if channels == stack.shape[1]:
                stack = F.interpolate(stack, scale_factor=factor)
                return F.pad(stack, (0, 0, 0, 0, 0, self.e_dim - channels))
        raise ValueError(f"{stack.shape[1]} channels are the stack of no level of {self.names}")
