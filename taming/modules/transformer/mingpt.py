"""The decoder-only transformer of the priors, with the original's parameters and logits.

Axis letters: B sequences, L tokens, P cached tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Attributes:
        vocab_size: V, number of different tokens.
        block_size: Longest sequence, conditions included.
        n_layer: Blocks.
        n_head: Attention heads.
        n_embd: C, channels of a token.
        embd_pdrop: Dropout of embeddings, in [0, 1).
        resid_pdrop: Dropout of each residual branch.
        attn_pdrop: Dropout of attention weights.
        n_unmasked: First tokens that all see each other, such as a condition.
        site_shape: (rows, columns, depths) of the tables that embed each token's place; None for
            none, as in the original.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 12
    n_head: int = 8
    n_embd: int = 256
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    n_unmasked: int = 0
    site_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in memory taken once.

    Attributes:
        keys: One (B, heads, block, C / heads) tensor per layer.
        values: Likewise.
        length: P, tokens that are in.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, heads, L, C / heads) of new tokens of one layer.

        Returns:
            Those of all P + L tokens.
        """
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.n_unmasked = config.n_unmasked
        self.layer = layer

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Mix tokens (B, L, C), which follow the P cached ones."""
        q, k, v = (
            rearrange(project(x), "b l (n c) -> b n l c", n=self.n_head)
            for project in (self.query, self.key, self.value)
        )
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
        mask = self._mask(q.shape[2], past, x.device)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and q.shape[2] > 1,
            dropout_p=self.attn_pdrop if self.training else 0.0,
        )
        return self.resid_drop(self.proj(rearrange(mixed, "b n l c -> b l (n c)")))

    def _mask(self, length: int, past: int, device: torch.device) -> Tensor | None:
        """Who sees whom, (L, P + L) bool; None for plain causal order or a single new token."""
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


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Transform tokens (B, L, C)."""
        x = x + self.attn(self.ln1(x), cache)
        return x + self.mlp(self.ln2(x))


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


class GPT(nn.Module):
    """Decoder-only transformer (Radford et al. 2019) over tokens.

    Args:
        vocab_size: V.
        block_size: Longest sequence, conditions included.
        **sizes: Further fields of `GPTConfig`.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 12,
        n_head: int = 8,
        n_embd: int = 256,
        embd_pdrop: float = 0.0,
        resid_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        n_unmasked: int = 0,
        site_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        config = GPTConfig(
            vocab_size=vocab_size,
            block_size=block_size,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            embd_pdrop=embd_pdrop,
            resid_pdrop=resid_pdrop,
            attn_pdrop=attn_pdrop,
            n_unmasked=n_unmasked,
            site_shape=site_shape,
        )
        self.config = config
        self.block_size = block_size
        self.tok_emb = nn.Embedding(vocab_size, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
        self.site_emb = None if site_shape is None else SiteEmbedding(site_shape, n_embd)
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Normal of deviation 0.02 for matrices (GPT-2's choice), zero for biases."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_block_size(self) -> int:
        """Return the longest sequence that fits, conditions included."""
        return self.block_size

    def new_cache(self, batch: int) -> KVCache:
        """Take memory for the keys and values of ``batch`` sequences of the longest length."""
        size = (
            batch,
            self.config.n_head,
            self.block_size,
            self.config.n_embd // self.config.n_head,
        )
        like = self.pos_emb
        return KVCache(
            [torch.empty(size, device=like.device, dtype=like.dtype) for _ in self.blocks],
            [torch.empty(size, device=like.device, dtype=like.dtype) for _ in self.blocks],
        )

    def forward(
        self,
        idx: Tensor,
        embeddings: Tensor | None = None,
        targets: Tensor | None = None,
        sites: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each token.

        Args:
            idx: (B, L) int64 tokens, which follow the cached ones.
            embeddings: (B, E, C) put before the tokens.
            targets: (B, E + L) int64 for a loss; -1 does not count.
            sites: (B, S, 3) int64, place of the token that comes after each of the last S inputs.
            cache: Keys and values of the tokens before; extended by these.

        Returns:
            logits (B, E + L, V) and the mean cross-entropy in nats, None without targets.

        Raises:
            ValueError: The sequence is longer than ``block_size``.
        """
        x = self.tok_emb(idx)
        if embeddings is not None:
            x = torch.cat([embeddings, x], dim=1)
        past = 0 if cache is None else cache.length
        end = past + x.shape[1]
        if end > self.block_size:
            raise ValueError(
                f"{end} tokens do not fit the transformer's block_size {self.block_size}"
            )
        x = x + self.pos_emb[:, past:end]
        if self.site_emb is not None and sites is not None:
            x = x + F.pad(self.site_emb(sites), (0, 0, x.shape[1] - sites.shape[1], 0))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length = end
        logits = self.head(self.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss
