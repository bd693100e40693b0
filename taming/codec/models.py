"""Entropy models: codes of a picture to segments of bytes, one for each turn, and back.

Segment n holds, for each site that took turn n - 1, whether it goes on (n >= 1), then the codes of
turn n of the sites that take it, both in raster order. Where a site writes dummies and its one code
at the end, segment n holds, for each site that takes turn n, whether it goes on (but at turn T - 1,
where none does), then the codes of those that end.

Axis letters: h w grid, T turns, K codes, N sites, V different symbols.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from taming.codec.packing import BitDecoder, BitEncoder
from taming.codec.ranges import FINE_TOTAL, TOTAL, Decoder, Encoder
from taming.modules.vqvae.checks import ABSENT, mark_impossible
from taming.modules.vqvae.entropy import UNIFORM


class EntropyModel(ABC):
    """A way to write codes as bytes.

    Attributes:
        mode: Byte that names the way in a file.
        progressive: True if the first segments decode without the others, to fewer turns.
    """

    mode: int
    progressive: bool = True

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Return 4 bytes that another model, whose bytes would decode to other codes, has not."""

    @abstractmethod
    def encode(self, codes: Any) -> Iterator[bytes]:
        """Encode the codes of a picture.

        Args:
            codes: (h, w, T) int64 that the quantizer's loop produces, -1 after a site's end; of
                several levels, a tuple, the top first.

        Yields:
            One segment for each turn that a site takes: at least one, at most T.
        """

    @abstractmethod
    def decode(self, segments: Sequence[bytes], grid: tuple[int, int]) -> Any:
        """Decode as many turns as there are segments.

        Args:
            segments: The first of those that `encode` gave, at least one, at most T.
            grid: (h, w), of at least one site; of several levels, that of the top.

        Returns:
            The codes as `encode` takes them, cut to the turns that there are.

        Raises:
            ValueError: The bytes are not those of such a grid and model.
        """


class Tables(Protocol):
    """Shares by turn, which the quantizer keeps while it trains.

    Attributes:
        codes: (T, K) floats, share of each code among those written at a turn.
        going_on: (T,) floats, share of the sites of a turn that go on to the next.
    """

    codes: Tensor
    going_on: Tensor


def frequencies_of(shares: Tensor) -> Tensor:
    """Turn shares into frequencies by a rule that gives the same integers on every machine.

    Shares are mixed with `UNIFORM` of the uniform one and counted in units of 2**-38, rounded
    down: w. Each symbol gets one of the 2**24, and the others in proportion to w, rounded down.
    What is then left is given one each to the first symbols.

    Args:
        shares: (V,) floats in [0, 1], at most 2**16; they need not sum to 1.

    Returns:
        (V,) int64, each at least 1, of sum 2**24.

    Raises:
        ValueError: They are not such shares.
    """
    values = len(shares)
    if not 1 <= values <= TOTAL:
        raise ValueError(f"tables are of at most {TOTAL} codes, got {values}: use raw")
    shares = shares.detach().cpu().double()
    if not ((shares >= 0) & (shares <= 1)).all():  # False for NaN as well
        raise ValueError("the entropy tables hold shares outside [0, 1]: are they damaged?")
    # Two steps, so that no machine fuses them into one with another rounding.
    mixed = shares * (1 - UNIFORM)
    mixed = mixed + UNIFORM / values
    weights = (mixed * 2.0**38).floor().long()
    frequencies = 1 + weights * (FINE_TOTAL - values) // weights.sum()
    frequencies[: FINE_TOTAL - int(frequencies.sum())] += 1
    return frequencies


