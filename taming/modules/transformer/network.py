"""What a prior's network must offer: likelihoods of whole sequences, and decoding step by step.

Axis letters: B sequences, R rows (the sequences that get a token now), S sites, T tokens of a site,
L tokens, C tokens of a condition, V vocabulary, N tokens of all sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.sequence.grammar import PAD, GrammarState


class Prompt(NamedTuple):
    """The tokens that are known before the first one is sampled."""

    rows: Tensor  # (R,) int64, ascending numbers of the sequences to continue
    condition: Tensor  # (R, C) int64, at least one token each
    tokens: Tensor  # (R, L) int64, the known beginnings, -1 after the end of shorter ones
    states: GrammarState  # of shape (R, L + 1), before each of these tokens and after them


class IncrementalDecoder(ABC):
    """A network in the middle of several sequences; finished sequences cost nothing."""

    rows: Tensor  # (R,) int64, ascending numbers of the sequences that get the next token
    logits: Tensor  # (R, V), of that token

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

    A new network needs a ``vocab_size`` and `predict`; the rest has defaults. Of its constructor's
    parameters, the prior fills in those named ``vocab_size``, ``block_size`` and ``site_shape``
    where a configuration leaves them out.

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

    def compile_blocks(self) -> None:
        """Compile the blocks, for passes over whole sequences, by ``torch.compile``.

        Raises:
            ValueError: By default, a network has no blocks to compile.
        """
        raise ValueError(f"{type(self).__name__} has no blocks to compile: set compile to false")

    def decoder(self, grid: tuple[int, int]) -> IncrementalDecoder:
        """Return a decoder for an image of (h, w) sites; the network is in eval mode.

        By default, it calls `predict` on the whole sequence for each token. A network that can keep
        what it has read, such as keys and values, returns a decoder of its own.
        """
        return RecomputingDecoder(self, grid)


class RecomputingDecoder(IncrementalDecoder):
    """Predicts each token by `PriorNetwork.predict`, from the whole sequence before it.

    Args:
        network: The network, in eval mode.
        grid: (h, w) of the image.
    """

    def __init__(self, network: PriorNetwork, grid: tuple[int, int]) -> None:
        self.network = network
        self.grid = grid

    def prefill(self, prompt: Prompt) -> Tensor:
        """Read the whole prompt."""
        self.condition, self.states = prompt.condition, prompt.states
        self._read(prompt.rows, F.pad(prompt.tokens, (0, 1), value=PAD))
        return (prompt.tokens >= 0).sum(dim=1)

    def _read(self, rows: Tensor, tokens: Tensor) -> None:
        """Predict the next tokens of sequences ``rows`` so far, (R, L) with L above any length."""
        self.rows, self.tokens = rows, tokens
        end = (tokens >= 0).sum(dim=1, keepdim=True)  # (R, 1)
        # The network predicts tokens that are present: 0 stands for the one that is to come.
        inputs = tokens.scatter(1, end, 0)
        logits = self.network.predict(self.condition, inputs, self.states, self.grid)  # (N, V)
        self.logits = logits[(end[:, 0] + 1).cumsum(dim=0) - 1]

    def step(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        """Append a token to each sequence; drop finished ones."""
        kept = torch.searchsorted(self.rows, rows)
        so_far, self.condition = self.tokens[kept], self.condition[kept]
        end = (so_far >= 0).sum(dim=1, keepdim=True)  # (R, 1)
        self.states = GrammarState(
            *(
                F.pad(old[kept], (0, 1)).scatter(1, end + 1, new[:, None])
                for old, new in zip(self.states, states, strict=True)
            )
        )
        self._read(rows, F.pad(so_far, (0, 1), value=PAD).scatter(1, end, tokens[:, None]))
