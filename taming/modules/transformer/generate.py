"""Draw token sequences from a prior's network: one loop for every network and every grammar.

Axis letters: B sequences, R rows (sequences that get a token now), S sites, T tokens of a site,
L tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.sequence.grammar import PAD, GrammarState, TokenSequence, by_site


class Prompt(NamedTuple):
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


class IncrementalDecoder(ABC):
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


class GuidedDecoder(IncrementalDecoder):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, equation 6).

    Args:
        conditional: Knows the condition.
        unconditional: Does not.
        scale: 1 is the condition alone, 0 none, above 1 more than what was trained.
    """

    def __init__(
        self, conditional: IncrementalDecoder, unconditional: IncrementalDecoder, scale: float
    ) -> None:
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
        """See `IncrementalDecoder.advance`."""
        self.conditional.advance(rows, tokens, states)
        self.unconditional.advance(rows, tokens, states)
        self.turn = self._combine()


class GenerationState:
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

    def beginning(self, rows: Tensor, condition: Tensor) -> Prompt:
        """What a network may read at once."""
        states = GrammarState(*(field[rows] for field in self.states))
        return Prompt(rows, condition[rows], self.prefix[rows], states, self.grid)

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


class Network(Protocol):
    """What a prior's network does; `GPT` and `TwoLevelGPT` are such."""

    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        """Return logits (N, V) of the tokens of sequences, each from those before it."""
        ...

    def write(self, beginning: Prompt) -> IncrementalDecoder:
        """Start to write sequences."""
        ...


class SamplingParams(NamedTuple):
    """How tokens are drawn.

    Attributes:
        temperature: See `filter_logits`, as ``top_k``, ``top_p`` and ``min_p``.
        top_k: Draw among the likeliest k.
        top_p: Draw among the likeliest that together have this probability.
        greedy: Take the likeliest token instead.
        min_p: Draw among those at least this likely, relative to the likeliest.
        guidance: Scale of classifier-free guidance; see `GuidedDecoder`. 1 for none.
        generators: One source of random numbers for each sequence, so that what is drawn for it
            does not depend on the others (see `generators_of`); None for torch's own.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    min_p: float | None = None
    guidance: float = 1.0
    generators: Sequence[np.random.Generator] | None = None


DEFAULT_SAMPLING = SamplingParams()


def generators_of(seed: int, images: Iterable[int]) -> list[np.random.Generator]:
    """Return a source of random numbers for each image number, the same in whatever batch."""
    return [np.random.default_rng([seed, number]) for number in images]


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Sharpen a distribution and cut off its tail.

    Args:
        logits: (..., V).
        temperature: Divides the logits; above 0.
        top_k: Keep only the k likeliest tokens; more than V keeps all.
        top_p: Keep the fewest likeliest tokens that together reach this probability, in (0, 1]
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
        min_p: Keep the tokens with at least this share, in [0, 1], of the probability of the
            likeliest (Nguyen et al. 2024, arXiv:2407.01082).

    Returns:
        (..., V) with -inf for what was cut off; the likeliest token always stays.

    Raises:
        ValueError: A value is out of range.
    """
    if not temperature > 0:  # so that nan is refused too
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logits = logits / temperature
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token is cut off if the likelier ones reach top_p without it.
        cut = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
    if min_p is not None:
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {min_p}")
        probability = logits.softmax(dim=-1)
        least = min_p * probability.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probability < least, -torch.inf)
    return logits


def draw(logits: Tensor, drawing: SamplingParams, rows: Tensor) -> Tensor:
    """Draw one token for each of some sequences.

    Args:
        logits: (R, V), -inf for what must not come.
        drawing: How.
        rows: (R,) int64, numbers of the sequences.

    Returns:
        (R,) int64.
    """
    logits = filter_logits(
        logits.float(), drawing.temperature, drawing.top_k, drawing.top_p, drawing.min_p
    )
    if drawing.greedy:
        return logits.argmax(dim=-1)
    if drawing.generators is None:
        point = torch.rand(len(rows))
    else:
        numbers = [drawing.generators[row].random(dtype=np.float32) for row in rows.tolist()]
        point = torch.tensor(numbers)
    # One number decides: how far along the tokens' probabilities, the likeliest first.
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    passed = ordered.cumsum(dim=-1) <= point.to(logits.device)[:, None]
    # Rounding may leave the sum of all below 1, and no impossible token may come of that.
    last = (ordered > 0).sum(dim=-1) - 1
    return order.gather(1, torch.minimum(passed.sum(dim=-1), last)[:, None])[:, 0]


def grammatical(logits: Tensor, allowed: Tensor) -> Tensor:
    """Forbid tokens that the grammar does not allow or, as a larger vocabulary may, know.

    Args:
        logits: (..., V).
        allowed: (..., V or fewer) bool.

    Returns:
        (..., V), -inf for what is forbidden.
    """
    allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]), value=False)
    return logits.masked_fill(~allowed, -torch.inf)


@torch.no_grad()
def sample_tokens(
    model: Network,
    condition: Tensor,
    sequence: TokenSequence,
    grid: tuple[int, int],
    drawing: SamplingParams = DEFAULT_SAMPLING,
    prefix: Tensor | None = None,
    known: Tensor | None = None,
    steps: int | None = None,
    sites: int | None = None,
    without: Tensor | None = None,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue sequences token by token until each has written all its sites.

    Each sequence stands at its own place in its own grammar: what the grammar forbids there is
    never drawn, and a sequence that is finished costs nothing more.

    Args:
        model: The network, in eval mode.
        condition: (B, C) int64 tokens that come before all sequences; C is at least 1.
        sequence: The grammar.
        grid: (h, w) of the image to be written.
        drawing: How tokens are drawn.
        prefix: (B, L0) int64, known tokens, -1 after the end of shorter sequences.
        known: (S,) bool, sites of which the prefix is kept, in the sequence's order; the others are
            drawn anew. None keeps all.
        steps: Most tokens to draw after each prefix; None for as many as it takes.
        sites: Sites to write, those of the prefix included; None for all of the grid.
        without: (B, C) int64, the condition that stands for none, needed for guidance.
        callback: Called with the number of tokens that each sequence has drawn so far at most.

    Returns:
        (B, L) int64, prefix included, -1 after each sequence's end.

    Raises:
        ValueError: A value is out of range, or guidance has nothing to compare with.
    """
    if drawing.guidance != 1 and without is None:
        raise ValueError(
            f"guidance {drawing.guidance} needs a prior that was trained with condition_dropout"
        )
    prefix = condition.new_empty(len(condition), 0) if prefix is None else prefix
    paper = GenerationState(sequence, grid, prefix, known, steps, sites)
    rows = paper.open_rows()
    if len(rows) == 0:
        return paper.written()
    start = paper.beginning(rows, condition)
    writer = model.write(start)
    if without is not None and drawing.guidance != 1:
        writer = GuidedDecoder(
            writer, model.write(start._replace(condition=without[rows])), drawing.guidance
        )
    paper.take(rows, writer.taken)
    drawn = 0
    while True:
        rows, logits = writer.turn
        token, free = paper.known_tokens(rows)
        if free.any():
            allowed = grammatical(logits[free], paper.allowed(rows[free]))
            token[free] = draw(allowed, drawing, rows[free])
            drawn += 1
            if callback is not None:
                callback(drawn)
        going_on = paper.put(rows, token)
        if len(paper.open_rows()) == 0:
            return paper.written()
        rows = rows[going_on]
        writer.advance(rows, token[going_on], paper.state_of(rows))
