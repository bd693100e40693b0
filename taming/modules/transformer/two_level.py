"""A transformer over sites, and a small one over the tokens within a site.

Axis letters: B sequences, R rows (sequences that get a token now), S sites, T tokens of a site,
L tokens, C channels, V vocabulary, N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.sequence.grammar import GrammarState, by_site
from taming.modules.transformer.blocks import GPTConfig
from taming.modules.transformer.generate import IncrementalDecoder, Prompt, Turn
from taming.modules.transformer.gpt import GPT, Backbone, init_weights, token_numbers

# Options that the depth transformer has from the main one, or would have no use for.
NOT_WITHIN_SITES = {"vocab_size", "block_size", "n_unmasked", "site_shape", "rotary"}


class TwoLevelGPT(Backbone):
    """RQ-Transformer (Lee et al. 2022, arXiv:2203.01941, section 3.2) for sites of any length.

    The main transformer reads one vector per site, so its sequence is as short as the grid however
    deep the sites are; from what it makes of the sites before, the depth transformer writes the
    tokens of a site one by one until the grammar says that it has ended. A configuration puts it in
    the place of a `GPT`:

    .. code-block:: yaml

        transformer_config:
          target: taming.modules.transformer.two_level.TwoLevelGPT
          params:
            vocab_size: 257
            block_size: 65 # sites and the condition
            site_shape: [8, 8, 6] # rows, columns, tokens per site
            n_layer: 8
            depth: {n_layer: 2, n_head: 4, n_embd: 192}

    Args:
        vocab_size: V.
        block_size: Most sites and tokens of the condition together.
        site_shape: (rows, columns, T).
        depth: Sizes of the depth transformer: fields of `GPTConfig`, but those of conditions and
            places, of which it knows none.
        **sizes: Those of the main transformer.

    Raises:
        ValueError: ``depth`` names something else.
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
        # Each depth has gains of its own: a plain sum would not tell A,B from B,A.
        self.gain = nn.Parameter(1 + 0.5 * torch.randn(site_shape[2], self.config.n_embd))

    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        """Predict each token from the sites before it and the tokens before it in its site.

        Args:
            condition: (B, L) int64, at least one token before each sequence.
            tokens: (B, L) int64, -1 after each sequence's end.
            states: Of shape (B, L), where each token stands.
            grid: (h, w) of the image.

        Returns:
            (N, V) logits of the tokens that there are, one sequence after the other.
        """
        sites = int(states.site[tokens >= 0].max()) + 1
        x = torch.cat(
            [self.tok_emb(condition), self.sum_sites(tokens, states, sites)[:, :-1]], dim=1
        )
        hidden = self.features(x, self.main_places(sites, grid, x))[:, condition.shape[1] - 1 :]
        inside = self.by_site(tokens, states, sites)
        return self._within_sites(self.to_depth(hidden).flatten(0, 1), inside.flatten(0, 1))

    def _within_sites(self, hidden: Tensor, inside: Tensor) -> Tensor:
        """Logits (N, V) of sites' tokens (R, T), -1 after each one's end, given (R, C) of each."""
        lengths, parts, numbers = (inside >= 0).sum(dim=1), [], []
        for length in lengths[lengths > 0].unique().tolist():  # of one length: nothing to pad
            rows = (lengths == length).nonzero()[:, 0]
            before = self.depth.tok_emb(inside[rows, : length - 1])
            x = torch.cat([hidden[rows, None], before], dim=1)
            parts.append(self.depth.features(x).flatten(0, 1))
            numbers.append(token_numbers(lengths, rows, length).flatten())
        return self.depth.head(torch.cat(parts)[torch.cat(numbers).argsort()])

    @property
    def depths(self) -> int:
        """T, most tokens of a site."""
        return self.depth.block_size

    def embed_at(self, tokens: Tensor, depth: Tensor | int) -> Tensor:
        """Embed tokens as what they add to their site: the same shape and C more."""
        return self.tok_emb(tokens) * self.gain[depth]

    def by_site(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        """Lay out sequences (B, L) by the first S sites: (B, S, T), -1 where there is no token."""
        return by_site(tokens, states.site, states.depth, tokens >= 0, (sites, self.depths))

    def sum_sites(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        """Add up the tokens (B, L) of each of the first S sites: (B, S, C)."""
        inside = self.by_site(tokens, states, sites)
        depth = torch.arange(self.depths, device=tokens.device)
        embedded = self.embed_at(inside.clamp(min=0), depth)
        return (embedded * (inside >= 0)[..., None]).sum(dim=2)

    def main_places(self, sites: int, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Places (B, S, 3) of the first S sites, on the device and for the batch of ``like``."""
        site = torch.arange(sites, device=like.device).expand(len(like), -1)
        zero = torch.zeros_like(site)
        return self.places(GrammarState(site, zero, zero), grid)

    def inputs_of(self, sites: int, site_tokens: int) -> int:
        """Return how many inputs an image of so many sites becomes, whatever their tokens."""
        return sites

    def write(self, beginning: Prompt) -> IncrementalDecoder:
        """Start to write sequences."""
        return TwoLevelDecoder(self, beginning)


class TwoLevelDecoder(IncrementalDecoder):
    """Writes sequences that advance together, site by site.

    A sequence whose site has ended waits, at no cost, until those of all others have.

    Args:
        model: The transformer, in eval mode.
        beginning: What is known; complete sites are read at once as far as they go in all
            sequences.
    """

    def __init__(self, model: TwoLevelGPT, beginning: Prompt) -> None:
        self.model = model
        self.grid = beginning.grid
        self.cache, self.inner = model.new_cache(), model.depth.new_cache()
        tokens, states = beginning.tokens, beginning.states
        length = (tokens >= 0).sum(dim=1, keepdim=True)
        self.site = int(states.site.gather(1, length).min())
        before = GrammarState(*(field[:, :-1] for field in states))
        self.taken = ((tokens >= 0) & (before.site < self.site)).sum(dim=1)
        x = [model.tok_emb(beginning.condition), model.sum_sites(tokens, before, self.site)]
        self._begin_site(beginning.rows, torch.cat(x, dim=1))

    def _begin_site(self, rows: Tensor, x: Tensor) -> None:
        """Read what the main transformer has not read of sequences ``rows``: x (R, L, C)."""
        sites = self.model.main_places(self.site + 1, self.grid, x)[:, -x.shape[1] :]
        hidden = self.model.features(x, sites, self.cache)[:, -1]
        self.rows = rows
        self.sums = torch.zeros_like(hidden)
        self.waiting: list[Tensor] = []
        self.inner.clear()
        self._begin_token(rows, self.model.to_depth(hidden))

    def _begin_token(self, rows: Tensor, x: Tensor) -> None:
        """Read the next input (R, C) of the depth transformer."""
        hidden = self.model.depth.features(x[:, None], cache=self.inner)[:, 0]
        self.turn = Turn(rows, self.model.depth.head(hidden))

    def advance(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """See `IncrementalDecoder.advance`."""
        own = torch.searchsorted(self.rows, rows)
        self.sums[own] += self.model.embed_at(tokens, self.inner.length - 1)
        within = states.depth > 0
        self.waiting.append(rows[~within])
        if within.any():
            if int(within.sum()) < len(self.turn.rows):
                self.inner.keep(torch.searchsorted(self.turn.rows, rows[within]))
            self._begin_token(rows[within], self.model.depth.tok_emb(tokens[within]))
            return
        rows, self.site = torch.cat(self.waiting).sort().values, self.site + 1
        own = torch.searchsorted(self.rows, rows)
        if len(rows) < len(self.rows):
            self.cache.keep(own)
        self._begin_site(rows, self.sums[own][:, None])
