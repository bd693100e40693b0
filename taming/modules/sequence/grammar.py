"""The grammar of token sequences: one sequence per image, site by site.

A grammar gives the place of each token before the token itself, and the tokens that may come next,
so that a model can embed the place of the token it predicts and every sample decodes.

Axis letters: B images, h w grid, S = h w sites, T turns, L tokens, K codes, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = -1


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
    """

    vocab_size: int
    site_tokens: int
    restricted: bool = True

    def __init__(self, n_e: int, max_loops: int, dummies: bool) -> None:
        if n_e < 1 or max_loops < 1:
            raise ValueError(f"n_e and max_loops must be at least 1, got {n_e} and {max_loops}")
        self.n_e, self.max_loops, self.dummies = n_e, max_loops, dummies

    def encode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Encode codes as tokens.

        Args:
            codes: (B, h, w, T) or (B, h, w) int64, -1 after a site's end.

        Returns:
            tokens: (B, L) int64, -1 after each sequence's end; L is the longest length.
            lengths: (B,) int64.
        """
        table = self._encode_sites(codes.reshape(len(codes), -1, self.max_loops)).flatten(1)
        present = table >= 0  # (B, S P), P places per site of which some hold no token
        lengths = present.sum(dim=1)
        # A token moves to the left past the empty places; those all go to one column past the end,
        # which is then cut off.
        column = torch.where(present, present.cumsum(dim=1) - 1, lengths.max())  # (B, S P)
        tokens = table.new_full((len(codes), int(lengths.max()) + 1), PAD)
        return tokens.scatter_(1, column, table)[:, :-1], lengths

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode tokens into codes; the inverse of `encode`.

        Args:
            tokens: (B, L) int64, -1 after each sequence's end.
            grid: (h, w).

        Returns:
            (B, h, w, T) int64.

        Raises:
            ValueError: A sequence breaks the grammar or has another number of sites.
        """
        outside = (tokens < PAD) | (tokens >= self.vocab_size)
        _refuse(outside, tokens, f"is outside the vocabulary of {self.vocab_size}")
        states, sites = self.states(tokens), grid[0] * grid[1]
        beyond = (tokens >= 0) & (states.site >= sites)
        _refuse(beyond, tokens, f"follows the last of {sites} sites")
        codes = self._decode_sites(tokens, states, sites)  # (B, S, T)
        # A sequence is valid if and only if encoding the result gives it again.
        again, _ = self.encode(codes)
        given = F.pad(tokens, (0, max(0, again.shape[1] - tokens.shape[1])), value=PAD)
        again = F.pad(again, (0, given.shape[1] - again.shape[1]), value=PAD)
        why = f"breaks the grammar of {type(self).__name__} for {sites} sites"
        _refuse(given != again, given, why)
        empty = (codes < 0).all(dim=2)
        if empty.any():
            row, site = empty.nonzero()[0].tolist()
            raise ValueError(f"sequence {row}: site {site} of {sites} has no code")
        return codes.reshape(len(tokens), *grid, self.max_loops)

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
