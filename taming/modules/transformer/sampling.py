"""Drawing token sequences from a transformer: one loop for every kind of sequence.

Axis letters: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.transformer.mingpt import GPT
from taming.modules.vqvae.sequence import PAD, GrammarState, TokenSequence, place


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Sharpen a distribution and cut off its tail.

    Args:
        logits: (..., V).
        temperature: Divides the logits; above 0.
        top_k: Keep only the k likeliest tokens; more than V keeps all.
        top_p: Keep the fewest likeliest tokens that together reach this probability, in (0, 1]
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).

    Returns:
        (..., V) with -inf for what was cut off; the likeliest token always stays.

    Raises:
        ValueError: A value is out of range.
    """
    if temperature <= 0:
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
    return logits


@torch.no_grad()
def sample_tokens(
    model: GPT,
    condition: Tensor,
    sequence: TokenSequence,
    grid: tuple[int, int],
    prefix: Tensor | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue sequences token by token until each has written all its sites.

    Rows advance together but each stands at its own place in its own grammar: what the grammar
    forbids there is never drawn, and a row that is finished writes nothing more.

    Args:
        model: The transformer, in eval mode.
        condition: (B, C) int64 tokens that come before all sequences; C is at least 1.
        sequence: The grammar.
        grid: (h, w) of the image to be written.
        prefix: (B, L0) int64, known beginnings, -1 after the end of shorter ones.
        steps: Most tokens to draw after the prefix; None for as many as it takes.
        temperature: See `filter_logits`.
        top_k: See `filter_logits`.
        top_p: See `filter_logits`.
        greedy: Take the likeliest token instead of drawing one.
        callback: Called with the number of tokens drawn so far after each one.

    Returns:
        (B, L) int64, prefix included, -1 after each sequence's end.
    """
    given = condition.new_empty(len(condition), 0) if prefix is None else prefix
    stop = None if steps is None else given.shape[1] + steps
    # What every row knows goes in at once; the rest of longer prefixes, token by token.
    common = int((given >= 0).sum(dim=1).min())
    states = sequence.states(F.pad(given[:, :common], (0, 1), value=PAD))
    state = GrammarState(*(field[:, common] for field in states))
    inputs, sites = torch.cat([condition, given[:, :common]], dim=1), place(states, grid)
    cache, columns = model.new_cache(len(condition)), list(given[:, :common].unbind(dim=1))
    while stop is None or len(columns) < stop:
        open_rows = state.site < grid[0] * grid[1]
        if not open_rows.any():
            break
        logits, _ = model(inputs, sites=sites, cache=cache)
        logits = _grammatical(logits[:, -1], sequence.allowed(state))
        logits = filter_logits(logits, temperature, top_k, top_p)
        token = logits.argmax(dim=-1) if greedy else _draw(logits)
        if len(columns) < given.shape[1]:
            known = given[:, len(columns)]
            token = torch.where(known >= 0, known, token)
        columns.append(torch.where(open_rows, token, PAD))
        state = _advance(sequence, state, token, open_rows)
        inputs, sites = token[:, None], place(state, grid)[:, None]
        if callback is not None:
            callback(max(len(columns) - given.shape[1], 0))
    return torch.stack(columns, dim=1) if columns else given


def _grammatical(logits: Tensor, allowed: Tensor) -> Tensor:
    """Forbid (B, V) tokens that the grammar does not allow or, as a larger vocabulary may, know."""
    allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]), value=False)
    return logits.float().masked_fill(~allowed, -torch.inf)


def _draw(logits: Tensor) -> Tensor:
    """Draw one token (B,) for each row of logits (B, V)."""
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1)


def _advance(
    sequence: TokenSequence, state: GrammarState, token: Tensor, open_rows: Tensor
) -> GrammarState:
    """Advance the rows that are not finished."""
    after = sequence.advance(state, token)
    return GrammarState(
        *(torch.where(open_rows, new, old) for new, old in zip(after, state, strict=True))
    )
