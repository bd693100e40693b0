"""Codes <-> token sequences: the ways to write an image's codes as one sequence.

Axis letters: B images, h w grid, S = h w sites, T turns, L tokens, K codes, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.sequence.grammar import PAD, GrammarState, TokenSequence, by_site, place

__all__ = [
    "PAD",
    "GrammarState",
    "RasterSequence",
    "RunLengthSequence",
    "TokenSequence",
    "UnarySequence",
    "place",
]


def _finished(ends: Tensor) -> Tensor:
    """Number of sites (B, L) that ended before each position, from flags (B, L)."""
    ends = ends.long()
    return ends.cumsum(dim=1) - ends


def _last(flags: Tensor) -> Tensor:
    """Position (B, L) of the last flag before each position; -1 if there is none."""
    position = torch.arange(flags.shape[1], device=flags.device)
    seen = torch.where(flags, position, -1)
    seen = seen.cummax(dim=1).values if flags.numel() else seen
    return F.pad(seen, (1, 0), value=-1)[:, :-1]


class RasterSequence(TokenSequence):
    """One code per site in raster order: the original's sequence, every token allowed anywhere."""

    restricted = False

    def __init__(self, n_e: int) -> None:
        super().__init__(n_e, max_loops=1)
        self.vocab_size = n_e
        self.site_tokens = 1

    def states(self, tokens: Tensor) -> GrammarState:
        """See `TokenSequence.states`."""
        site = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return GrammarState(site, torch.zeros_like(site), torch.zeros_like(site))

    def advance(self, state: GrammarState, tokens: Tensor) -> GrammarState:
        """See `TokenSequence.advance`."""
        return state._replace(site=state.site + 1)

    def allowed(self, state: GrammarState) -> Tensor:
        """See `TokenSequence.allowed`."""
        return torch.ones(
            *state.site.shape, self.vocab_size, dtype=torch.bool, device=state.site.device
        )

    def _write(self, codes: Tensor) -> Tensor:
        return codes

    def _read(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        return by_site(tokens, states.site, states.depth, tokens >= 0, (sites, 1))


class UnarySequence(TokenSequence):
    """Counts turns one token at a time with the dummy D = K.

    With dummies, a site is its slots: ``D,D,A'``, ended by its code. Without, it is its codes, and
    D ends a site that is shorter than T: ``A1,A2,D``. Where T is 1, there is no D.

    Args:
        n_e: K, number of codes.
        max_loops: T, slots per site.
        dummies: True for codes of the form ``D,D,A'``, False for ``A1,A2,A3``.
    """

    def __init__(self, n_e: int, max_loops: int, dummies: bool) -> None:
        super().__init__(n_e, max_loops)
        self.dummies = dummies
        self.vocab_size = n_e + (max_loops > 1)
        self.site_tokens = max_loops

    def _ends(self, tokens: Tensor, depth: Tensor) -> Tensor:
        """Whether each token, written at a depth, is the last of its site."""
        is_code = (tokens >= 0) & (tokens < self.n_e)
        if self.dummies:
            return is_code
        return (tokens == self.n_e) | (is_code & (depth == self.max_loops - 1))

    def states(self, tokens: Tensor) -> GrammarState:
        """See `TokenSequence.states`."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        if self.dummies:
            depth = position - _last(self._ends(tokens, tokens)) - 1
        else:
            # Between two D's stand full sites of T codes each, then one shorter site.
            depth = (position - _last(tokens == self.n_e) - 1) % self.max_loops
        site = _finished(self._ends(tokens, depth))
        return GrammarState(site, depth, torch.zeros_like(site))

    def advance(self, state: GrammarState, tokens: Tensor) -> GrammarState:
        """See `TokenSequence.advance`."""
        ends = self._ends(tokens, state.depth)
        depth = torch.where(ends, 0, state.depth + 1)
        return GrammarState(state.site + ends, depth, state.left)

    def allowed(self, state: GrammarState) -> Tensor:
        """See `TokenSequence.allowed`."""
        mask = torch.ones(
            *state.site.shape, self.vocab_size, dtype=torch.bool, device=state.site.device
        )
        may_count = state.depth < self.max_loops - 1 if self.dummies else state.depth > 0
        mask[..., self.n_e :] = may_count[..., None]
        return mask

    def _write(self, codes: Tensor) -> Tensor:
        if self.dummies:
            return codes
        length = (codes >= 0).sum(dim=-1, keepdim=True)
        slot = torch.arange(self.max_loops, device=codes.device)
        return torch.where(slot == length, self.n_e, codes)

    def _read(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        taken = (tokens >= 0) & (self.dummies | (tokens < self.n_e))
        return by_site(tokens, states.site, states.depth, taken, (sites, self.max_loops))


class RunLengthSequence(TokenSequence):
    """Counts turns with one token: ``x2,A'`` for ``D,D,A'``, ``x2,A1,A2,A3`` for three codes.

    Token K + n - 1 is the count xn, n = 1..T-1; a site of one turn writes its code alone.

    Args:
        n_e: K, number of codes.
        max_loops: T, slots per site.
        dummies: True for codes of the form ``D,D,A'``, False for ``A1,A2,A3``.
    """

    def __init__(self, n_e: int, max_loops: int, dummies: bool) -> None:
        super().__init__(n_e, max_loops)
        self.dummies = dummies
        self.vocab_size = n_e + max_loops - 1
        self.site_tokens = min(2, max_loops) if dummies else max_loops + (max_loops > 1)

    def _announced(self, tokens: Tensor) -> Tensor:
        """Codes that follow a count token."""
        return torch.ones_like(tokens) if self.dummies else tokens - self.n_e + 2

    def states(self, tokens: Tensor) -> GrammarState:
        """See `TokenSequence.states`."""
        count = _last(tokens >= self.n_e)
        written = torch.arange(tokens.shape[1], device=tokens.device) - count - 1
        announced = self._announced(tokens.gather(1, count.clamp(min=0)))
        left = torch.where(count >= 0, (announced - written).clamp(min=0), 0)
        depth = torch.where(left > 0, written + 1, 0)
        ends = (tokens >= 0) & (tokens < self.n_e) & (left <= 1)
        return GrammarState(_finished(ends), depth, left)

    def advance(self, state: GrammarState, tokens: Tensor) -> GrammarState:
        """See `TokenSequence.advance`."""
        is_count = tokens >= self.n_e
        left = torch.where(is_count, self._announced(tokens), (state.left - 1).clamp(min=0))
        depth = torch.where(left > 0, state.depth + 1, 0)
        return GrammarState(state.site + (left == 0), depth, left)

    def allowed(self, state: GrammarState) -> Tensor:
        """See `TokenSequence.allowed`."""
        mask = torch.ones(
            *state.site.shape, self.vocab_size, dtype=torch.bool, device=state.site.device
        )
        mask[..., self.n_e :] = (state.left == 0)[..., None]
        return mask

    def _write(self, codes: Tensor) -> Tensor:
        length = (codes >= 0).sum(dim=-1, keepdim=True)
        count = torch.where(length > 1, self.n_e + length - 2, PAD)
        body = codes.gather(-1, (length - 1).clamp(min=0)) if self.dummies else codes
        return torch.cat([count, body], dim=-1)

    def _read(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        is_code, shape = (tokens >= 0) & (tokens < self.n_e), (sites, self.max_loops)
        if not self.dummies:
            slot = (states.depth - 1).clamp(min=0)
            return by_site(tokens, states.site, slot, is_code, shape)
        # A code stands in the slot that its count names; dummies fill the slots before it.
        count = tokens.roll(1, dims=1) - self.n_e + 1
        slot = torch.where(states.left > 0, count, 0)
        codes = by_site(tokens, states.site, slot, is_code, shape)
        later = codes.flip(-1).cummax(dim=-1).values.flip(-1)
        return torch.where((codes < 0) & (later >= 0), self.n_e, codes)
