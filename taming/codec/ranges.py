"""A range coder over rows of integer frequencies (Martin 1979), the same bytes on every machine.

The coder is constriction's, with words of 32 bits and 24 bits of precision. It takes floating-point
weights, scales them to 2**24 less one for each symbol, and adds those ones back. A frequency f is
therefore handed over as 256 f - 1: the scale is then exactly 1, every sum is a whole number below
2**24, and the probability that is coded is exactly f / 2**16, whatever machine or release adds up.

Axis letters: N symbols, V different symbols.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PRECISION = 16
TOTAL = 1 << PRECISION  # sum of a row of frequencies; also the most symbols that a row can tell
_STEP = 1 << (24 - PRECISION)  # of constriction's probabilities to one of ours
_MOST_WEIGHTS = 1 << 24  # handed over at once: 64 MiB


def _stream() -> Any:
    """Import constriction when it is first used; return its module of stream coders."""
    import constriction

    module: Any = constriction  # compiled, without types
    return module.stream


def _check(frequencies: Tensor) -> None:
    """Refuse what is not rows of frequencies (N, V)."""
    if frequencies.dtype != torch.int64 or frequencies.ndim != 2 or not frequencies.shape[1]:
        got = f"{frequencies.dtype} {tuple(frequencies.shape)}"
        raise ValueError(f"frequencies must be int64 (N, V), got {got}")
    if frequencies.shape[1] > TOTAL:
        most = f"a row of frequencies tells at most {TOTAL} symbols apart"
        raise ValueError(f"{most}, got {frequencies.shape[1]}")
    rows = frequencies[:1] if _is_shared(frequencies) else frequencies
    if (rows < 1).any() or (rows.sum(dim=1) != TOTAL).any():
        raise ValueError(f"frequencies must be at least 1 and each row must sum to {TOTAL}")


def _is_shared(frequencies: Tensor) -> bool:
    """Return True for one row that is expanded to several symbols."""
    return len(frequencies) > 1 and frequencies.stride(0) == 0


def _model(frequencies: Tensor) -> tuple[Any, list[np.ndarray]]:
    """Turn rows (N, V) into constriction's model, and the weights by symbol where rows differ.

    The two ways give the same bytes: a model of one row is only built once.
    """
    categorical = _stream().model.Categorical
    shared = _is_shared(frequencies)
    rows = frequencies[:1] if shared else frequencies
    weights = (rows * _STEP - 1).to("cpu", torch.float32).numpy()
    if shared:
        return categorical(weights[0], lazy=False, perfect=False), []
    return categorical(lazy=True, perfect=False), [weights]


def _parts(frequencies: Tensor) -> list[Tensor]:
    """Cut rows (N, V) so that a part's weights take little memory; one shared row stays whole."""
    if _is_shared(frequencies):
        return [frequencies]
    return list(frequencies.split(max(_MOST_WEIGHTS // frequencies.shape[1], 1)))


class Encoder:
    """Encoder of symbols one after the other.

    Example:
        >>> frequencies = torch.tensor([[60000, 5000, 536]]).expand(4, -1)
        >>> encoder = Encoder()
        >>> encoder.push(torch.tensor([0, 0, 2, 0]), frequencies)
        >>> Decoder(encoder.bytes()).pull(frequencies).tolist()
        [0, 0, 2, 0]
    """

    def __init__(self) -> None:
        self._coder = _stream().queue.RangeEncoder()

    def push(self, symbols: Tensor, frequencies: Tensor) -> None:
        """Encode symbols.

        Args:
            symbols: (N,) integers in 0..V-1.
            frequencies: (N, V) int64, each at least 1, of sum 2**16; symbol v of a row takes
                16 - log2 frequencies[v] bits. One row expanded to N is looked at once.

        Raises:
            ValueError: They are not such symbols and frequencies.
        """
        _check(frequencies)
        values = frequencies.shape[1]
        if symbols.shape != frequencies.shape[:1]:
            raise ValueError(f"{len(frequencies)} rows for symbols {tuple(symbols.shape)}")
        if ((symbols < 0) | (symbols >= values)).any():
            raise ValueError(f"symbols must be in 0..{values - 1}")
        if values == 1 or not len(symbols):  # nothing to tell
            return
        numbers, done = symbols.to("cpu", torch.int32).numpy(), 0
        for part in _parts(frequencies):
            model, weights = _model(part)
            self._coder.encode(numbers[done : done + len(part)], model, *weights)
            done += len(part)

    def bytes(self) -> bytes:
        """Return all symbols so far as bytes, words of 32 bits with the low byte first."""
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

    def pull(self, frequencies: Tensor) -> Tensor:
        """Decode one symbol for each row of frequencies (N, V): (N,) int64, on the CPU.

        Raises:
            ValueError: No symbols and these frequencies give such bytes; or they are no such
                frequencies as `Encoder.push` takes.
        """
        _check(frequencies)
        if frequencies.shape[1] == 1 or not len(frequencies):
            return torch.zeros(len(frequencies), dtype=torch.int64)
        symbols = []
        for part in _parts(frequencies):
            model, weights = _model(part)
            count = [] if weights else [len(part)]
            try:
                symbols.append(self._coder.decode(model, *weights, *count))
            except (AssertionError, ValueError) as error:  # which one depends on the release
                raise ValueError("the bytes are not those of an encoder") from error
        return torch.from_numpy(np.concatenate(symbols).astype(np.int64))

    def close(self) -> None:
        """Refuse bytes that are left over after the last symbol, with a ValueError."""
        if not self._coder.maybe_exhausted():
            raise ValueError("bytes are left over after the last symbol")
