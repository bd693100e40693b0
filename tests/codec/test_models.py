"""Entropy models: codes come back from their segments, and the first segments give fewer turns."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.codec import cut, integers, tables, valid_codes

from taming.codec.models import UNIFORM, ByTurns, Raw, Static, frequencies_of
from taming.codec.ranges import FINE_TOTAL
from taming.modules.vqvae.checks import mark_impossible

MODELS: dict[str, Callable[[int, int, bool], ByTurns]] = {
    "raw": lambda turns, n_e, dummies: Raw(turns, n_e, dummies),
    "static": lambda turns, n_e, dummies: Static(tables(turns, n_e), dummies),
}
every_model = pytest.mark.parametrize("name", list(MODELS))
GRIDS = [(1, 1), (1, 7), (5, 1), (4, 6), (16, 24)]


@pytest.fixture(params=[1, 2, 4], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@every_model
@pytest.mark.parametrize("dummies", [False, True])
@pytest.mark.parametrize("n_e", [1, 2, 16, 1000, 5000])
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_codes_come_back(name: str, turns: int, n_e: int, dummies: bool) -> None:
    model = MODELS[name](turns, n_e, dummies)
    for seed, grid in enumerate(GRIDS):
        codes = valid_codes(grid, turns, n_e, dummies, seed)
        segments = list(model.encode(codes))
        assert len(segments) == int((codes >= 0).sum(dim=-1).max())
        assert torch.equal(model.decode(segments, grid), codes)


@every_model
@pytest.mark.parametrize("n_e", [2, 300])
def test_the_first_segments_give_the_codes_cut_to_their_turns(name: str, n_e: int) -> None:
    model = MODELS[name](5, n_e, False)
    assert model.progressive
    for grid in GRIDS:
        codes = valid_codes(grid, 5, n_e)
        segments = list(model.encode(codes))
        for turns in range(1, len(segments) + 1):
            assert torch.equal(model.decode(segments[:turns], grid), cut(codes, turns))


@every_model
def test_codes_that_end_in_their_one_code_cannot_be_cut(name: str) -> None:
    model = MODELS[name](4, 16, True)
    segments = list(model.encode(valid_codes((4, 6), 4, 16, True)))
    assert not model.progressive and len(segments) == 4
    for turns in range(1, 4):
        with pytest.raises(ValueError, match="sites have not ended"):
            model.decode(segments[:turns], (4, 6))


@pytest.mark.parametrize("n_e", [1, 2, 16, 1000, 1 << 20])
def test_raw_segments_have_a_bit_for_each_end_and_whole_bits_for_each_code(n_e: int) -> None:
    codes = valid_codes((9, 7), 4, n_e)
    taken = (codes >= 0).sum(dim=(0, 1)).tolist()
    width = math.ceil(math.log2(n_e))
    bits = [taken[0] * width, *(a + b * width for a, b in zip(taken, taken[1:], strict=False))]
    sizes = [len(segment) for segment in Raw(4, n_e, False).encode(codes)]
    assert sizes == [math.ceil(number / 8) for number in bits]


@pytest.mark.parametrize("dummies", [False, True])
@pytest.mark.parametrize("n_e", [2, 64, 4096])
def test_static_segments_have_the_bits_of_the_tables(n_e: int, dummies: bool) -> None:
    turns, shares = 4, tables(4, n_e)
    codes = valid_codes((40, 50), turns, n_e, dummies)
    size = sum(len(segment) for segment in Static(shares, dummies).encode(codes))
    each = (shares.codes.double() * (1 - UNIFORM) + UNIFORM / n_e).log2()  # (T, K)
    on = (shares.going_on.double() * (1 - UNIFORM) + UNIFORM / 2).log2()
    end = ((1 - shares.going_on.double()) * (1 - UNIFORM) + UNIFORM / 2).log2()
    bits = 0.0
    for turn, column in enumerate(codes.flatten(0, 1).unbind(1)):
        written = column[(column >= 0) & (column < n_e)]
        bits -= float(each[turn][written].sum())
        if turn < turns - 1:
            after = codes[..., turn + 1].flatten()[column >= 0] >= 0
            bits -= float(torch.where(after, on[turn], end[turn]).sum())
    assert bits / 8 * 0.99 - 8 <= size <= bits / 8 * 1.01 + 32


@every_model
def test_the_bytes_are_those_that_are_stored_whatever_the_threads(name: str, threads: None) -> None:
    codes = valid_codes((3, 5), 3, 20)
    stored = [bytes.fromhex(segment) for segment in STORED[name]]
    model = MODELS[name](3, 20, False)
    assert torch.equal(model.decode(stored, (3, 5)), codes)
    assert list(model.encode(codes)) == stored
    assert model.fingerprint().hex() == FINGERPRINTS[name]


# Of the first run; every other machine and release must write and read the same.
STORED = {
    "raw": ["02c212410718ca131a00", "bf2474a26a3a0240", "9e008a7140"],
    "static": ["9aa971187fac945b0deba58c", "bdc214be3cbb562669075902", "2f2e9d8da8d9cdc6"],
}
FINGERPRINTS = {"raw": "00000000", "static": "859cd793"}


@every_model
@pytest.mark.parametrize("dummies", [False, True])
def test_any_bytes_are_refused_or_give_valid_codes(name: str, dummies: bool) -> None:
    model, outcomes = MODELS[name](3, 12, dummies), []
    own = list(model.encode(valid_codes((4, 5), 3, 12, dummies)))
    for seed in range(300):
        segments = [bytearray(segment) for segment in own]
        for place, value in integers(2 * (seed % 3) + 2, 1 << 16, seed).view(-1, 2).tolist():
            segment = segments[place % len(segments)]
            segment[value % len(segment)] ^= 1 << value // 256 % 8
        grid = [(4, 5), (5, 5), (1, 1), (2, 4)][seed % 4 if seed % 2 else 0]
        try:
            codes = model.decode([bytes(segment) for segment in segments], grid)
        except ValueError:
            outcomes.append("refused")
            continue
        assert codes.shape == (*grid, 3)
        mark_impossible(codes.flatten(0, 1), 12, dummies)  # refuses others
        outcomes.append("valid")
    assert outcomes.count("refused") > 30


@every_model
def test_what_is_wrong_with_segments_is_named(name: str) -> None:
    model = MODELS[name](3, 12, False)
    segments = list(model.encode(valid_codes((4, 5), 3, 12)))
    with pytest.raises(ValueError, match="0 segments for 3 turns"):
        model.decode([], (4, 5))
    with pytest.raises(ValueError, match="4 segments for 3 turns"):
        model.decode([*segments, b""], (4, 5))
    with pytest.raises(ValueError, match="segment 2 is of no such picture: .* left over"):
        model.decode([segments[0], segments[1] + bytes(range(1, 17)), segments[2]], (4, 5))
    with pytest.raises(ValueError, match="segment 2 is of no such picture: no site takes its turn"):
        model.decode([segments[0], nothing_goes_on(model)], (4, 5))


def nothing_goes_on(model: ByTurns) -> bytes:
    """A segment in which none of 20 sites takes the second turn."""
    coder = model.encoder()
    coder.push(torch.zeros(20, dtype=torch.int64), model.ends[0])
    return coder.bytes()


def test_raw_refuses_codes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="symbol 0 is 15, of 12 from 0"):
        Raw(1, 12, False).decode([b"\xf0"], (1, 1))
    with pytest.raises(ValueError, match="bits are set after"):
        Raw(1, 12, False).decode([b"\x01"], (1, 1))
    with pytest.raises(ValueError, match="1 bytes are too few for 3 symbols of 4 bits"):
        Raw(1, 12, False).decode([b"\x01"], (1, 3))


@every_model
@pytest.mark.parametrize(
    "codes", [[[-1, 3]], [[3, 12]], [[12, 3]], [[3, -2]]], ids=["none", "D", "dummy", "other"]
)
def test_codes_of_no_loop_are_refused(name: str, codes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        list(MODELS[name](2, 12, False).encode(torch.tensor([codes])))


# --- tables to frequencies -----------------------------------------------------------------------


@pytest.mark.parametrize("values", [1, 2, 3, 1000, 1 << 16])
def test_frequencies_are_whole_and_near_the_shares(values: int) -> None:
    shares = integers(values, 1 << 20).float() + 1
    shares = shares / shares.sum()
    frequencies = frequencies_of(shares)
    assert int(frequencies.sum()) == FINE_TOTAL and int(frequencies.min()) >= 1
    mixed = shares.double() * (1 - UNIFORM) + UNIFORM / values
    expected = mixed / mixed.sum() * (FINE_TOTAL - values) + 1
    assert float((frequencies - expected).abs().max()) <= 1


def test_frequencies_of_extremes() -> None:
    assert frequencies_of(torch.zeros(3)).tolist() == [5592406, 5592405, 5592405]
    least = frequencies_of(one_hot(1 << 16))
    assert int(least.min()) >= 1 and float(least[7]) / FINE_TOTAL > 0.98
    assert torch.equal(frequencies_of(one_hot(4)), frequencies_of(one_hot(4).half()))


def one_hot(values: int) -> torch.Tensor:
    shares = torch.zeros(values)
    shares[7 % values] = 1
    return shares


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.5, math.inf])
def test_damaged_tables_are_refused(value: float) -> None:
    own = tables(2, 4)
    own.codes[1, 2] = value
    with pytest.raises(ValueError, match="outside"):
        Static(own, False)


def test_more_codes_than_a_table_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 65536 codes, got 65537: use raw"):
        frequencies_of(torch.zeros((1 << 16) + 1))


def test_models_are_told_apart_by_their_tables() -> None:
    def fingerprint(**changes: Any) -> bytes:
        own = SimpleNamespace(**{**vars(tables(3, 10)), **changes})
        return Static(own, False).fingerprint()

    other = tables(3, 10).going_on
    other[0] += 0.01
    assert len({fingerprint(), fingerprint(codes=tables(3, 10).codes.flip(1))}) == 2
    assert len({fingerprint(), fingerprint(going_on=other)}) == 2
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize("n_e", [2, 16, 300])
def test_raw_writes_no_ends_where_there_is_nothing_to_choose(n_e: int) -> None:
    raw, codes = Raw(3, n_e, False, fixed_length=True), torch.randint(n_e, (4, 6, 3))
    segments = list(raw.encode(codes))
    assert [len(segment) for segment in segments] == [
        math.ceil(24 * math.ceil(math.log2(n_e)) / 8)
    ] * 3
    assert torch.equal(raw.decode(segments, (4, 6)), codes)
    assert torch.equal(raw.decode(segments[:2], (4, 6)), cut(codes, 2))
    assert raw.fingerprint() != Raw(3, n_e, False).fingerprint()
