"""The range coder: symbols come back, in as many bits as they are rare, by the same bytes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from taming.codec import ranges
from taming.codec.ranges import FINE_TOTAL, TOTAL, Decoder, Encoder


def random_rows(count: int, values: int, total: int = TOTAL, seed: int = 0) -> Tensor:
    """Rows of frequencies, from nearly uniform to very uneven."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(count, 1, generator=generator) * 12
    weights = torch.rand(count, values, generator=generator, dtype=torch.float64) ** power
    rows = 1 + (weights / weights.sum(dim=1, keepdim=True) * (total - values)).floor().long()
    rows[:, 0] += total - rows.sum(dim=1)
    return rows


def extreme_rows(values: int, total: int = TOTAL) -> Tensor:
    """Two rows of which one symbol, the first or the last, has all that it can have."""
    rows = torch.ones(2, values, dtype=torch.int64)
    rows[0, 0] = rows[1, -1] = total - values + 1
    return rows


def sample(rows: Tensor, seed: int = 0) -> Tensor:
    return torch.multinomial(rows.double(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def encode(symbols: Tensor, rows: Tensor) -> bytes:
    encoder = Encoder()
    encoder.push(symbols, rows)
    return encoder.bytes()


def interval(symbols: Tensor, rows: Tensor) -> tuple[int, int, int]:
    """First number and size of the interval that a range coder of exact integers ends with.

    The recursion of Martin (1979) with 64 bits of range and 24 of share; and the number's words.
    """
    low, size, words = 0, 2**64 - 1, 2
    for symbol, row in zip(symbols.tolist(), rows.tolist(), strict=True):
        share = (size >> 24) * (FINE_TOTAL // sum(row))
        low, size = low + share * sum(row[:symbol]), share * row[symbol]
        if size < 2**32:
            low, size, words = low << 32, size << 32, words + 1
    return low, size, words


def bits_of(symbols: Tensor, rows: Tensor) -> float:
    share = rows.gather(1, symbols[:, None]).double() / rows.sum(dim=1, keepdim=True)
    return float(-share.log2().sum())


@pytest.mark.parametrize("total", [TOTAL, FINE_TOTAL])
@pytest.mark.parametrize("values", [1, 2, 3, 10, 255, 4096, 10000, TOTAL])
def test_symbols_come_back_and_take_the_bits_of_their_frequencies(values: int, total: int) -> None:
    count = min(500, 500_000 // values)
    rows = torch.cat([random_rows(count, values, total), extreme_rows(values, total)])
    symbols = sample(rows)
    symbols[-2:] = values - 1  # the rarest, then the most frequent
    data = encode(symbols, rows)
    decoder = Decoder(data)
    assert torch.equal(decoder.pull(rows), symbols)
    decoder.close()
    assert 8 * len(data) <= 1.01 * bits_of(symbols, rows) + 8 * 32


@pytest.mark.parametrize("values", [2, 7, 300])
def test_the_probabilities_coded_are_exactly_the_frequencies(values: int) -> None:
    rows = torch.cat([random_rows(200, values), extreme_rows(values)])
    symbols = torch.cat([sample(rows[:-2]), torch.tensor([values - 1, 0])])
    low, size, words = interval(symbols, rows)
    data = encode(symbols, rows)
    number = int.from_bytes(np.frombuffer(data, "<u4").astype(">u4").tobytes(), "big")
    assert low <= number << 32 * (words - len(data) // 4) < low + size


@pytest.mark.parametrize("frequent", [0, 5])
def test_a_frequent_symbol_costs_nearly_nothing_and_a_rare_one_its_16_bits(frequent: int) -> None:
    row = torch.ones(6, dtype=torch.int64)
    row[frequent] = TOTAL - 5
    symbols = torch.full((100_000,), frequent)
    assert 8 * len(encode(symbols, row)) <= 100_000 * -math.log2(1 - 5 / TOTAL) * 1.01 + 64
    symbols = torch.full((1000,), 2)
    assert 16_000 <= 8 * len(encode(symbols, row)) <= 16_064


def test_one_row_for_all_gives_the_bytes_of_the_same_row_for_each() -> None:
    row = random_rows(1, 40)[0]
    rows = row.repeat(300, 1)
    symbols = sample(rows)
    data = encode(symbols, row)
    assert data == encode(symbols, rows)
    assert torch.equal(Decoder(data).pull(row, 300), symbols)


def test_any_cut_into_calls_and_parts_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(100, 50)
    symbols = sample(rows)
    whole, encoder = encode(symbols, rows), Encoder()
    monkeypatch.setattr(ranges, "_MOST_WEIGHTS", 150)
    for part, own in zip(symbols.split(7), rows.split(7), strict=True):
        encoder.push(part, own)
    encoder.push(symbols[:0], rows[:0])
    assert encoder.bytes() == whole == encode(symbols, rows)
    decoder = Decoder(whole)
    assert torch.equal(torch.cat([decoder.pull(part) for part in rows.split(13)]), symbols)
    assert len(decoder.pull(rows[:0])) == 0


def arithmetic(count: int, values: int) -> tuple[Tensor, Tensor]:
    """Symbols and frequencies that no generator of random numbers can change."""
    weights = torch.arange(count * values).view(count, values) ** 2 % 1009
    rows = 1 + weights * (TOTAL - values) // weights.sum(dim=1, keepdim=True)
    rows[:, -1] += TOTAL - rows.sum(dim=1)
    return torch.arange(count) ** 3 % values, rows


# Of this machine's first run; every other machine and release must write and read the same.
STORED = {
    (12, 5): "3f2f0000b6cc1d42",
    (9, 300): "5c0000006b7ab8396c2bf711",
}


@pytest.mark.parametrize("sizes", list(STORED), ids=str)
def test_the_bytes_are_those_that_are_stored(sizes: tuple[int, int]) -> None:
    symbols, rows = arithmetic(*sizes)
    stored = bytes.fromhex(STORED[sizes])
    assert torch.equal(Decoder(stored).pull(rows), symbols)
    assert encode(symbols, rows) == stored


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((3, 4), TOTAL / 4), "int64"),
        (torch.tensor(TOTAL), r"\(N, V\)"),
        (torch.tensor([[TOTAL, 0]] * 3), "at least 1"),
        (torch.tensor([[TOTAL + 1, -1]] * 3), "at least 1"),
        (torch.tensor([[TOTAL - 2, 1]] * 3), str(TOTAL)),
        (torch.tensor([[TOTAL - 1, 1], [FINE_TOTAL - 1, 1], [TOTAL - 1, 1]]), "one size"),
        (torch.tensor([[TOTAL - 1, 1]] * 2), "2 rows of frequencies for 3 symbols"),
        (
            torch.ones(3, TOTAL + 1, dtype=torch.int64),
            "a row has 1 to 65536 frequencies, got 65537",
        ),
        (torch.ones(3, 0, dtype=torch.int64), "got 0"),
    ],
)
def test_what_is_not_frequencies_is_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder().push(torch.zeros(3, dtype=torch.int64), rows)
    with pytest.raises(ValueError, match=message):
        Decoder(bytes(8)).pull(rows, 3)


@pytest.mark.parametrize("symbols", [[0, 2], [-1, 0], [[0, 0], [0, 0]]])
def test_what_is_not_symbols_is_refused(symbols: list[int]) -> None:
    with pytest.raises(ValueError, match=r"symbols must be \(N,\), in 0..1"):
        Encoder().push(torch.tensor(symbols), torch.tensor([TOTAL - 1, 1]))


def test_bytes_that_are_left_over_are_refused() -> None:
    rows = random_rows(50, 9)
    decoder = Decoder(encode(sample(rows), rows) + bytes(range(12)))
    decoder.pull(rows)
    with pytest.raises(ValueError, match="left over"):
        decoder.close()
    with pytest.raises(ValueError, match="5 bytes are not whole words"):
        Decoder(bytes(5))
