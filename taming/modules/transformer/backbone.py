"""The decoder-only transformer without its head, which the priors' networks share.

Axis letters: B sequences, S sites, L tokens, C channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.sequence.grammar import GrammarState, place
from taming.modules.transformer.blocks import (
    Block,
    BlockInputs,
    GPTConfig,
    KVCache,
    RotaryEmbedding,
    SiteEmbedding,
)
from taming.modules.transformer.network import PriorNetwork


def init_weights(module: nn.Module) -> None:
    """Draw matrices from a normal of deviation 0.02 (GPT-2's choice); set biases to zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Backbone(PriorNetwork):
    """Embeddings and blocks of a decoder-only transformer, up to the last normalization.

    The arguments are the fields of `GPTConfig`.
    """

    block_size: int

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
        sizes = vocab_size, block_size, n_layer, n_head, n_embd
        dropout = embd_pdrop, resid_pdrop, attn_pdrop
        parts = rms_norm, rotary, qk_norm, swiglu, adaptive_norm
        self.config = config = GPTConfig(*sizes, *dropout, n_unmasked, site_shape, *parts)
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.n_unmasked = n_unmasked
        if site_shape is not None:
            rows, columns, depths = site_shape
            self.site_shape = rows, columns, depths
        self.uses_sites = site_shape is not None or rotary
        self.is_compiled = False
        self.tok_emb: nn.Module = nn.Embedding(vocab_size, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, n_embd))
        self.site_emb = None if site_shape is None else SiteEmbedding(site_shape, n_embd)
        self.rotary = RotaryEmbedding(config.head_channels) if rotary else None
        self.modulate = nn.Linear(n_embd, 6 * n_embd) if adaptive_norm else None
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks: list[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config, layer) for layer in range(n_layer)
        )
        self.ln_f = (nn.RMSNorm if rms_norm else nn.LayerNorm)(n_embd)
        self.apply(init_weights)
        if self.modulate is not None:  # every block starts as the identity (arXiv:2212.09748)
            nn.init.zeros_(self.modulate.weight)

    def places(self, states: GrammarState, grid: tuple[int, int]) -> Tensor:
        """Return row, column and depth (..., 3) of the next token in states of shape (...)."""
        if self.site_order is None:
            return place(states, grid)
        site = self.site_order[states.site.clamp(max=len(self.site_order) - 1)]
        return place(states._replace(site=site), grid)

    def get_block_size(self) -> int:
        """Return ``block_size``; the original's method."""
        return self.block_size

    def new_cache(self) -> KVCache:
        """Return an empty cache for up to ``block_size`` inputs."""
        return KVCache(self.block_size)

    def decoding_cache(self) -> KVCache:
        """Return an empty cache for decoding token by token with weights that stay as they are."""
        return replace(self.new_cache(), fused=[block.attn.fused() for block in self.blocks])

    def compile_blocks(self) -> None:
        """Compile the blocks, for passes over whole sequences, by ``torch.compile``."""
        self.is_compiled = True
        for block in self.blocks:
            block.compile()

    def features(
        self,
        x: Tensor,
        sites: Tensor | None = None,
        cache: KVCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Transform embedded inputs.

        Args:
            x: (B, L, C), which follow the cached ones.
            sites: (B, S, 3) int64, place of the token that follows each of the last S inputs; or
                (1, S, 3), the same for all sequences; may be None if not ``uses_sites``.
            cache: Keys and values of the inputs before; extended by these.
            last: Only return the last; takes a cache.

        Returns:
            (B, L, C); (B, 1, C) with ``last``.

        Raises:
            ValueError: The sequence is longer than ``block_size``, or places are needed.
        """
        if self.uses_sites and sites is None:
            raise ValueError("a transformer with site_shape or rotary needs sites, tokens' places")
        past = 0 if cache is None else cache.length
        end = past + x.shape[1]
        if end > self.block_size:
            raise ValueError(
                f"{end} tokens do not fit the transformer's block_size {self.block_size}"
            )
        rotation = None if self.rotary is None else self.rotary(sites, x.shape[1])
        inputs = BlockInputs(cache, rotation, self._modulation(x, cache))
        x = x + self.pos_emb[:, past:end]
        if self.site_emb is not None and sites is not None:
            x = x + F.pad(self.site_emb(sites), (0, 0, x.shape[1] - sites.shape[1], 0))  # (B, L, C)
        x = self.drop(x)
        for layer, block in enumerate(self.blocks, start=1):
            # A cache grows with each token: compiled blocks would be compiled anew for each.
            run = block.forward if self.is_compiled and cache is not None else block
            x = run(x, inputs._replace(last=last) if layer == len(self.blocks) else inputs)
        if cache is not None:
            cache.length = end
        return self.ln_f(x)

    def _modulation(self, x: Tensor, cache: KVCache | None) -> Tensor | None:
        """Map the first input to the modulation of adaptive norms, (B, 6, C)."""
        if self.modulate is None:
            return None
        first = x[:, 0] if cache is None or cache.first is None else cache.first
        if cache is not None:
            cache.first = first
        return self.modulate(F.silu(first)).unflatten(-1, (6, -1))  # (B, 6, C)
