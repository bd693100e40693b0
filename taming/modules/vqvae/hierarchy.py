"""Latent maps at several scales, each with its own quantizer: VQ-VAE-2.

From Razavi et al. 2019 (arXiv:1906.00446, section 3.1). The latents z of the finest level are
encoded further, level by level. Quantization then goes from the coarsest level, the top, downward:
every level sees z_q of the levels above, decoded to its own scale, and quantizes the rest.

Axis letters: B images, D channels of all levels, h w grid of the finest level, K codes, T turns.
Sizes of one level have an index l; its *stack* is z_q of this level and of all levels above,
enlarged to this level's grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.vqvae.base import GridShape, LoopTrace, Quantizer, QuantizerOutput
from taming.modules.vqvae.build import build_quantizer

if TYPE_CHECKING:
    from taming.modules.vqvae.metrics import HierarchyMetrics


class LevelOutput(NamedTuple):
    """Attributes: z (B, D_l, h_l, w_l), the latents of a level; its quantizer's output."""

    z: Tensor
    quantized: QuantizerOutput


class HierarchyInfo(NamedTuple):
    """Perplexity, encodings and indices of each level, the top first.

    Attributes:
        perplexity: Of each level; None where not computed.
        encodings: Name of a level -> input and output of its quantizer.
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


def extend_stack(above: Tensor, z_q: Tensor) -> Tensor:
    """Append a level's z_q (B, D_l, h_l, w_l) to the stack above it, enlarged to its grid."""
    return torch.cat([F.interpolate(above, size=z_q.shape[2:]), z_q], dim=1)


