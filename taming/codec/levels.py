"""Codes of several grids in one file, those of a VQ-VAE-2.

Axis letters: h w grid, T turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from taming.codec.container import decode_number, encode_number
from taming.codec.models import EntropyModel


class Levels(EntropyModel):
    """A model for each level, whose segments follow those of the level above.

    The first segment of a level begins with the number of its segments.

    Args:
        models: Name -> model of a level, all of one mode, the top first.
        factors: Sites of the finest level beside each other in one of each level, the top first.

    Example:
        >>> import torch
        >>> from taming.codec.models import Raw
        >>> models = {"top": Raw(1, 16, False), "bottom": Raw(1, 16, False)}
        >>> levels = Levels(models, (2, 1))
        >>> codes = torch.tensor([[[3]]]), torch.tensor([[[1], [2]], [[4], [5]]])
        >>> [segment.hex() for segment in levels.encode(codes)]
        ['0130', '011245']
    """

    def __init__(self, models: Mapping[str, EntropyModel], factors: Sequence[int]) -> None:
        self.models, self.factors = dict(models), tuple(factors)
        (self.mode,) = {model.mode for model in models.values()}
        self.progressive = all(model.progressive for model in models.values())

    def fingerprint(self) -> bytes:
        """Return 4 bytes of the SHA-256 of those of all levels, which is new if one of them is."""
        every = b"".join(model.fingerprint() for model in self.models.values())
        return hashlib.sha256(every).digest()[:4]

    def encode(self, codes: Sequence[Tensor]) -> Iterator[bytes]:
        """Encode the codes (h, w, T) of each level: yield its segments, the top's first."""
        for model, own in zip(self.models.values(), codes, strict=True):
            first, *others = model.encode(own)
            yield encode_number(1 + len(others)) + first
            yield from others

    def decode(self, segments: Sequence[bytes], grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Decode as many levels and, of the last, turns as there are segments.

        Args:
            segments: As of any model.
            grid: (h, w) of the top.

        Returns:
            (h, w, T) int64 of each level, the top first, without those that have no segment.
        """
        codes: list[Tensor] = []
        for (name, model), factor in zip(self.models.items(), self.factors, strict=True):
            if segments:
                h, w = (side * self.factors[0] // factor for side in grid)
                try:
                    count, place = decode_number(segments[0], 0)
                    own = [segments[0][place:], *segments[1:]][:count]
                    codes.append(model.decode(own, (h, w)))
                except ValueError as error:
                    raise ValueError(f"the codes of the level {name}: {error}") from error
                segments = segments[count:]
        if segments:
            raise ValueError(f"{len(segments)} segments follow those of the last level")
        return tuple(codes)
