"""Notations: the ways to encode an image's codes as one sequence of tokens.

Axis letters: B images, h w grid, S = h w sites, T turns, L tokens, K codes, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.sequence.grammar import PAD, GrammarState, TokenSequence, by_site


def _count_before(flags: Tensor) -> Tensor:
    """Count the flags (B, L) before each position: (B, L) int64."""
    flags = flags.long()
    return flags.cumsum(dim=1) - flags


def _last_before(flags: Tensor) -> Tensor:
    """Position (B, L) of the last of the flags (B, L) before each position; -1 without one."""
    position = torch.arange(flags.shape[1], device=flags.device)
    last = torch.where(flags, position, -1)  # (B, L)
    last = last.cummax(dim=1).values if flags.numel() else last  # up to and with each position
    return F.pad(last, (1, 0), value=-1)[:, :-1]  # shifted by one: before it


class UnarySequence(TokenSequence):
    """Unary notation: the length of a site is marked token by token, with the dummy D = K.

    With dummies, a site is its codes: ``D,D,A'``, ended by the only one that is not D. Without, D
    ends a site that is shorter than T: ``A1,A2,D``. Where T is 1, there is no D.

    Args:
        n_e: K, number of codes.
        max_loops: T, most codes per site.
        dummies: True for codes of the form ``D,D,A'``, False for ``A1,A2,A3``.

    Example:
        >>> codes = torch.tensor([[[[5, 7, -1], [2, -1, -1], [1, 1, 1]]]])  # 1 x 3 sites
        >>> UnarySequence(n_e=9, max_loops=3, dummies=False).encode(codes)[0]
        tensor([[5, 7, 9, 2, 9, 1, 1, 1]])
        >>> codes = torch.tensor([[[[9, 7, -1], [2, -1, -1], [9, 9, 1]]]])
        >>> UnarySequence(n_e=9, max_loops=3, dummies=True).encode(codes)[0]
        tensor([[9, 7, 2, 9, 9, 1]])
    """

    def __init__(self, n_e: int, max_loops: int, dummies: bool) -> None:
        super().__init__(n_e, max_loops, dummies)
        self.vocab_size = n_e + (max_loops > 1)
        self.site_tokens = max_loops

    def _ends(self, tokens: Tensor, depth: Tensor) -> Tensor:
        """Mark tokens that are the last of their site, given their depth; all of one shape."""
        is_code = (tokens >= 0) & (tokens < self.n_e)
        if self.dummies:
            return is_code
        return (tokens == self.n_e) | (is_code & (depth == self.max_loops - 1))

    def states(self, tokens: Tensor) -> GrammarState:
        """Compute states from the distance to the last token that certainly ended a site."""
        position = torch.arange(tokens.shape[1], device=tokens.device)  # (L,)
        # With dummies that token is a code. Without, it is a D: since then there were only codes,
        # T for each full site, so the distance modulo T is the place within the present one.
        sure = self._ends(tokens, tokens) if self.dummies else tokens == self.n_e  # (B, L)
        depth = position - _last_before(sure) - 1  # (B, L)
        if not self.dummies:
            depth = depth % self.max_loops
        site = _count_before(self._ends(tokens, depth))  # (B, L)
        return GrammarState(site, depth, torch.zeros_like(site))

    def advance(self, state: GrammarState, tokens: Tensor) -> GrammarState:
        """Go on within the site, or to the next one after its last token."""
        ends = self._ends(tokens, state.depth)
        depth = torch.where(ends, 0, state.depth + 1)
        return GrammarState(state.site + ends, depth, state.left)

    def allowed(self, state: GrammarState) -> Tensor:
        """Allow every code; D before the last turn (dummies), or after a first code."""
        mask = self.everything(state)
        may_be_d = state.depth < self.max_loops - 1 if self.dummies else state.depth > 0
        mask[..., self.n_e :] = may_be_d[..., None]
        return mask

    def _encode_sites(self, codes: Tensor) -> Tensor:
        if self.dummies or self.max_loops == 1:
            return codes
        length = (codes >= 0).sum(dim=-1, keepdim=True)  # (B, S, 1)
        turn = torch.arange(self.max_loops, device=codes.device)  # (T,)
        return torch.where(turn == length, self.n_e, codes)  # (B, S, T): D after the last code

    def _decode_sites(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        is_code = (tokens >= 0) & (self.dummies | (tokens < self.n_e))  # (B, L)
        return by_site(tokens, states.site, states.depth, is_code, (sites, self.max_loops))


class RasterSequence(UnarySequence):
    """The same number of codes for every site, in raster order, every token allowed anywhere.

    With one code per site it is the original's sequence. With several, as residual quantizers
    write them, a site ends after its T codes, so no token marks the end.

    Args:
        n_e: K, number of codes.
        max_loops: T, codes of every site.

    Example:
        >>> RasterSequence(n_e=9).encode(torch.tensor([[[3, 1], [4, 1]]]))
        (tensor([[3, 1, 4, 1]]), tensor([4]))
        >>> RasterSequence(n_e=9, max_loops=2).encode(torch.tensor([[[[3, 1], [4, 1]]]]))
        (tensor([[3, 1, 4, 1]]), tensor([4]))
    """

    restricted = False
    fixed_length = True

    def __init__(self, n_e: int, max_loops: int = 1) -> None:
        super().__init__(n_e, max_loops, dummies=False)
        self.vocab_size = n_e

    def _refuse_codes(self, codes: Tensor) -> None:
        super()._refuse_codes(codes)
        if (short := (codes < 0).any(dim=-1)).any():  # (B, S)
            row, site = short.nonzero()[0].tolist()
            count = int((codes[row, site] >= 0).sum())
            raise ValueError(
                f"image {row}: site {site} of {codes.shape[1]} has {count} codes, expected "
                f"{self.max_loops}"
            )


class RunLengthSequence(TokenSequence):
    """Run-length notation: ``x2,A'`` for ``D,D,A'``, ``x2,A1,A2,A3`` for three codes.

    Token K + n - 1 is the count xn, n = 1..T-1; a site of one turn is its code alone.

    Args:
        n_e: K, number of codes.
        max_loops: T, most codes per site.
        dummies: True for codes of the form ``D,D,A'``, False for ``A1,A2,A3``.

    Example:
        >>> codes = torch.tensor([[[[5, 7, -1], [2, -1, -1], [1, 1, 1]]]])  # 1 x 3 sites
        >>> RunLengthSequence(n_e=9, max_loops=3, dummies=False).encode(codes)[0]
        tensor([[ 9,  5,  7,  2, 10,  1,  1,  1]])
    """

    def __init__(self, n_e: int, max_loops: int, dummies: bool) -> None:
        super().__init__(n_e, max_loops, dummies)
        self.vocab_size = n_e + max_loops - 1
        self.site_tokens = min(2, max_loops) if dummies else max_loops + (max_loops > 1)

    def _announced(self, tokens: Tensor) -> Tensor:
        """Number of codes that follow a count token."""
        return torch.ones_like(tokens) if self.dummies else tokens - self.n_e + 2

    def states(self, tokens: Tensor) -> GrammarState:
        """Compute states from the distance to the last count token and what it announced."""
        count = _last_before(tokens >= self.n_e)  # (B, L), position
        since = torch.arange(tokens.shape[1], device=tokens.device) - count - 1  # codes after it
        announced = self._announced(tokens.gather(1, count.clamp(min=0)))
        left = torch.where(count >= 0, (announced - since).clamp(min=0), 0)
        depth = torch.where(left > 0, since + 1, 0)
        ends = (tokens >= 0) & (tokens < self.n_e) & (left <= 1)
        return GrammarState(_count_before(ends), depth, left)

    def advance(self, state: GrammarState, tokens: Tensor) -> GrammarState:
        """Take in a count, or a code of those announced, the last of which ends the site."""
        is_count = tokens >= self.n_e
        left = torch.where(is_count, self._announced(tokens), (state.left - 1).clamp(min=0))
        depth = torch.where(left > 0, state.depth + 1, 0)
        return GrammarState(state.site + (left == 0), depth, left)

    def allowed(self, state: GrammarState) -> Tensor:
        """Allow every code; counts at the beginning of a site."""
        mask = self.everything(state)
        mask[..., self.n_e :] = (state.left == 0)[..., None]
        return mask

    def _encode_sites(self, codes: Tensor) -> Tensor:
        length = (codes >= 0).sum(dim=-1, keepdim=True)  # (B, S, 1)
        count = torch.where(length > 1, self.n_e + length - 2, PAD)
        body = codes.gather(-1, (length - 1).clamp(min=0)) if self.dummies else codes
        return torch.cat([count, body], dim=-1)  # (B, S, 2) or (B, S, 1 + T)

    def _decode_sites(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        is_code, shape = (tokens >= 0) & (tokens < self.n_e), (sites, self.max_loops)
        if not self.dummies:
            turn = (states.depth - 1).clamp(min=0)  # (B, L), without the count token
            return by_site(tokens, states.site, turn, is_code, shape)
        # The code belongs to the turn that its count names; dummies fill the turns before it.
        count = tokens.roll(1, dims=1) - self.n_e + 1  # (B, L), from the token before
        turn = torch.where(states.left > 0, count, 0)
        codes = by_site(tokens, states.site, turn, is_code, shape)  # (B, S, T)
        later = codes.flip(-1).cummax(dim=-1).values.flip(-1)  # >= 0 where a code is still to come
        return torch.where((codes < 0) & (later >= 0), self.n_e, codes)