class Hierarchy(Quantizer):
    """Quantizers at several scales, in place of one: VQ-VAE-2.

    Args:
        quantizers: Name -> ``{target, params}`` of the quantizer of each level, the top first; at
            least two.
        ddconfig: Keyword arguments of `Encoder` and `Decoder`, which lead from each level to the
            one above and back; its ``resolution`` is the height h of the finest level. Channels
            follow from the quantizers.
        level_dropout: Share of training images, in [0, 1], whose stack keeps only the upper levels,
            down to one chosen at random, and zeros for those below, as in `pad_stack`. Every level
            then learns to be useful without those below; otherwise the lowest may take over.

    Attributes:
        names: Names of the levels, the top first.
        levels: Their quantizers.
        factors: Downsampling factor of each level relative to the finest grid, the top first.

    Example:
        >>> ema = "taming.modules.vqvae.quantize.EMAVectorQuantizer"
        >>> level = {"target": ema, "params": {"n_embed": 16, "embedding_dim": 4, "beta": 0.25}}
        >>> sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
        >>> hierarchy = Hierarchy({"top": level, "bottom": level}, {**sizes, "resolution": 8})
        >>> z_q, loss, info = hierarchy.eval()(torch.randn(2, 8, 8, 8))
        >>> [tuple(codes.shape) for codes in info.indices]
        [(2, 4, 4, 1), (2, 8, 8, 1)]
        >>> torch.equal(hierarchy.get_codebook_entry(info.indices), z_q)
        True
    """

    trains_without_decoder = False
    not_in_identity = ("level_dropout",)

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
            name: build_quantizer(config) for name, config in quantizers.items()
        }
        super().__init__(sum(q.n_e for q in built.values()), sum(q.e_dim for q in built.values()))
        self.level_dropout = level_dropout
        self.by_name = built
        self.names, self.levels = tuple(built), tuple(built.values())
        self.quantizers = nn.ModuleDict(built)
        self.encoders, self.decoders, self.merges = (nn.ModuleList() for _ in range(3))
        self.factors = (1,)
        below = self.e_dim
        for quantizer in self.levels[:0:-1]:  # from the finest level up to the second
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
        """Raise a ValueError: only each level has a sequence."""
        raise ValueError(
            "codes at several scales are not one sequence; a prior is over one level of them, "
            "taming.models.vqvae2.Level"
        )

    def forward(self, z: Tensor) -> HierarchyOutput:
        """Quantize latents z (B, D, h, w); h and w must be multiples of the largest factor."""
        h, w = z.shape[2:]
        if h % self.factors[0] or w % self.factors[0]:
            raise ValueError(
                f"a grid of {h}x{w} does not fit {self.names[0]!r}, which is {self.factors[0]} "
                f"times smaller: its sides must be multiples of {self.factors[0]}"
            )
        features = [z]  # of each level, the finest first; those of the top are its latents
        for encoder in reversed(self.encoders):
            features.append(encoder(features[-1]))
        latents = features.pop()
        levels = {self.names[0]: LevelOutput(latents, self.levels[0](latents))}
        stack = levels[self.names[0]].quantized.z_q
        for name, quantizer, decoder, merge in zip(
            self.names[1:], self.levels[1:], self.decoders, self.merges, strict=True
        ):
            latents = merge(torch.cat([features.pop(), decoder(stack)], dim=1))
            levels[name] = LevelOutput(latents, quantizer(latents))
            stack = extend_stack(stack, levels[name].quantized.z_q)
        if self.training and self.level_dropout > 0:
            stack = self._drop_levels(stack)
        quantized = [level.quantized for level in levels.values()]
        info = HierarchyInfo(
            tuple(q.info.perplexity for q in quantized),
            levels,
            tuple(
                q.info.indices.reshape(z.shape[0], *q.z_q.shape[2:], level.sequence.max_loops)
                for q, level in zip(quantized, self.levels, strict=True)
            ),
        )
        return HierarchyOutput(stack, torch.stack([q.loss for q in quantized]).sum(), info)

    def _drop_levels(self, stack: Tensor) -> Tensor:
        """Put zeros in place of the lower levels of some images of a stack (B, D, h, w)."""
        channels = torch.tensor([q.e_dim for q in self.levels], device=stack.device)
        kept = torch.randint(1, len(channels), (len(stack),), device=stack.device)
        dropped = torch.rand(len(stack), device=stack.device) < self.level_dropout
        kept = torch.where(dropped, channels.cumsum(0)[kept - 1], self.e_dim)  # (B,), channels
        of_kept = torch.arange(self.e_dim, device=stack.device) < kept[:, None]  # (B, D)
        return stack * of_kept[:, :, None, None]

    def get_codebook_entry(
        self, indices: Sequence[Tensor], shape: GridShape | None = None
    ) -> Tensor:
        """Turn the codes of all levels, or of the upper ones only, back into their stack.

        Args:
            indices: (B, h_l, w_l, T_l) int64 of each level, the top first.
            shape: Ignored; the codes are never flat.

        Returns:
            Stack of the last level given: of all levels, exactly z_q of `forward` in eval mode.

        Raises:
            ValueError: There are codes of no level or of too many, or a grid does not fit.
        """
        given = [*indices] if isinstance(indices, Sequence) else [None]
        fit = (isinstance(c, Tensor) and c.ndim in (3, 4) and 0 not in c.shape[1:3] for c in given)
        if not all(fit):
            raise ValueError(f"expected codes (B, h, w, T) of each level in turn: {self.names}")
        if not 1 <= len(indices) <= len(self.names):
            raise ValueError(f"got codes of {len(indices)} levels, there are {list(self.names)}")
        batch, *top = indices[0].shape[:3]
        stack = None
        for name, quantizer, codes, factor in zip(
            self.names, self.levels, indices, self.factors, strict=False
        ):
            h, w = (side * self.factors[0] // factor for side in top)
            if codes.shape[:3] != (batch, h, w):
                raise ValueError(
                    f"codes of {name!r} are {tuple(codes.shape)}, not ({batch}, {h}, {w}, T)"
                )
            z_q = quantizer.get_codebook_entry(codes, (batch, h, w, quantizer.e_dim))
            stack = z_q if stack is None else extend_stack(stack, z_q)
        assert stack is not None
        return stack

    def pad_stack(self, stack: Tensor) -> Tensor:
        """Enlarge the stack of any level to (B, D, h, w), with zeros for the levels below."""
        channels = 0
        for quantizer, factor in zip(self.levels, self.factors, strict=True):
            channels += quantizer.e_dim
            if channels == stack.shape[1]:
                stack = F.interpolate(stack, scale_factor=factor)
                return F.pad(stack, (0, 0, 0, 0, 0, self.e_dim - channels))
        raise ValueError(f"no level of {self.names} has a stack of {stack.shape[1]} channels")

    def traces(self, output: HierarchyOutput) -> dict[str, LoopTrace]:
        """Return the trace of each loopy level under the level's name."""
        outputs = output.info.encodings
        traces = {n: q.traces(outputs[n].quantized).values() for n, q in self.by_name.items()}
        return {name: trace for name, of_level in traces.items() for trace in of_level}

    def codebook_metrics(self) -> HierarchyMetrics:
        """Return a new metric that counts the codes of each level."""
        from taming.modules.vqvae.metrics import HierarchyMetrics  # imports torchmetrics: seconds

        return HierarchyMetrics({n: q.codebook_metrics() for n, q in self.by_name.items()})

    def bits(self, codes: Sequence[Tensor]) -> Tensor:
        """Add up the bits (B,) of all levels."""
        bits = [quantizer.bits(own) for quantizer, own in zip(self.levels, codes, strict=True)]
        return torch.stack(bits).sum(dim=0)

    def tracked_scalars(self) -> dict[str, Tensor]:
        """Return each level's scalars (see `Quantizer`) as ``{level}_{name}``."""
        scalars = {n: q.tracked_scalars().items() for n, q in self.by_name.items()}
        return {f"{name}_{key}": value for name, items in scalars.items() for key, value in items}

    def identity(self) -> dict[str, object]:
        """Add the identity of each level."""
        return {**super().identity(), "levels": {n: q.identity() for n, q in self.by_name.items()}}
