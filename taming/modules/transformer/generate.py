"""Generation token by token: prefill a decoder, filter its logits, sample, take the next step.

One loop serves every network (a `PriorNetwork`) and every grammar (a `TokenSequence`).

Axis letters: B sequences, R rows (the sequences that get a token now), S sites, T tokens of a site,
L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.sequence.grammar import PAD, GrammarState, TokenSequence, by_site
from taming.modules.transformer.logits import filter_logits, mask_logits
from taming.modules.transformer.network import IncrementalDecoder, PriorNetwork, Prompt

# --- from logits to a token ----------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling.

    Raises:
        ValueError: A value is out of range.
    """

    temperature: float = 1.0  # divides the logits; above 0
    top_k: int | None = None  # sample among the k likeliest tokens
    top_p: float | None = None  # among the likeliest of together this probability, in (0, 1]
    greedy: bool = False  # take the likeliest token instead
    min_p: float | None = None  # among those of at least this share, in [0, 1], of the likeliest
    # Scale of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, equation 6): 1 is
    # the condition alone, 0 none, above 1 more than was trained.
    guidance: float = 1.0
    # One source of random numbers per sequence (`generators_of`), so that a sample does not depend
    # on the others; None for torch's global one.
    generators: Sequence[np.random.Generator] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:  # so that nan is refused too
            always = "; greedy, or top_k 1, takes the likeliest token always"
            raise ValueError(
                f"temperature must be a finite number above 0, got {self.temperature}"
                f"{always if self.temperature == 0 else ''}"
            )
        if self.top_k is not None and not self.top_k >= 1:
            raise ValueError(
                f"top_k must be at least 1, got {self.top_k}; to sample among all tokens, leave it "
                "out (None), or give more than there are"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")


DEFAULT_SAMPLING = SamplingParams()


def generators_of(seed: int, images: Iterable[int]) -> list[np.random.Generator]:
    """Return a source of random numbers for each image number, the same in any batch."""
    return [np.random.default_rng([seed, number]) for number in images]


def sample_token(logits: Tensor, params: SamplingParams, rows: Tensor) -> Tensor:
    """Sample a token (R,) of each sequence by its logits (R, V), -inf for those that must not come.

    ``rows`` (R,) are the numbers of the sequences, which choose among ``params.generators``.
    """
    logits = filter_logits(
        logits.float(), params.temperature, params.top_k, params.top_p, params.min_p
    )
    if params.greedy:
        return logits.argmax(dim=-1)
    if params.generators is None:
        point = torch.rand(len(rows), dtype=torch.float32)
    else:
        numbers = [params.generators[row].random(dtype=np.float32) for row in rows.tolist()]
        point = torch.tensor(numbers)
    # The inverse of the cumulative distribution, the likeliest token first: one number per sample.
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    passed = ordered.cumsum(dim=-1) <= point.to(logits.device)[:, None]
    # Rounding may leave the sum of all below 1, and no impossible token may come of that.
    last = (ordered > 0).sum(dim=-1) - 1
    return order.gather(1, torch.minimum(passed.sum(dim=-1), last)[:, None])[:, 0]  # (R,)


# --- the loop ------------------------------------------------------------------------------------


def _at(states: GrammarState, index: Tensor | tuple[Tensor, Tensor]) -> GrammarState:
    """Index all fields of grammar states alike."""
    return GrammarState(*(field[index] for field in states))


def _of(rows: Tensor, field: Tensor) -> Tensor:
    """Take rows (R,), which ascend, of a field (B, ...); all of them without a copy."""
    return field if len(rows) == len(field) else field[rows]


class GenerationState:
    """The tokens of each sequence so far, those still given, and the grammar's state.

    Args:
        sequence: The grammar.
        grid: (h, w) of the image.
        given: (B, L0) int64, known tokens, -1 after the end of shorter sequences.
        known: (S,) bool, sites whose given tokens are kept; None for all.
        steps: Most tokens to add to each sequence; None for no limit.
        sites: Sites after which a sequence is finished; None for all of the grid.

    Attributes:
        sampled: Most tokens that were sampled for a sequence.
        forced: False if every token that is still to come is sampled, none given.
        unfinished: Number of sequences that are not finished.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        grid: tuple[int, int],
        given: Tensor,
        known: Tensor | None,
        steps: int | None,
        sites: int | None,
    ) -> None:
        self.sequence = sequence
        self.sites = grid[0] * grid[1] if sites is None else sites
        self.sampled = 0
        most = self.sites * sequence.site_tokens
        amount = (given >= 0).sum(dim=1)
        self.stop = torch.full_like(amount, most) if steps is None else amount + steps
        before = sequence.states(given)
        kept = (given >= 0) & (before.site < self.sites)
        if known is not None:
            kept &= known[before.site.clamp(max=len(known) - 1)]
        shape = self.sites, sequence.site_tokens
        self.given = by_site(given, before.site, before.depth, kept, shape)  # (B, S, T)
        # The prompt: all tokens before the first one that is to be sampled.
        self.prompt_tokens = given.masked_fill((~kept).cumsum(dim=1) > 0, PAD)
        self.prompt_states = sequence.states(F.pad(self.prompt_tokens, (0, 1), value=PAD))
        self.count = (self.prompt_tokens >= 0).sum(dim=1)  # (B,)
        everyone = torch.arange(len(given), device=given.device)
        self.state = _at(self.prompt_states, (everyone, self.count))
        self.tokens = F.pad(self.prompt_tokens, (0, max(0, most - given.shape[1])), value=PAD)

    def begin(self) -> Tensor:
        """Return the numbers (R,) of the sequences that are not finished."""
        rows = ((self.state.site < self.sites) & (self.count < self.stop)).nonzero()[:, 0]
        self.unfinished = len(rows)
        return rows

    def prompt(self, rows: Tensor, condition: Tensor) -> Prompt:
        """Return the prompt of sequences ``rows`` under conditions (B, C)."""
        states = _at(self.prompt_states, rows)
        return Prompt(rows, condition[rows], self.prompt_tokens[rows], states)

    def rewind(self, rows: Tensor, amount: Tensor) -> None:
        """Go back to the first ``amount`` (R,) tokens of the prompts."""
        self._move(rows, amount, _at(self.prompt_states, (rows, amount)))
        self.forced = bool(((self.given[rows] >= 0).sum(dim=(1, 2)) > amount).any())

    def _move(self, rows: Tensor, count: Tensor, states: GrammarState) -> None:
        if len(rows) == len(self.count):
            self.count, self.state = count, states
            return
        self.count[rows] = count
        for field, value in zip(self.state, states, strict=True):
            field[rows] = value

    def of(self, rows: Tensor) -> GrammarState:
        """Return the grammar state before the next token of sequences ``rows`` (R,)."""
        return GrammarState(*(_of(rows, field) for field in self.state))

    def next_token(self, rows: Tensor, logits: Tensor, params: SamplingParams) -> Tensor:
        """Return the next token (R,) of each sequence: the given one, or a sampled one."""
        state = self.of(rows)
        if not self.forced:
            return self._sample(rows, logits, state, params)
        token = self.given[rows, state.site, state.depth]
        free = token < 0
        if free.any():
            token[free] = self._sample(rows[free], logits[free], _at(state, free), params)
        return token

    def _sample(
        self, rows: Tensor, logits: Tensor, state: GrammarState, params: SamplingParams
    ) -> Tensor:
        """Sample a token (R,) of each sequence in a state (R,) by its logits (R, V)."""
        if self.sequence.restricted or logits.shape[-1] > self.sequence.vocab_size:
            logits = mask_logits(logits, self.sequence.allowed(state))
        self.sampled += 1
        return sample_token(logits, params, rows)

    def append(self, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append a token (R,) to each sequence; return rows and tokens of those that go on."""
        count = _of(rows, self.count)
        self.tokens[rows, count] = tokens
        state, count = self.sequence.advance(self.of(rows), tokens), count + 1
        self._move(rows, count, state)
        going_on = (state.site < self.sites) & (count < _of(rows, self.stop))
        finished = len(rows) - int(going_on.sum())
        self.unfinished -= finished
        return (rows[going_on], tokens[going_on]) if finished else (rows, tokens)

    def result(self) -> Tensor:
        """Return the sequences (B, L) int64, -1 after each one's end."""
        return self.tokens[:, : max(self.count.tolist(), default=0)]

    def finished_sites(self) -> int:
        """Return the number of sites that are finished in all sequences."""
        return int(self.state.site.min())

    def tokens_of(self, sites: int) -> Tensor:
        """Return the tokens (B, L) of the first sites, -1 after them."""
        return self.tokens.masked_fill(self.sequence.states(self.tokens).site >= sites, PAD)


def generate(
    network: PriorNetwork,
    condition: Tensor,
    sequence: TokenSequence,
    grid: tuple[int, int],
    params: SamplingParams = DEFAULT_SAMPLING,
    prefix: Tensor | None = None,
    known: Tensor | None = None,
    steps: int | None = None,
    sites: int | None = None,
    without: Tensor | None = None,
    callback: Callable[[GenerationState], None] | None = None,
) -> Tensor:
    """Continue sequences token by token until each has all its sites.

    Each sequence is at its own place of its own grammar: tokens that the grammar forbids there are
    never sampled, and a finished sequence costs nothing more.

    Args:
        network: In eval mode.
        condition: (B, C) int64 tokens before all sequences; C is at least 1.
        sequence: The grammar.
        grid: (h, w) of the image.
        params: Parameters of sampling.
        prefix: (B, L0) int64, known tokens, -1 after the end of shorter sequences.
        known: (S,) bool, sites of the prefix to keep, in the sequence's order; the others are
            sampled anew. None keeps all.
        steps: Most tokens to add to each prefix; None for no limit.
        sites: Sites of a finished sequence, those of the prefix included; None for all of the grid.
        without: (B, C) int64, what stands for no condition; guidance needs it.
        callback: Called after each sampled token.

    Returns:
        (B, L) int64, prefix included, -1 after each sequence's end.

    Raises:
        ValueError: A value is out of range, or guidance lacks ``without``.
    """
    if params.guidance != 1 and without is None:
        raise ValueError(
            f"guidance {params.guidance} needs a prior that was trained with condition_dropout"
        )
    given = condition.new_empty(len(condition), 0) if prefix is None else prefix
    conditions = [condition] if without is None or params.guidance == 1 else [condition, without]
    with torch.inference_mode():  # small operations take a tenth less time than without gradients
        state = GenerationState(sequence, grid, given, known, steps, sites)
        rows = state.begin()
        if len(rows):
            decoders = [network.decoder(grid) for _ in conditions]
            _finish(state, rows, conditions, decoders, params, callback)
        tokens = state.result()
    return tokens.clone()  # an ordinary tensor again


def _finish(
    state: GenerationState,
    rows: Tensor,
    conditions: list[Tensor],
    decoders: list[IncrementalDecoder],
    params: SamplingParams,
    callback: Callable[[GenerationState], None] | None,
) -> None:
    """Sample sequences ``rows`` (R,) to their ends; further decoders are those of guidance."""
    read = [d.prefill(state.prompt(rows, c)) for d, c in zip(decoders, conditions, strict=True)]
    state.rewind(rows, read[0])
    while True:
        rows, logits, sampled = decoders[0].rows, decoders[0].logits, state.sampled
        for free in decoders[1:]:
            logits = free.logits + params.guidance * (logits - free.logits)
        token = state.next_token(rows, logits, params)
        rows, token = state.append(rows, token)
        if callback is not None and state.sampled > sampled:
            with torch.inference_mode(False):
                callback(state)
        if state.unfinished == 0:
            return
        for decoder in decoders:
            decoder.step(rows, token, state.of(rows))
