"""Drawing token sequences from a prior's network: one loop for every network and every grammar.

Axis letters: B sequences, R rows (sequences that get a token now), S sites, T tokens of a site,
L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.transformer.paper import Paper
from taming.modules.transformer.writing import Beginning, Guided, Writer
from taming.modules.vqvae.grammar import GrammarState, TokenSequence


class Network(Protocol):
    """What a prior's network does; `GPT` and `TwoLevelGPT` are such."""

    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        """Return logits (N, V) of the tokens of sequences, each from those before it."""
        ...

    def write(self, beginning: Beginning) -> Writer:
        """Start to write sequences."""
        ...


class Drawing(NamedTuple):
    """How tokens are drawn.

    Attributes:
        temperature: See `filter_logits`, as ``top_k``, ``top_p`` and ``min_p``.
        top_k: Draw among the likeliest k.
        top_p: Draw among the likeliest that together have this probability.
        greedy: Take the likeliest token instead.
        min_p: Draw among those at least this likely, relative to the likeliest.
        guidance: Scale of classifier-free guidance; see `Guided`. 1 for none.
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


FREELY = Drawing()


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


def draw(logits: Tensor, drawing: Drawing, rows: Tensor) -> Tensor:
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
    drawing: Drawing = FREELY,
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
    paper = Paper(sequence, grid, prefix, known, steps, sites)
    rows = paper.open_rows()
    if len(rows) == 0:
        return paper.written()
    start = paper.beginning(rows, condition)
    writer = model.write(start)
    if without is not None and drawing.guidance != 1:
        writer = Guided(
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
