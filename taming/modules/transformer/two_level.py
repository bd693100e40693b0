"""A transformer over sites, and a small one over the tokens within a site.

Axis letters: B sequences, R rows (the sequences that get a token now), S sites, T tokens of a site,
L tokens, C channels of the main transformer, V vocabulary, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.sequence.grammar import GrammarState, by_site
from taming.modules.transformer.backbone import Backbone, init_weights
from taming.modules.transformer.blocks import GPTConfig
from taming.modules.transformer.gpt import GPT, in_groups
from taming.modules.transformer.network import IncrementalDecoder, Prompt

# Options that the depth transformer shares with the main one, or that do nothing within a site.
NOT_WITHIN_SITES = {"vocab_size", "block_size", "n_unmasked", "site_shape", "rotary"}


class TwoLevelGPT(Backbone):
    """RQ-Transformer (Lee et al. 2022, arXiv:2203.01941, section 3.2) for sites of any length.

    The main transformer reads one vector per site, so its sequence has the length of the grid
    whatever the length of the sites. From its output for the sites before, the depth transformer
    predicts the tokens of a site one by one until the grammar ends the site. A configuration puts
    it in place of a `GPT`:

    .. code-block:: yaml

        transformer_config:
          target: taming.modules.transformer.two_level.TwoLevelGPT
          params:
            n_layer: 8
            depth: {n_layer: 2, n_head: 4, n_embd: 192}

    Args:
        vocab_size: V.
        block_size: Most sites and tokens of the condition together.
        site_shape: (rows, columns, T).
        depth: Sizes of the depth transformer: fields of `GPTConfig`, except those of conditions and
            places, which do not reach it.
        **sizes: Further fields of `GPTConfig`, for the main transformer.

    Raises:
        ValueError: ``depth`` names an unknown size.

    Example:
        >>> net = TwoLevelGPT(9, 8, site_shape=(2, 3, 4), depth={"n_layer": 1}, n_layer=1)
        >>> net.inputs_of(sites=6, site_tokens=4)
        6
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        site_shape: tuple[int, int, int],
        depth: Mapping[str, Any],
        **sizes: Any,
    ) -> None:
        options = {field.name for field in fields(GPTConfig)} - NOT_WITHIN_SITES
        if unknown := set(depth) - options:
            raise ValueError(f"depth: unknown {', '.join(unknown)}; valid: {sorted(options)}")
        super().__init__(vocab_size, block_size, site_shape=site_shape, **sizes)
        self.depth = GPT(vocab_size, site_shape[2], **depth)
        self.to_depth = nn.Linear(self.config.n_embd, self.depth.config.n_embd)
        init_weights(self.to_depth)
        # Each depth has its own gains: a plain sum would not distinguish A,B from B,A.
        self.gain = nn.Parameter(1 + 0.5 * torch.randn(site_shape[2], self.config.n_embd))

    def compile_blocks(self) -> None:
        """Compile the blocks of both levels, for passes over whole sequences."""
        super().compile_blocks()
        self.depth.compile_blocks()

    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        """Predict each token from the sites before it and the tokens before it in its site."""
        sites = int(states.site[tokens >= 0].max()) + 1
        x = torch.cat(
            [self.tok_emb(condition), self.sum_sites(tokens, states, sites)[:, :-1]], dim=1
        )
        hidden = self.features(x, self.main_places(sites, grid, x))
        hidden = hidden[:, condition.shape[1] - 1 :]  # (B, S, C), of the sites before each site
        inside = self.by_site(tokens, states, sites)  # (B, S, T)
        return self._within_sites(self.to_depth(hidden).flatten(0, 1), inside.flatten(0, 1))

    def _within_sites(self, hidden: Tensor, inside: Tensor) -> Tensor:
        """Predict sites' tokens (B S, T), -1 after each end, given (B S, C): logits (N, V)."""
        lengths = (inside >= 0).sum(dim=1)

        def features(rows: Tensor, length: int) -> Tensor:
            before = self.depth.tok_emb(inside[rows, : length - 1])
            return self.depth.features(torch.cat([hidden[rows, None], before], dim=1))

        found = lengths[lengths > 0].unique().tolist()
        same = [(lengths == length).nonzero()[:, 0] for length in found]  # which need no padding
        return self.depth.head(in_groups(lengths, same, features))

    @property
    def depths(self) -> int:
        """T, most tokens of a site."""
        return self.depth.block_size

    def embed_at(self, tokens: Tensor, depth: Tensor | int) -> Tensor:
        """Embed tokens (...) by their depth in a site, to be summed over the site: (..., C)."""
        return self.tok_emb(tokens) * self.gain[depth]

    def by_site(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        """Lay out sequences (B, L) by their first S sites: (B, S, T), -1 where empty."""
        return by_site(tokens, states.site, states.depth, tokens >= 0, (sites, self.depths))

    def sum_sites(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        """Add up the tokens (B, L) of each of the first S sites: (B, S, C)."""
        inside = self.by_site(tokens, states, sites)
        depth = torch.arange(self.depths, device=tokens.device)
        embedded = self.embed_at(inside.clamp(min=0), depth)
        return (embedded * (inside >= 0)[..., None]).sum(dim=2)  # (B, S, C)

    def main_places(self, sites: int, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Return the places (B, S, 3) of the first S sites, for the batch ``like`` (B, ...)."""
        site = torch.arange(sites, device=like.device).expand(len(like), -1)
        zero = torch.zeros_like(site)
        return self.places(GrammarState(site, zero, zero), grid)

    @staticmethod
    def inputs_of(sites: int, site_tokens: int) -> int:
        """Return the number of sites: each is one input, whatever its tokens."""
        return sites

    def decoder(self, grid: tuple[int, int]) -> IncrementalDecoder:
        """Return a decoder with caches of its own."""
        return TwoLevelDecoder(self, grid)


class TwoLevelDecoder(IncrementalDecoder):
    """Decodes sequences that advance together, site by site.

    A sequence whose site has ended waits, at no cost, until the sites of all others have.

    Args:
        model: The transformer, in eval mode.
        grid: (h, w) of the image.
    """

    def __init__(self, model: TwoLevelGPT, grid: tuple[int, int]) -> None:
        self.model = model
        self.grid = grid
        self.cache, self.inner = model.decoding_cache(), model.depth.decoding_cache()
        self.places = model.main_places(grid[0] * grid[1], grid, model.pos_emb)  # (1, S, 3)

    def prefill(self, prompt: Prompt) -> Tensor:
        """Read the sites that are complete in all sequences."""
        tokens, states = prompt.tokens, prompt.states
        length = (tokens >= 0).sum(dim=1, keepdim=True)
        self.site = int(states.site.gather(1, length).min())
        before = GrammarState(*(field[:, :-1] for field in states))
        x = [self.model.tok_emb(prompt.condition), self.model.sum_sites(tokens, before, self.site)]
        self._begin_site(prompt.rows, torch.cat(x, dim=1))
        return ((tokens >= 0) & (before.site < self.site)).sum(dim=1)

    def _begin_site(self, rows: Tensor, x: Tensor) -> None:
        """Read the new inputs (R, L, C) of the main transformer, of sequences ``rows``."""
        inputs = min(x.shape[1], self.site + 1)  # those that a site follows
        sites = self.places[:, self.site + 1 - inputs : self.site + 1]
        hidden = self.model.features(x, sites, self.cache, last=True)[:, -1]  # (R, C)
        self.site_rows = rows
        self.sums = torch.zeros_like(hidden)
        self.waiting: list[Tensor] = []
        self.inner.clear()
        self._begin_token(rows, self.model.to_depth(hidden))

    def _begin_token(self, rows: Tensor, x: Tensor) -> None:
        """Read the next input (R, C) of the depth transformer."""
        hidden = self.model.depth.features(x[:, None], cache=self.inner)[:, 0]
        self.rows, self.logits = rows, self.model.depth.head(hidden)

    def step(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """Go on within the sites that have not ended; if all have, with the next site."""
        own = torch.searchsorted(self.site_rows, rows)
        self.sums[own] += self.model.embed_at(tokens, self.inner.length - 1)
        within = states.depth > 0
        amount = int(within.sum())
        if amount < len(rows):
            self.waiting.append(rows[~within])
            rows, tokens = rows[within], tokens[within]
        if amount:
            if amount < len(self.rows):
                self.inner.keep(torch.searchsorted(self.rows, rows))
            self._begin_token(rows, self.model.depth.tok_emb(tokens))
            return
        rows, self.site = torch.cat(self.waiting).sort().values, self.site + 1
        own = torch.searchsorted(self.site_rows, rows)
        if len(rows) < len(self.site_rows):
            self.cache.keep(own)
        self._begin_site(rows, self.sums[own][:, None])
