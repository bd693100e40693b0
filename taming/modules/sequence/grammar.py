"""The grammar of token sequences: one sequence per image, site by site.

A grammar gives the place of each token before the token itself, and the tokens that may come next,
so that a model can embed the place of the token it predicts and every sample decodes.

Axis letters: B images, h w grid, S = h w sites, T turns, L tokens, K codes, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.util import INTEGERS

PAD = -1
_MOST_SITES = 1 << 31


class GrammarState(NamedTuple):
    """State of sequences before a token; all fields int64 of one shape, (B,) or (B, L).

    Attributes:
        site: Number of finished sites, which is the number of the token's site in the sequence.
        depth: Place of the token within its site.
        left: Codes still to come in this site after its count token; 0 if none is announced.
    """

    site: Tensor
    depth: Tensor
    left: Tensor


class TokenSequence(ABC):
    """A notation for the codes of an image as one sequence of tokens.

    Args:
        n_e: K, number of codes.
        max_loops: T, most codes per site.
        dummies: True for codes of the form ``D,D,A'``, False for ``A1,A2,A3``.

    Attributes:
        vocab_size: V, number of different tokens.
        site_tokens: Most tokens that one site can take.
        restricted: False if every token may come next everywhere.
        fixed_length: True if every site has T codes.
    """

    vocab_size: int
    site_tokens: int
    restricted: bool = True
    fixed_length: bool = False

    def __init__(self, n_e: int, max_loops: int, dummies: bool) -> None:
        if n_e < 1 or max_loops < 1:
            raise ValueError(f"n_e and max_loops must be at least 1, got {n_e} and {max_loops}")
        self.n_e, self.max_loops, self.dummies = n_e, max_loops, dummies

    def encode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Encode codes as tokens.

        Args:
            codes: (B, h, w, T), or (B, h, w) where T is 1; integers, -1 after a site's end.

        Returns:
            tokens: (B, L) int64, -1 after each sequence's end; L is the longest length.
            lengths: (B,) int64.

        Raises:
            ValueError: The codes have another dtype or shape, or `decode` cannot give them.
        """
        codes = _integers(codes, "codes")
        turns = (self.max_loops,)
        if codes.ndim < 3 or codes.shape[3:] != turns and (codes.ndim, turns) != (3, (1,)):
            raise ValueError(f"expected codes (B, h, w, {turns[0]}), got {tuple(codes.shape)}")
        codes = codes.reshape(len(codes), _count_sites(codes.shape[1:3]), *turns)  # (B, S, T)
        self._refuse_codes(codes)
        return self._pack(codes)

    def _refuse_codes(self, codes: Tensor) -> None:
        """Raise a ValueError that names the first of the codes (B, S, T) out of place, if any."""
        present = codes >= 0
        after = F.pad(present[..., 1:], (0, 1))  # (B, S, T): another code follows
        wrong = after & ~present
        wrong[..., 0] |= ~present[..., 0]
        if not _all_within(codes, self.n_e + self.dummies):
            wrong |= (codes < PAD) | (codes >= self.n_e + self.dummies)
        if self.dummies:  # all but the last code of a site are D
            wrong |= present & ((codes == self.n_e) != after)
        if wrong.any():
            row, site, turn = wrong.nonzero()[0].tolist()
            code = int(codes[row, site, turn])
            where = f"image {row}: site {site} of {codes.shape[1]}"
            if code == PAD and turn == 0:
                raise ValueError(f"{where} has no code")
            form = "D,..,D,A" if self.dummies else "A1,..,An"
            raise ValueError(
                f"{where}: code {code} at turn {turn} breaks the form {form} with A in "
                f"0..{self.n_e - 1}, D = {self.n_e}, and -1 after it"
            )

    def _pack(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Encode codes (B, S, T), valid or not: tokens (B, L) and lengths (B,)."""
        table = self._encode_sites(codes).flatten(1)
        present = table >= 0  # (B, S P), P places per site of which some hold no token
        lengths = present.sum(dim=1)
        longest = int(lengths.max()) if len(lengths) else 0
        # A token moves to the left past the empty places; those all go to one column past the end,
        # which is then cut off.
        column = torch.where(present, present.cumsum(dim=1) - 1, longest)  # (B, S P)
        tokens = table.new_full((len(codes), longest + 1), PAD)
        return tokens.scatter_(1, column, table)[:, :-1], lengths

    def decode(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Decode tokens into codes; the inverse of `encode`.

        Args:
            tokens: (B, L) integers, -1 after each sequence's end.
            grid: (h, w).

        Returns:
            (B, h, w, T) int64.

        Raises:
            ValueError: The tokens have another dtype or shape, or a sequence breaks the grammar or
                has another number of sites.
        """
        tokens, sites = _integers(tokens, "tokens"), _count_sites(grid)
        if tokens.ndim != 2:
            raise ValueError(f"expected tokens (B, L), got {tuple(tokens.shape)}")
        if not _all_within(tokens, self.vocab_size):
            outside = (tokens < PAD) | (tokens >= self.vocab_size)
            _refuse(outside, tokens, f"is outside the vocabulary of {self.vocab_size}")
        if len(tokens) == 0:
            return tokens.new_empty((0, *grid, self.max_loops))
        if self.site_tokens == 1 and tokens.shape[1] == sites and (tokens >= 0).all():
            return tokens.reshape(-1, *grid, 1).clone()  # every token is a site, in order
        if sites > tokens.shape[1]:  # refused before anything of their number is allocated
            given = f"{tokens.shape[1]} tokens"
            raise ValueError(f"{given} are too few: site {sites - 1} of {sites} has no code")
        states = self.states(tokens)
        codes = self._decode_sites(tokens, states, sites)  # (B, S, T)
        # A sequence is valid if and only if encoding the result gives it again.
        again, _ = self._pack(codes)
        if not torch.equal(again, tokens):
            self._refuse_other(again, tokens, states, sites)
        self._refuse_codes(codes)  # the last site may have ended too early
        return codes.reshape(len(tokens), *grid, self.max_loops)

    def _refuse_other(
        self, again: Tensor, tokens: Tensor, states: GrammarState, sites: int
    ) -> None:
        """Raise a ValueError that names the first token which another (B, L') has not, if any."""
        beyond = (tokens >= 0) & (states.site >= sites)
        _refuse(beyond, tokens, f"follows the last of {sites} sites")
        given = F.pad(tokens, (0, max(0, again.shape[1] - tokens.shape[1])), value=PAD)
        again = F.pad(again, (0, given.shape[1] - again.shape[1]), value=PAD)
        why = f"breaks the grammar of {type(self).__name__} for {sites} sites"
        _refuse(given != again, given, why)

    @abstractmethod
    def states(self, tokens: Tensor) -> GrammarState:
        """Compute the state (B, L) before each token of valid sequences (B, L)."""

    @abstractmethod
    def advance(self, state: GrammarState, tokens: Tensor) -> GrammarState:
        """Compute the state after one more allowed token (B,) of each sequence."""

    @abstractmethod
    def allowed(self, state: GrammarState) -> Tensor:
        """Mark the tokens that may come next: (..., V) bool for a state of shape (...)."""

    def everything(self, state: GrammarState) -> Tensor:
        """Return a mask (..., V) that allows every token after a state of shape (...)."""
        shape = *state.site.shape, self.vocab_size
        return torch.ones(shape, dtype=torch.bool, device=state.site.device)

    @abstractmethod
    def _encode_sites(self, codes: Tensor) -> Tensor:
        """Codes (B, S, T) -> tokens (B, S, P) of each site, -1 in an empty place."""

    @abstractmethod
    def _decode_sites(self, tokens: Tensor, states: GrammarState, sites: int) -> Tensor:
        """Tokens (B, L) and states -> codes (B, S, T); any codes for an invalid sequence."""


def _integers(values: Tensor, name: str) -> Tensor:
    """Return integers as int64; raise a ValueError for any other dtype."""
    if values.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integers of int64's range, got {values.dtype}")
    return values.long()


def _all_within(values: Tensor, count: int) -> bool:
    """Return True if all values are in -1..count-1, by one pass over them."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return int(low) >= PAD and int(high) < count


def _count_sites(grid: Sequence[int]) -> int:
    """Return the number of sites of a grid (h, w); raise a ValueError for any other."""
    if len(grid) != 2 or not all(isinstance(side, Integral) and side > 0 for side in grid):
        raise ValueError(f"expected a grid (h, w) of at least one site, got {tuple(grid)}")
    sites = grid[0] * grid[1]
    if sites > _MOST_SITES:
        raise ValueError(f"a grid may have {_MOST_SITES} sites, got {tuple(grid)}")
    return sites


def _refuse(wrong: Tensor, tokens: Tensor, why: str) -> None:
    """Raise a ValueError that names the first wrong token (B, L), if there is one."""
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        token = int(tokens[row, position])
        name = f"token {token}" if token >= 0 else "the end"
        raise ValueError(f"sequence {row}: {name} at position {position} {why}")


def by_site(
    tokens: Tensor, site: Tensor, depth: Tensor, kept: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Lay out sequences by site.

    Args:
        tokens: (B, L) int64.
        site: (B, L) int64, the site of each token.
        depth: (B, L) int64, its place in the site.
        kept: (B, L) bool, the tokens to lay out.
        shape: (S, P), sites and places per site. Tokens outside are left out.

    Returns:
        (B, S, P) int64, -1 where there is no token.
    """
    sites, places = shape
    kept = kept & (site < sites) & (depth < places)
    # Tokens left out go to one column past the end, which is then cut off.
    column = torch.where(kept, site * places + depth, sites * places)  # (B, L)
    table = tokens.new_full((len(tokens), sites * places + 1), PAD)
    return table.scatter_(1, column, tokens)[:, :-1].unflatten(1, shape)  # (B, S, P)


def place(state: GrammarState, grid: tuple[int, int]) -> Tensor:
    """Row, column and depth (..., 3) of the token after a state of shape (...), in raster order."""
    row = (state.site // grid[1]).clamp(max=grid[0] - 1)
    return torch.stack([row, state.site % grid[1], state.depth], dim=-1)
