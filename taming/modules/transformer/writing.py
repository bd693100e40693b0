"""Sequences under way: what a network is asked for, one token after the other.

Axis letters: B sequences, R rows (the sequences that get a token now), L tokens, C tokens of a
condition, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from taming.modules.vqvae.grammar import GrammarState


class Beginning(NamedTuple):
    """What is known before the first token is drawn.

    Attributes:
        rows: (R,) int64, ascending numbers of the sequences to be continued.
        condition: (R, C) int64, at least one token each.
        tokens: (R, L) int64, beginnings, -1 after the end of shorter ones.
        states: Of shape (R, L + 1), where each of these tokens stands, and the one after them.
        grid: (h, w) of the image.
    """

    rows: Tensor
    condition: Tensor
    tokens: Tensor
    states: GrammarState
    grid: tuple[int, int]


class Turn(NamedTuple):
    """The sequences that get a token now.

    Attributes:
        rows: (R,) int64, their ascending numbers.
        logits: (R, V), of that token.
    """

    rows: Tensor
    logits: Tensor


class Writer(ABC):
    """A network in the middle of several sequences. Those that have ended cost nothing.

    Attributes:
        taken: (R,) int64, tokens of each beginning that it has read; the others have to be told to
            `advance` like new ones.
        turn: Who is to get a token.
    """

    taken: Tensor
    turn: Turn

    @abstractmethod
    def advance(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """Read the tokens of a turn, and see whose turn is next.

        Args:
            rows: (R,) int64, those of ``turn.rows`` that go on after this token.
            tokens: (R,) int64, the token that each has got.
            states: Of shape (R,), where the next one stands.
        """


class Guided(Writer):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, equation 6).

    Args:
        conditional: Knows the condition.
        unconditional: Does not.
        scale: 1 is the condition alone, 0 none, above 1 more than what was trained.
    """

    def __init__(self, conditional: Writer, unconditional: Writer, scale: float) -> None:
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = scale
        self.taken = conditional.taken
        self.turn = self._combine()

    def _combine(self) -> Turn:
        rows, logits = self.conditional.turn
        without = self.unconditional.turn.logits
        return Turn(rows, without + self.scale * (logits - without))

    def advance(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """See `Writer.advance`."""
        self.conditional.advance(rows, tokens, states)
        self.unconditional.advance(rows, tokens, states)
        self.turn = self._combine()