class ByTurns(EntropyModel):
    """Model to which all sites of a turn are alike.

    A *way* of a symbol is what a coder's ``push`` and ``pull`` take.

    Args:
        max_loops: T.
        n_e: K.
        dummies: True if a site writes dummies and its one code at its last turn.
        codes: T ways to write a code at each turn.
        ends: At least T - 1 ways to write whether a site goes on (1) after a turn, or ends (0).
        fixed_length: True if every site takes T turns: nothing is written of where it ends.
    """

    def __init__(
        self,
        max_loops: int,
        n_e: int,
        dummies: bool,
        codes: Sequence[Any],
        ends: Sequence[Any],
        fixed_length: bool = False,
    ) -> None:
        self.max_loops, self.n_e, self.dummies = max_loops, n_e, dummies
        self.fixed_length = fixed_length
        self.codes, self.ends = codes, ends
        self.progressive = not dummies

    @abstractmethod
    def encoder(self) -> Any:
        """Return a coder with ``push(symbols, way)`` and ``bytes()``."""

    @abstractmethod
    def decoder(self, data: bytes) -> Any:
        """Return a coder with ``pull(way, count)`` and ``close()``."""

    def encode(self, codes: Tensor) -> Iterator[bytes]:
        """Encode the codes (h, w, T) of a picture: one segment for each turn that a site takes."""
        sites = codes.cpu().flatten(0, 1)  # (N, T)
        mark_impossible(sites, self.n_e, self.dummies)
        for turn in range(int((sites >= 0).sum(dim=1).max())):
            coder = self.encoder()
            if self.dummies:
                goes_on = sites[:, turn] == self.n_e
                if turn < self.max_loops - 1:
                    coder.push(goes_on.long(), self.ends[turn])
                coder.push(sites[~goes_on, turn], self.codes[turn])
                sites = sites[goes_on]
            else:
                if turn and not self.fixed_length:
                    goes_on = sites[:, turn] >= 0
                    coder.push(goes_on.long(), self.ends[turn - 1])
                    sites = sites[goes_on]
                coder.push(sites[:, turn], self.codes[turn])
            yield coder.bytes()

    def decode(self, segments: Sequence[bytes], grid: tuple[int, int]) -> Tensor:
        """Decode as many turns as there are segments: codes (h, w, T) of a grid (h, w)."""
        if not 1 <= len(segments) <= self.max_loops:
            raise ValueError(f"{len(segments)} segments for {self.max_loops} turns")
        codes = torch.full((grid[0] * grid[1], self.max_loops), ABSENT)  # (N, T)
        sites = torch.arange(len(codes))
        for turn, data in enumerate(segments):
            try:
                sites = self._decode_turn(codes, sites, turn, data)
            except ValueError as error:
                raise ValueError(f"segment {turn + 1} is of no such picture: {error}") from error
        if self.dummies and len(sites):
            raise ValueError(
                f"{len(sites)} sites have not ended; this tokenizer's code of a site comes last, "
                "so its files cannot be cut to fewer turns"
            )
        return codes.view(*grid, self.max_loops)

    def _decode_turn(self, codes: Tensor, sites: Tensor, turn: int, data: bytes) -> Tensor:
        """Decode a segment into codes (N, T); return the sites (M,) that the next is about."""
        if not len(sites):
            raise ValueError("all sites have ended before it")
        coder = self.decoder(data)
        if self.dummies:
            goes_on = torch.zeros(len(sites), dtype=torch.bool)
            if turn < self.max_loops - 1:
                goes_on = coder.pull(self.ends[turn], len(sites)) > 0
            codes[sites[goes_on], turn] = self.n_e
            ends = sites[~goes_on]
            codes[ends, turn] = coder.pull(self.codes[turn], len(ends))
            sites = sites[goes_on]
        else:
            if turn and not self.fixed_length:
                sites = sites[coder.pull(self.ends[turn - 1], len(sites)) > 0]
                if not len(sites):
                    raise ValueError("no site takes its turn")
            codes[sites, turn] = coder.pull(self.codes[turn], len(sites))
        coder.close()
        return sites


class Raw(ByTurns):
    """Codes as ceil(log2 K) bits each, ends as one bit: no tables, and no code is ever costly.

    Args:
        max_loops: T.
        n_e: K.
        dummies: True if a site writes dummies and its one code at its last turn.
        fixed_length: True if every site takes T turns.

    Example:
        >>> raw = Raw(max_loops=2, n_e=16, dummies=False)
        >>> codes = torch.tensor([[[3, -1], [15, 1]]])
        >>> segments = list(raw.encode(codes))
        >>> [segment.hex() for segment in segments]
        ['3f', '44']
        >>> torch.equal(raw.decode(segments, (1, 2)), codes)
        True
        >>> raw.decode(segments[:1], (1, 2)).tolist()
        [[[3, -1], [15, -1]]]
    """

    mode = 0

    def __init__(self, max_loops: int, n_e: int, dummies: bool, fixed_length: bool = False) -> None:
        ways = [n_e] * max_loops, [2] * max_loops
        super().__init__(max_loops, n_e, dummies, *ways, fixed_length)

    def fingerprint(self) -> bytes:
        """Return 1 at a fixed length, else 0: K, T and the form of codes are the tokenizer's."""
        return int(self.fixed_length).to_bytes(4, "little")

    def encoder(self) -> BitEncoder:
        """Return a `BitEncoder`, whose way is the number of different symbols."""
        return BitEncoder()

    def decoder(self, data: bytes) -> BitDecoder:
        """Return a `BitDecoder`."""
        return BitDecoder(data)


class Static(ByTurns):
    """Codes and ends by fixed tables, one for each turn, in as many bits as they are rare.

    Args:
        tables: Shares by turn; see `frequencies_of`. K is at most 2**16.
        dummies: True if a site writes dummies and its one code at its last turn.

    Raises:
        ValueError: The tables are too large, or damaged.
    """

    mode = 1

    def __init__(self, tables: Tables, dummies: bool) -> None:
        codes = [frequencies_of(shares) for shares in tables.codes]
        on = tables.going_on.detach().cpu().double()
        ends = [frequencies_of(shares) for shares in torch.stack([1 - on, on], dim=1)]
        super().__init__(len(codes), len(codes[0]), dummies, codes, ends)

    def fingerprint(self) -> bytes:
        """Return 4 bytes of the SHA-256 of all frequencies."""
        every = torch.cat([*self.codes, *self.ends]).numpy().astype("<i8")
        return hashlib.sha256(every.tobytes()).digest()[:4]

    def encoder(self) -> Encoder:
        """Return a range `Encoder`, whose way is a row of frequencies."""
        return Encoder()

    def decoder(self, data: bytes) -> Decoder:
        """Return a range `Decoder`."""
        return Decoder(data)
