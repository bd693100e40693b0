"""Laws of token sequences: round trips, one grammar told three ways, clear refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability.sequences import CHECKS, NOTATIONS, count, draw_sequence
from torch import Tensor

from taming.modules.sequence.grammar import GrammarState, TokenSequence, by_site, place
from taming.modules.sequence.notations import RasterSequence, RunLengthSequence, UnarySequence

GRID = (3, 4)
K = 5


def random_codes(dummies: bool, turns: int, batch: int = 6, fixed: bool = False) -> Tensor:
    """Valid codes (batch, 3, 4, turns) of every length, or all of ``turns``."""
    length = torch.randint(turns if fixed else 1, turns + 1, (batch, *GRID, 1))
    slot = torch.arange(turns)
    codes = torch.randint(0, K, (batch, *GRID, turns))
    if dummies:
        codes = torch.where(slot < length - 1, K, codes)
    return torch.where(slot < length, codes, -1)


CASES = [
    pytest.param(kind(K, turns, dummies), dummies, turns, id=f"{kind.__name__}-{dummies}-{turns}")
    for kind in (UnarySequence, RunLengthSequence)
    for dummies in (True, False)
    for turns in (1, 2, 4)
] + [pytest.param(RasterSequence(K, turns), False, turns, id=f"Raster-{turns}") for turns in (1, 4)]


def start(batch: int) -> GrammarState:
    """State (B,) before the first token."""
    return GrammarState(*torch.zeros(3, batch, dtype=torch.int64))


def walk(sequence: TokenSequence, tokens: Tensor, lengths: Tensor):
    """Yield position, state before it, and its tokens, one token at a time."""
    state = start(len(tokens))
    for position in range(tokens.shape[1]):
        yield position, state, tokens[:, position]
        advanced = sequence.advance(state, tokens[:, position].clamp(min=0))
        going = position < lengths
        state = type(state)(
            *(torch.where(going, new, old) for new, old in zip(advanced, state, strict=True))
        )


@pytest.mark.parametrize("sequence, dummies, turns", CASES)
def test_decode_inverts_encode(sequence: TokenSequence, dummies: bool, turns: int) -> None:
    codes = random_codes(dummies, turns, fixed=sequence.fixed_length)
    tokens, lengths = sequence.encode(codes)
    assert torch.equal(sequence.decode(tokens, GRID), codes)
    assert torch.equal((tokens >= 0).sum(1), lengths)
    assert tokens.max() < sequence.vocab_size
    assert lengths.max() == tokens.shape[1] <= GRID[0] * GRID[1] * sequence.site_tokens


@pytest.mark.parametrize("sequence, dummies, turns", CASES)
def test_states_equal_advancing_token_by_token(
    sequence: TokenSequence, dummies: bool, turns: int
) -> None:
    tokens, lengths = sequence.encode(random_codes(dummies, turns, fixed=sequence.fixed_length))
    states, allowed = sequence.states(tokens), sequence.allowed(sequence.states(tokens))
    for position, state, token in walk(sequence, tokens, lengths):
        here = position < lengths
        for field, whole in zip(state, states, strict=True):
            assert torch.equal(field[here], whole[here, position])
        mask = sequence.allowed(state)
        assert torch.equal(mask[here], allowed[here, position])
        assert mask[here].gather(1, token[here, None]).all()
        assert torch.equal(place(state, GRID)[here], place(states, GRID)[here, position])


@pytest.mark.parametrize("sequence, dummies, turns", CASES)
def test_every_walk_through_the_grammar_decodes(
    sequence: TokenSequence, dummies: bool, turns: int
) -> None:
    batch, sites = 16, GRID[0] * GRID[1]
    state = start(batch)
    columns, possible = [], torch.zeros(sequence.vocab_size, dtype=torch.bool)
    while (state.site < sites).any():
        allowed, going = sequence.allowed(state), state.site < sites
        possible |= allowed[going].any(dim=0)
        token = torch.multinomial(allowed.float(), 1).squeeze(1)
        columns.append(torch.where(going, token, -1))
        advanced = sequence.advance(state, token)
        state = type(state)(
            *(torch.where(going, new, old) for new, old in zip(advanced, state, strict=True))
        )
    tokens = torch.stack(columns, dim=1)
    again, _ = sequence.encode(sequence.decode(tokens, GRID))
    assert torch.equal(again, tokens)
    assert possible.all()  # the vocabulary has no token that never comes


@pytest.mark.parametrize("sequence, dummies, turns", CASES)
def test_a_token_lies_where_its_state_says(
    sequence: TokenSequence, dummies: bool, turns: int
) -> None:
    tokens, _ = sequence.encode(random_codes(dummies, turns, fixed=sequence.fixed_length))
    states, present = sequence.states(tokens), tokens >= 0
    for sites in (12, 5):
        shape = sites, sequence.site_tokens
        table = by_site(tokens, states.site, states.depth, present, shape)
        row, position = (present & (states.site < sites)).nonzero().unbind(1)
        site, depth = (field[row, position] for field in (states.site, states.depth))
        assert torch.equal(table[row, site, depth], tokens[row, position])
        assert int((table >= 0).sum()) == len(row)


def test_forms_of_the_idea() -> None:
    d = K
    dummy_codes = torch.tensor([[[[d, d, 3, -1], [1, -1, -1, -1]]]])
    assert UnarySequence(K, 4, True).encode(dummy_codes)[0].tolist() == [[d, d, 3, 1]]
    assert RunLengthSequence(K, 4, True).encode(dummy_codes)[0].tolist() == [[K + 1, 3, 1]]
    codes = torch.tensor([[[[0, 1, 2, 3], [4, 4, -1, -1], [2, -1, -1, -1]]]])
    assert UnarySequence(K, 4, False).encode(codes)[0].tolist() == [[0, 1, 2, 3, 4, 4, d, 2, d]]
    run_length = RunLengthSequence(K, 4, False).encode(codes)[0]
    assert run_length.tolist() == [[K + 2, 0, 1, 2, 3, K, 4, 4, 2]]


@pytest.mark.parametrize(
    "sequence, tokens, message",
    [
        (UnarySequence(K, 3, True), [0, 1, 2], "site 3 of 4 has no code"),
        (UnarySequence(K, 3, True), [0, 1, 2, 3, 4], "token 4 at position 4 follows the last"),
        (UnarySequence(K, 3, True), [K, K, K, 0, 1, 2, 3], "breaks the grammar"),
        (UnarySequence(K, 3, False), [K, 0, K, 1, K, 2, K], "site 0 of 4 has no code"),
        (RunLengthSequence(K, 3, True), [K, K, 0, 1, 2, 3], "breaks the grammar"),
        (RunLengthSequence(K, 3, False), [K, 0, K, 1, 2, 3, 4], "breaks the grammar"),
        (RasterSequence(K), [0, 1, 2, 9], "token 9 at position 3 is outside the vocabulary of 5"),
        (RasterSequence(K), [0, -1, 2, 3], "the end at position 1 breaks the grammar"),
        (RasterSequence(K, 2), [0, 1, 2, 3, 4, 0, 1], "the end at position 7 breaks the grammar"),
        (UnarySequence(K, 3, True), [0, 1, 2, K, K], "site 3 of 4: code 5 at turn 1"),
    ],
)
def test_other_sequences_are_refused(sequence: TokenSequence, tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence.decode(torch.tensor([tokens]), (2, 2))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NOTATIONS)
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, database=None, derandomize=True)
def test_any_input_is_refused_or_comes_back(name: str, check: str, rng) -> None:
    CHECKS[check](rng, draw_sequence(rng, name))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NOTATIONS)
def test_many_inputs_are_right_and_many_are_refused(name: str, check: str) -> None:
    counts = count(name, check, n=150)
    assert not counts["wrong"] and min(counts["right"], counts["refused"]) > 30


@pytest.mark.parametrize("turns", [1, 3])
def test_an_empty_batch_has_codes_and_tokens(turns: int) -> None:
    sequence = UnarySequence(K, turns, False)
    tokens, lengths = sequence.encode(torch.zeros(0, *GRID, turns, dtype=torch.int64))
    assert tokens.shape == (0, 0) and lengths.shape == (0,)
    assert sequence.decode(tokens, GRID).shape == (0, *GRID, turns)


@pytest.mark.parametrize("grid", [(1 << 20, 1 << 20), (1 << 16, 1 << 14), (0, 4), (-1, -4), (4,)])
def test_grids_are_refused_before_anything_is_allocated(grid: tuple) -> None:
    with pytest.raises(ValueError, match="grid|too few"):
        RasterSequence(K).decode(torch.zeros(1, 4, dtype=torch.int64), grid)
