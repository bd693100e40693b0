"""What a prior's network must offer: likelihoods of whole sequences, and decoding step by step.

Axis letters: B sequences, R rows (the sequences that get a token now), S sites, T tokens of a site,
L tokens, C tokens of a condition, V vocabulary, N tokens of all sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from taming.modules.sequence.grammar import GrammarState


class Prompt(NamedTuple):
    """The tokens that are known before the first one is sampled.

    Attributes:
        rows: (R,) int64, ascending numbers of the sequences to continue.
        condition: (R, C) int64, at least one token each.
        tokens: (R, L) int64, the known beginnings, -1 after the end of shorter ones.
        states: Of shape (R, L + 1), the grammar state before each of these tokens and after them.
    """

    rows: Tensor
    condition: Tensor
    tokens: Tensor
    states: GrammarState


class IncrementalDecoder(ABC):
    """A network in the middle of several sequences; finished sequences cost nothing.

    Attributes:
        rows: (R,) int64, ascending numbers of the sequences that get the next token.
        logits: (R, V), of that token.
    """

    rows: Tensor
    logits: Tensor

    @abstractmethod
    def prefill(self, prompt: Prompt) -> Tensor:
        """Read as much of a prompt as fits into one pass.

        Returns:
            (R,) int64, tokens of each beginning that were read; `step` takes the others, like
            sampled ones.
        """

    @abstractmethod
    def step(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """Read the token that each of ``rows`` got, and predict the next.

        Args:
            rows: (R,) int64, those of the attribute ``rows`` that are not finished.
            tokens: (R,) int64, their tokens.
            states: Of shape (R,), the grammar state after these tokens.
        """


class PriorNetwork(nn.Module, ABC):
    """A network over token sequences, as a `Net2NetTransformer` uses it.

    A new network needs a ``vocab_size``, `predict` and `decoder`; the rest has defaults. Of its
    constructor's parameters, the prior fills in those named ``vocab_size``, ``block_size`` and
    ``site_shape`` where a configuration leaves them out.

    Attributes:
        vocab_size: V, width of the logits; at least what images and conditions need.
        block_size: Most inputs that it can read; None for any number.
        n_unmasked: First inputs that see each other; no more than a condition has.
        site_shape: (rows, columns, T) of the largest grid, if it has tables of places.
        uses_sites: True if its predictions depend on the places of tokens.
        site_order: (S,) int64, the raster number of the site that comes i-th; None for raster
            order. Set by the prior; not part of the state.
    """

    vocab_size: int
    block_size: int | None = None
    n_unmasked: int = 0
    site_shape: tuple[int, int, int] | None = None
    uses_sites: bool = False
    site_order: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("site_order", None, persistent=False)

    @staticmethod
    def inputs_of(sites: int, site_tokens: int) -> int:
        """Return the number of inputs that an image of so many sites and tokens per site takes."""
        return sites * site_tokens

    @abstractmethod
    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        """Predict each token of sequences of different lengths from those before it.

        Args:
            condition: (B, C) int64, at least one token before each sequence.
            tokens: (B, L) int64, -1 after each sequence's end.
            states: Of shape (B, L), the grammar state before each token.
            grid: (h, w) of the image.

        Returns:
            (N, V) logits of the tokens present, one sequence after the other.
        """

    @abstractmethod
    def decoder(self, grid: tuple[int, int]) -> IncrementalDecoder:
        """Return a decoder for an image of (h, w) sites; the network is in eval mode."""
