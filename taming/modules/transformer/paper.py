"""What is written of sequences while they are drawn.

Axis letters: B sequences, R rows (sequences that get a token now), S sites, T tokens of a site,
L tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.transformer.writing import Beginning
from taming.modules.vqvae.grammar import PAD, GrammarState, TokenSequence, by_site


class Paper:
    """What is written of each sequence, what it must read, and where it stands.

    Args:
        sequence: See `sample_tokens`, as all others.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        grid: tuple[int, int],
        prefix: Tensor,
        known: Tensor | None,
        steps: int | None,
        sites: int | None,
    ) -> None:
        self.sequence = sequence
        self.grid = grid
        self.sites = grid[0] * grid[1] if sites is None else sites
        most = self.sites * sequence.site_tokens
        given = (prefix >= 0).sum(dim=1)
        self.stop = torch.full_like(given, most) if steps is None else given + steps
        before = sequence.states(prefix)
        kept = (prefix >= 0) & (before.site < self.sites)
        if known is not None:
            kept &= known[before.site.clamp(max=len(known) - 1)]
        shape = self.sites, sequence.site_tokens
        self.forced = by_site(prefix, before.site, before.depth, kept, shape)
        # What is read at once: all before the first token that is to be drawn.
        self.prefix = prefix.masked_fill((~kept).cumsum(dim=1) > 0, PAD)
        self.states = sequence.states(F.pad(self.prefix, (0, 1), value=PAD))
        self.count = (self.prefix >= 0).sum(dim=1)
        self.state = GrammarState(*(f.gather(1, self.count[:, None])[:, 0] for f in self.states))
        self.tokens = F.pad(self.prefix, (0, max(0, most - prefix.shape[1])), value=PAD)

    def open_rows(self) -> Tensor:
        """Numbers (R,) of the sequences that are not finished."""
        return ((self.state.site < self.sites) & (self.count < self.stop)).nonzero()[:, 0]

    def beginning(self, rows: Tensor, condition: Tensor) -> Beginning:
        """What a network may read at once."""
        states = GrammarState(*(field[rows] for field in self.states))
        return Beginning(rows, condition[rows], self.prefix[rows], states, self.grid)

    def take(self, rows: Tensor, amount: Tensor) -> None:
        """Go back to the first ``amount`` (R,) tokens of the beginnings."""
        self.count[rows] = amount
        for field, states in zip(self.state, self.states, strict=True):
            field[rows] = states[rows, amount]

    def state_of(self, rows: Tensor) -> GrammarState:
        """Where some sequences stand."""
        return GrammarState(*(field[rows] for field in self.state))

    def known_tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The token (R,) that is given at the place of each sequence, and where none is, (R,)."""
        site, depth, _ = self.state_of(rows)
        token = self.forced[rows, site, depth]
        return token, token < 0

    def allowed(self, rows: Tensor) -> Tensor:
        """Which tokens may come next, (R, V) bool."""
        return self.sequence.allowed(self.state_of(rows))

    def put(self, rows: Tensor, token: Tensor) -> Tensor:
        """Write tokens (R,) down; returns which of these sequences go on, (R,) bool."""
        self.tokens[rows, self.count[rows]] = token
        self.count[rows] += 1
        after = self.sequence.advance(self.state_of(rows), token)
        for field, value in zip(self.state, after, strict=True):
            field[rows] = value
        return (self.state.site[rows] < self.sites) & (self.count[rows] < self.stop[rows])

    def written(self) -> Tensor:
        """Everything, (B, L) int64, -1 after each sequence's end."""
        return self.tokens[:, : int(self.count.max())]
