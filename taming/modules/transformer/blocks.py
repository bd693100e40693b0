"""Building blocks of the transformer: sizes, places, cache, attention, block.

Axis letters: B sequences, L tokens, P cached tokens, S tokens with a place, C channels, N heads,
E = C / N channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """Sizes and options of a `GPT`; the defaults of all options give the original's."""

    vocab_size: int  # V, number of different tokens
    block_size: int  # longest sequence, conditions included
    n_layer: int = 12  # blocks
    n_head: int = 8  # attention heads
    n_embd: int = 256  # C, channels of a token
    embd_pdrop: float = 0.0  # dropout of embeddings, in [0, 1)
    resid_pdrop: float = 0.0  # dropout of each residual branch
    attn_pdrop: float = 0.0  # dropout of attention weights
    n_unmasked: int = 0  # first tokens that all attend to each other, such as a condition
    # (rows, columns, depths) of the tables that embed each token's place; None for no tables.
    site_shape: tuple[int, int, int] | None = None
    rms_norm: bool = False  # RMSNorm (arXiv:1910.07467) in place of LayerNorm
    rotary: bool = False  # rotate queries and keys by row, column and depth (`RotaryEmbedding`)
    # Normalize queries and keys, which keeps attention from saturating (Dehghani et al. 2023,
    # arXiv:2302.05442, section 2).
    qk_norm: bool = False
    swiglu: bool = False  # gated units in place of the original's hidden layer (`SwiGLU`)
    # Scale, shift and gate every block by the first token, such as a class (Peebles and Xie 2023,
    # arXiv:2212.09748; one layer for all blocks as in Chen et al. 2023, arXiv:2310.00426, 2.3).
    adaptive_norm: bool = False

    def __post_init__(self) -> None:
        if self.n_head < 1:
            raise ValueError(f"n_head must be at least 1, got {self.n_head}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.site_shape is not None and (len(self.site_shape) != 3 or min(self.site_shape) < 1):
            raise ValueError(
                "site_shape must be rows, columns and depths, each at least 1, got "
                f"{[*self.site_shape]}"
            )

    @property
    def head_channels(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head


@dataclass
class GPT1Config(GPTConfig):
    """The sizes of GPT-1, about 125 million parameters."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class SiteEmbedding(nn.Module):
    """Sum of learned vectors for the row, the column and the depth of a token's place."""

    def __init__(self, shape: tuple[int, int, int], n_embd: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.tables = nn.ModuleList(nn.Embedding(size, n_embd) for size in shape)

    def forward(self, sites: Tensor) -> Tensor:
        """Embed places (B, L, 3) int64 as (B, L, C)."""
        return sum(
            (table(axis) for table, axis in zip(self.tables, sites.unbind(-1), strict=True)),
            start=torch.zeros((), device=sites.device),
        )


class RotaryEmbedding(nn.Module):
    """Rotations by row, column and depth, each on a third of the channels of a head.

    Rotary embedding (Su et al. 2021, arXiv:2104.09864), split among axes as in Heo et al. 2024
    (arXiv:2403.13298, section 3.1), with their lower base because grids are short.

    Args:
        channels: E, even and at least 6.
        base: Ratio of the highest to the lowest frequency.

    Raises:
        ValueError: The number of channels is odd or too small.
    """

    axis: Tensor
    step: Tensor

    def __init__(self, channels: int, base: float = 100.0) -> None:
        super().__init__()
        if channels % 2 or channels < 6:
            raise ValueError(
                "rotary embedding rotates pairs of channels, at least one each for row, column "
                f"and depth: n_embd / n_head must be even and at least 6, got {channels}"
            )
        self.base, self.steps = base, (channels // 2 + 2) // 3
        pair = torch.arange(channels // 2)
        # Integers: frequencies would be rounded where a model is cast to half precision.
        self.register_buffer("axis", pair % 3, persistent=False)
        self.register_buffer("step", pair // 3, persistent=False)

    def forward(self, sites: Tensor, length: int) -> Tensor:
        """Compute cosines and signed sines (2, B, 1, L, E) float32 for L inputs.

        The places (B, S, 3) int64 are those of the last S inputs; others are not rotated.
        """
        frequency = self.base ** (self.step.float() / -self.steps)  # (E / 2,)
        angles = sites[..., self.axis] * frequency  # (B, S, E / 2)
        angles = F.pad(angles, (0, 0, length - sites.shape[1], 0))[:, None]  # (B, 1, L, E / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries or keys (B, N, L, E) by cosines and signed sines (2, B, 1, L, E)."""
    cos, sin = rotation.unbind(0)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # pairs lie half of E apart


def normalize(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Normalize queries or keys (B, N, L, E) in float32, whatever the precision of the weights."""
    return F.rms_norm(x.float(), tuple(norm.normalized_shape), norm.weight.float(), norm.eps)


@dataclass
class KVCache:
    """Keys and values of the tokens so far, in memory that is allocated once."""

    size: int  # most tokens that fit
    # One (B, N, size, E) tensor per layer, allocated with the layer's first keys and values.
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0  # P, tokens stored
    first: Tensor | None = None  # (B, C), first input of each sequence, which adaptive norms need
    # Weight and bias of query, key and value together, per layer; empty to use the layers' own.
    fused: Sequence[tuple[Tensor, Tensor]] = ()

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, N, L, E) of new tokens; return those of all P + L tokens."""
        if layer == len(self.keys):
            batch, heads, _, channels = key.shape
            self.keys.append(key.new_empty(batch, heads, self.size, channels))
            self.values.append(value.new_empty(batch, heads, self.size, channels))
        return self._store(self.keys[layer], key), self._store(self.values[layer], value)

    def _store(self, memory: Tensor, new: Tensor) -> Tensor:
        """Put (B, N, L, E) after the P cached tokens of memory; return (B, N, P + L, E)."""
        if new.shape[0] < memory.shape[0]:  # after `keep`, dropped sequences stay behind the others
            memory = memory[: new.shape[0]]
        memory.narrow(2, self.length, new.shape[2]).copy_(new)
        return memory.narrow(2, 0, self.length + new.shape[2])

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences except ``rows``, (R,) int64, which move to the front."""
        for part in (*self.keys, *self.values):
            part[: len(rows), :, : self.length] = part[rows, :, : self.length]
        if self.first is not None:
            self.first = self.first[rows]

    def clear(self) -> None:
        """Drop all tokens; the memory is reused by as many sequences, or fewer."""
        self.length, self.first = 0, None


class BlockInputs(NamedTuple):
    """What a block is given beside the tokens; each may be absent."""

    cache: KVCache | None = None  # of the tokens before; extended by these
    rotation: Tensor | None = None  # (2, B, 1, L, E), from `RotaryEmbedding`
    modulation: Tensor | None = None  # (B, 6, C), from which adaptive norms take scale, shift, gate
    last: bool = False  # transform the last token only; with a cache, keep all keys and values


NO_INPUTS = BlockInputs()


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.q_norm = nn.RMSNorm(config.head_channels) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_channels) if config.qk_norm else None
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.n_unmasked = config.n_unmasked
        self.layer = layer

    def forward(self, x: Tensor, inputs: BlockInputs = NO_INPUTS) -> Tensor:
        """Attend among tokens (B, L, C) and the P cached ones before them: (B, L, C)."""
        q, k, v = self._heads(x, inputs.cache)  # (B, N, L, E) each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = normalize(q, self.q_norm), normalize(k, self.k_norm)
        if inputs.rotation is not None:
            q, k = rotate(q, inputs.rotation), rotate(k, inputs.rotation)
        q, k, past = q.to(v.dtype), k.to(v.dtype), 0
        if inputs.cache is not None:
            past = inputs.cache.length
            k, v = inputs.cache.extend(self.layer, k, v)
            q = q[:, :, -1:] if inputs.last else q
        mask = self._mask(q.shape[2], past, x.device)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and q.shape[2] > 1,
            dropout_p=self.attn_pdrop if self.training else 0.0,
        )
        return self.resid_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor, cache: KVCache | None) -> tuple[Tensor, ...]:
        """Project tokens (B, L, C) to queries, keys and values (B, N, L, E)."""
        batch, length, _ = x.shape
        if cache is None or not cache.fused:
            parts = self.query(x), self.key(x), self.value(x)
            return tuple(p.view(batch, length, self.n_head, -1).transpose(1, 2) for p in parts)
        together = F.linear(x, *cache.fused[self.layer]).view(batch, length, 3, self.n_head, -1)
        return together.permute(2, 0, 3, 1, 4).unbind(0)

    def fused(self) -> tuple[Tensor, Tensor]:
        """Return weight (3 C, C) and bias (3 C,) of query, key and value together."""
        parts = self.query, self.key, self.value
        return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])

    def _mask(self, length: int, past: int, device: torch.device) -> Tensor | None:
        """Return the mask (L, P + L) bool; None for plain causal order or a single new token."""
        if length == 1 or (past == 0 and self.n_unmasked == 0):
            return None
        row = torch.arange(past, past + length, device=device)[:, None]
        column = torch.arange(past + length, device=device)
        both_first = (row < self.n_unmasked) & (column < self.n_unmasked)
        return (column <= row) | both_first

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The original stored its causal mask; here it follows from the positions.
        state_dict.pop(prefix + "mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SwiGLU(nn.Module):
    """Gated hidden layer (Shazeer 2020, arXiv:2002.05202), about as large as one of 4 C units."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        hidden = -(-8 * n_embd // 3 // 8) * 8  # two thirds of 4 C, a multiple of 8
        self.gate = nn.Linear(n_embd, hidden)
        self.value = nn.Linear(n_embd, hidden)
        self.proj = nn.Linear(hidden, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, C) to the same shape."""
        return self.proj(F.silu(self.gate(x)) * self.value(x))


class AdaptiveBranches(nn.Module):
    """Scale, shift and gate of the two branches of a block."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(6, n_embd))

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Add the block's own part to (B, 6, C): scale, shift, gate of each branch, (B, 1, C)."""
        return (self.own + modulation)[:, :, None].unbind(1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        norm = nn.RMSNorm if config.rms_norm else nn.LayerNorm
        self.ln1 = norm(config.n_embd)
        self.ln2 = norm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        hidden: list[nn.Module] = (
            [SwiGLU(config.n_embd)]
            if config.swiglu
            else [
                nn.Linear(config.n_embd, 4 * config.n_embd),
                nn.GELU(),
                nn.Linear(4 * config.n_embd, config.n_embd),
            ]
        )
        self.mlp = nn.Sequential(*hidden, nn.Dropout(config.resid_pdrop))
        self.adapt = AdaptiveBranches(config.n_embd) if config.adaptive_norm else None

    def forward(self, x: Tensor, inputs: BlockInputs = NO_INPUTS) -> Tensor:
        """Transform tokens (B, L, C) to the same shape, or (B, 1, C) with ``inputs.last``."""
        out = x[:, -1:] if inputs.last else x
        if self.adapt is None:
            x = out + self.attn(self.ln1(x), inputs)
            return x + self.mlp(self.ln2(x))
        scale1, shift1, gate1, scale2, shift2, gate2 = self.adapt(inputs.modulation)
        x = out + gate1 * self.attn(self.ln1(x) * (1 + scale1) + shift1, inputs)
        return x + gate2 * self.mlp(self.ln2(x) * (1 + scale2) + shift2)
