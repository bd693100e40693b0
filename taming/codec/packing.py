"""Symbols as whole bits, without any entropy model.

Axis letters: N symbols.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def width_of(values: int) -> int:
    """Return ceil(log2 V), the bits of one of V symbols; 0 for V = 1."""
    return (values - 1).bit_length()


class BitEncoder:
    """Encoder of symbols as whole bits, the high bit first.

    Example:
        >>> encoder = BitEncoder()
        >>> encoder.push(torch.tensor([5, 0]), 6)
        >>> encoder.bytes().hex()  # 101 000, and zeros to the end of the byte
        'a0'
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def push(self, symbols: Tensor, values: int) -> None:
        """Encode symbols (N,), integers in 0..values-1, as `width_of` bits each."""
        shifts = np.arange(width_of(values))[::-1]
        numbers = symbols.cpu().numpy().astype(np.int64)
        self._parts.append((numbers[:, None] >> shifts & 1).astype(np.uint8).reshape(-1))

    def bytes(self) -> bytes:
        """Return all symbols so far as bytes; the last is filled with zeros."""
        return np.packbits(np.concatenate([np.zeros(0, np.uint8), *self._parts])).tobytes()


class BitDecoder:
    """Decoder of what a `BitEncoder` encoded, with the same numbers in the same order.

    Args:
        data: Bytes of `BitEncoder.bytes`.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._done = np.frombuffer(data, np.uint8), 0

    def pull(self, values: int, count: int) -> Tensor:
        """Decode ``count`` symbols of 0..values-1: (N,) int64.

        Raises:
            ValueError: There are too few bytes, or a symbol is too large.
        """
        width = width_of(values)
        first, self._done = self._done, self._done + count * width
        if self._done > 8 * len(self._data):
            needed = f"{count} symbols of {width} bits from bit {first}"
            raise ValueError(f"{len(self._data)} bytes are too few for {needed}")
        bits = np.unpackbits(self._data[first // 8 : -(-self._done // 8)])
        bits = bits[first % 8 : first % 8 + count * width].reshape(count, width)
        symbols = bits.astype(np.int64) @ (1 << np.arange(width)[::-1])  # (N,)
        if (wrong := symbols >= values).any():
            place = int(wrong.argmax())
            raise ValueError(f"symbol {place} is {symbols[place]}, of {values} from 0")
        return torch.from_numpy(symbols)

    def close(self) -> None:
        """Refuse bytes that are left over, and bits that no encoder sets, with a ValueError."""
        used = -(-self._done // 8)
        if used < len(self._data):
            raise ValueError(f"{len(self._data) - used} bytes are left over after the last symbol")
        if self._done % 8 and self._data[-1] & (0xFF >> self._done % 8):
            raise ValueError("bits are set after the last symbol")
