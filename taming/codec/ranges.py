"""A range coder over rows of integer frequencies (Martin 1979), the same bytes on every machine.

The coder is constriction's, with words of 32 bits and 24 bits of precision. It takes floating-point
weights, scales them to 2**24 less one for each symbol, and adds those ones back. A frequency f of a
row that sums to 2**16 is therefore handed over as 256 f - 1: the scale is then exactly 1, every sum
is a whole number of at most 24 bits, and the probability that is coded is exactly f / 2**16,
whatever machine or release adds up. Rows may also sum to 2**24, where f - 1 is handed over.

Axis letters: N symbols, V different symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOTAL = 1 << 16  # sum of a row of frequencies; also the most symbols of a row
FINE_TOTAL = 1 << 24  # the other sum, for rows that are known in advance
_MOST_WEIGHTS = 1 << 24  # handed over at once: 64 MiB


def _stream() -> Any:
    """Import constriction when it is first used; return its module of stream coders."""
    import constriction

    module: Any = constriction  # compiled, without types
    return module.stream


def _check_form(frequencies: Tensor, count: int) -> None:
    """Refuse what is not (N, V) or (V,) integers for N = ``count`` symbols, with a ValueError."""
    if frequencies.dtype != torch.int64 or frequencies.ndim not in (1, 2):
        got = f"{frequencies.dtype} {tuple(frequencies.shape)}"
        raise ValueError(f"frequencies must be int64 (N, V) or (V,), got {got}")
    if not 1 <= (values := frequencies.shape[-1]) <= TOTAL:
        raise ValueError(f"a row has 1 to {TOTAL} frequencies, got {values}")
    if frequencies.ndim == 2 and len(frequencies) != count:
        raise ValueError(f"{len(frequencies)} rows of frequencies for {count} symbols")


def _weights_of(frequencies: Tensor) -> np.ndarray:
    """Check the values of frequencies (N, V); return constriction's weights for them, float32."""
    sums = frequencies.sum(dim=1)
    total = int(sums[0])
    if total not in (TOTAL, FINE_TOTAL) or (sums != total).any() or (frequencies < 1).any():
        sizes = f"all to {TOTAL} or all to {FINE_TOTAL}"
        raise ValueError(f"frequencies must be at least 1 and rows must sum to one size, {sizes}")
    return (frequencies * (FINE_TOTAL // total) - 1).to("cpu", torch.float32).numpy()


def _models(frequencies: Tensor, count: int) -> Iterator[tuple[int, Any, list[np.ndarray]]]:
    """Turn frequencies of ``count`` symbols into parts that take little memory each.

    Yields:
        The symbols of a part, constriction's model, and the weights by symbol where rows differ:
        one row for all gives the same bytes as the same row for each. Nothing for symbols that
        take no bits.

    Raises:
        ValueError: A value is not one of frequencies.
    """
    values, family = frequencies.shape[-1], _stream().model.Categorical
    rows = frequencies[None] if frequencies.ndim == 1 else frequencies
    for part in rows.split(max(_MOST_WEIGHTS // values, 1)) if count else ():
        weights = _weights_of(part)
        if values == 1:
            continue
        if frequencies.ndim == 1:
            yield count, family(weights[0], lazy=False, perfect=False), []
        else:
            yield len(part), family(lazy=True, perfect=False), [weights]


class Encoder:
    """Encoder of symbols one after the other.

    Example:
        >>> frequencies = torch.tensor([[60000, 5000, 536], [30000, 30000, 5536]])
        >>> encoder = Encoder()
        >>> encoder.push(torch.tensor([0, 2]), frequencies)
        >>> encoder.push(torch.tensor([0, 0, 1, 0]), frequencies[0])
        >>> decoder = Decoder(encoder.bytes())
        >>> decoder.pull(frequencies).tolist(), decoder.pull(frequencies[0], 4).tolist()
        ([0, 2], [0, 0, 1, 0])
    """

    def __init__(self) -> None:
        self._coder = _stream().queue.RangeEncoder()

    def push(self, symbols: Tensor, frequencies: Tensor) -> None:
        """Encode symbols.

        Args:
            symbols: (N,) integers in 0..V-1.
            frequencies: (N, V) int64, or one row (V,) for all; each at least 1, and rows of sum
                2**16, or all of sum 2**24. A symbol of frequency f takes 16 (24) - log2 f bits.

        Raises:
            ValueError: They are not such symbols and frequencies.
        """
        _check_form(frequencies, len(symbols))
        values = frequencies.shape[-1]
        if symbols.ndim != 1 or ((symbols < 0) | (symbols >= values)).any():
            raise ValueError(f"symbols must be (N,), in 0..{values - 1}")
        numbers, done = symbols.to("cpu", torch.int32).numpy(), 0
        for count, model, weights in _models(frequencies, len(symbols)):
            self._coder.encode(numbers[done : done + count], model, *weights)
            done += count

    def bytes(self) -> bytes:
        """Return all symbols so far as bytes: words of 32 bits, the low byte first."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Decoder of what an `Encoder` encoded, with the same frequencies in the same order.

    Args:
        data: Bytes of `Encoder.bytes`.

    Raises:
        ValueError: They are not whole words.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise ValueError(f"{len(data)} bytes are not whole words of 4 bytes")
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        self._coder = _stream().queue.RangeDecoder(words)

    def pull(self, frequencies: Tensor, count: int | None = None) -> Tensor:
        """Decode symbols.

        Args:
            frequencies: As for `Encoder.push`.
            count: N, needed for one row (V,).

        Returns:
            (N,) int64, on the CPU.

        Raises:
            ValueError: No symbols give such bytes with these frequencies; or they are no such
                frequencies as `Encoder.push` takes.
        """
        count = len(frequencies) if count is None and frequencies.ndim else count or 0
        _check_form(frequencies, count)
        symbols = []
        for number, model, weights in _models(frequencies, count):
            try:  # with weights, their number is that of the symbols
                symbols.append(self._coder.decode(model, *(weights or [number])))
            except (AssertionError, ValueError) as error:  # which one depends on the release
                raise ValueError("the bytes are not those of an encoder") from error
        if not symbols:  # symbols of no bits
            return torch.zeros(count, dtype=torch.int64)
        return torch.from_numpy(np.concatenate(symbols).astype(np.int64))

    def close(self) -> None:
        """Refuse bytes that are left over after the last symbol, with a ValueError."""
        if not self._coder.maybe_exhausted():
            raise ValueError("bytes are left over after the last symbol")
