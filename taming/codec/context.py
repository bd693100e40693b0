"""Codes as bytes under a `ContextNetwork`, the same on every machine.

Within a segment, symbols stand in the order of `ContextNetwork.walk`.

Axis letters: h w grid, T turns, N sites sent together, V values of a symbol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from taming.codec.models import EntropyModel
from taming.codec.ranges import TOTAL, Decoder, Encoder
from taming.modules.context import ContextNetwork
from taming.modules.vqvae.checks import ABSENT, mark_impossible

_STEPS = 64  # of the table, for a factor e
_BITS = 24  # of its entries


@cache
def exponentials() -> Tensor:
    """Return round(2**24 exp(-i / 64)), (N,) int64, down to 0, from integers alone."""
    one = 1 << 128
    factor, term, number = 0, one, 0  # the series of exp(1 / 64)
    while term:
        factor, number = factor + term, number + 1
        term //= _STEPS * number
    value, table = one, []
    while entry := (value + (one >> _BITS + 1)) >> (128 - _BITS):
        table.append(entry)
        value = value * one // factor
    return torch.tensor([*table, 0])


def frequencies(logits: Tensor) -> Tensor:
    """Turn logits on a binary grid into frequencies, exactly.

    Distances below the largest logit are rounded to 1/64; each symbol gets a frequency of 1, and of
    the rest, its share by the table of `exponentials`, rounded down. What is left over goes to the
    first symbol whose distance is rounded to 0.

    Args:
        logits: (N, V) float64, exact.

    Returns:
        (N, V) int64, each at least 1, of sum 2**16.
    """
    symbols = logits.shape[1]
    table = exponentials().to(logits.device)
    below = ((logits.amax(dim=1, keepdim=True) - logits) * _STEPS + 0.5).floor_()
    steps = below.clamp_(max=len(table) - 1).long()
    weights = table[steps]  # (N, V), of sum below 2**40
    share = (TOTAL - symbols << 38) // weights.sum(dim=1, keepdim=True)  # < 2**54 / 2**24
    found = (weights * share >> 38) + 1
    first = (steps * symbols + torch.arange(symbols, device=steps.device)).argmin(dim=1)
    left = TOTAL - found.sum(dim=1)
    return found.scatter_add_(1, first[:, None], left[:, None])


class Context(EntropyModel):
    """Codes sent turn by turn, under the frequencies of a network that sees those before.

    Args:
        network: In evaluation mode; it is copied.

    Raises:
        ValueError: It cannot code (see `ContextNetwork.frozen`), or has too many codes.

    Example:
        >>> network = ContextNetwork(n_codes=16, max_loops=2, channels=8, hidden=16).eval()
        >>> codes = torch.randint(16, (5, 7, 2))
        >>> segments = list(Context(network).encode(codes))
        >>> torch.equal(Context(network).decode(segments, (5, 7)), codes)
        True
    """

    mode = 2

    def __init__(self, network: ContextNetwork) -> None:
        if network.n_codes > TOTAL // 4:
            most = f"a Context takes networks of at most {TOTAL // 4} codes"
            raise ValueError(f"{most}, got one of {network.n_codes}")
        self.network = network.frozen()

    def fingerprint(self) -> bytes:
        """Return the first bytes of a digest of the sizes and the numbers of the network."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {self.network.bits}".encode())
            digest.update(value.cpu().contiguous().numpy().astype("<f8").tobytes())
        if self.network.fixed_length and self.network.max_loops > 1:  # fewer symbols are sent
            digest.update(b"fixed_length")
        return digest.digest()[:4]

    def encode(self, codes: Tensor) -> Iterator[bytes]:
        """Encode codes (h, w, T): yield a segment for each turn that a site takes.

        Raises:
            ValueError: They are none of the network's.
        """
        mark_impossible(codes.flatten(0, 1), self.network.n_codes, False)
        turns = int((codes >= 0).sum(dim=-1).max())
        symbols = torch.where(codes < 0, self.network.n_codes, codes)[None, ..., :turns]
        if self.network.fixed_length and (symbols == self.network.n_codes).any():
            raise ValueError("the sites differ in length, which this network takes to be fixed")
        symbols = symbols.to(self.network.inside.device)
        coder = Encoder()

        def push(logits: Tensor, wanted: Tensor, _: Tensor) -> Tensor:
            coder.push(wanted, frequencies(logits))
            return wanted

        for _ in self.network.walk(symbols, push):
            yield coder.bytes()
            coder = Encoder()

    def decode(self, segments: Sequence[bytes], grid: tuple[int, int]) -> Tensor:
        """Decode as many turns as there are segments: codes (h, w, T) int64."""
        if not 1 <= len(segments) <= self.network.max_loops:
            raise ValueError(f"{len(segments)} segments for {self.network.max_loops} turns")
        unknown = torch.full((1, *grid, len(segments)), -1, device=self.network.inside.device)
        codes = torch.full((*grid, self.network.max_loops), ABSENT)
        coder = Decoder(segments[0])

        def pull(logits: Tensor, _: Tensor, __: Tensor) -> Tensor:
            return coder.pull(frequencies(logits)).to(logits.device)

        for turn, sent in enumerate(self.network.walk(unknown, pull)):
            coder.close()
            codes[..., turn] = torch.where(sent[0] < self.network.n_codes, sent[0], ABSENT).cpu()
            if turn + 1 < len(segments):
                coder = Decoder(segments[turn + 1])
        if (codes[..., len(segments) - 1] < 0).all():
            raise ValueError(f"no site takes the turn of segment {len(segments) - 1}")
        return codes
