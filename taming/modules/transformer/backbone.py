"""What all transformers here share: embedded tokens go through blocks, with a cache or without.

Axis letters: B sequences, L tokens, P cached tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.transformer.blocks import Block, Context, GPTConfig, SiteEmbedding
from taming.modules.transformer.cache import KVCache
from taming.modules.transformer.rotary import RotaryEmbedding
from taming.modules.vqvae.grammar import GrammarState, place


def init_weights(module: nn.Module) -> None:
    """Normal of deviation 0.02 for matrices (GPT-2's choice), zero for biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """Embeddings and blocks of a decoder-only transformer, up to the last normalization.

    Args:
        vocab_size: See `GPTConfig`, as all others.

    Attributes:
        site_order: (S,) int64, the raster number of the site that is written i-th, as in a
            `Permuter`; None for raster order. Not part of the state.
    """

    site_order: Tensor | None

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
        rms_norm: bool = False,
        rotary: bool = False,
        qk_norm: bool = False,
        swiglu: bool = False,
        adaptive_norm: bool = False,
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
            rms_norm=rms_norm,
            rotary=rotary,
            qk_norm=qk_norm,
            swiglu=swiglu,
            adaptive_norm=adaptive_norm,
        )
        self.config = config
        self.block_size = block_size
        self.register_buffer("site_order", None, persistent=False)
        self.tok_emb: nn.Module = nn.Embedding(vocab_size, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
        self.site_emb = None if site_shape is None else SiteEmbedding(site_shape, n_embd)
        self.rotary = RotaryEmbedding(config.head_channels) if rotary else None
        self.modulate = nn.Linear(n_embd, 6 * n_embd) if adaptive_norm else None
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(n_layer))
        self.ln_f = (nn.RMSNorm if rms_norm else nn.LayerNorm)(n_embd)
        self.apply(init_weights)
        if self.modulate is not None:  # every block starts as the identity (arXiv:2212.09748)
            nn.init.zeros_(self.modulate.weight)

    @property
    def uses_sites(self) -> bool:
        """Whether it looks at the places of tokens."""
        return self.site_emb is not None or self.rotary is not None

    def places(self, states: GrammarState, grid: tuple[int, int]) -> Tensor:
        """Row, column and depth (..., 3) of the tokens that states of shape (...) wait for."""
        if self.site_order is None:
            return place(states, grid)
        site = self.site_order[states.site.clamp(max=len(self.site_order) - 1)]
        return place(states._replace(site=site), grid)

    def get_block_size(self) -> int:
        """Return the longest sequence that fits, conditions included."""
        return self.block_size

    def new_cache(self) -> KVCache:
        """Return an empty cache for sequences of up to the longest length."""
        return KVCache(self.block_size)

    def features(
        self, x: Tensor, sites: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Transform embedded inputs.

        Args:
            x: (B, L, C), which follow the cached ones.
            sites: (B, S, 3) int64, place of the token that comes after each of the last S inputs.
            cache: Keys and values of the inputs before; extended by these.

        Returns:
            (B, L, C).

        Raises:
            ValueError: The sequence is longer than ``block_size``.
        """
        past = 0 if cache is None else cache.length
        end = past + x.shape[1]
        if end > self.block_size:
            raise ValueError(
                f"{end} tokens do not fit the transformer's block_size {self.block_size}"
            )
        rotation = None if self.rotary is None else self.rotary(sites, x.shape[1])
        context = Context(cache, rotation, self._modulation(x, cache))
        x = x + self.pos_emb[:, past:end]
        if self.site_emb is not None and sites is not None:
            x = x + F.pad(self.site_emb(sites), (0, 0, x.shape[1] - sites.shape[1], 0))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, context)
        if cache is not None:
            cache.length = end
        return self.ln_f(x)

    def _modulation(self, x: Tensor, cache: KVCache | None) -> Tensor | None:
        """What adaptive norms make of the first input, (B, 6, C)."""
        if self.modulate is None:
            return None
        first = x[:, 0] if cache is None or cache.first is None else cache.first
        if cache is not None:
            cache.first = first
        return self.modulate(F.silu(first)).unflatten(-1, (6, -1))
