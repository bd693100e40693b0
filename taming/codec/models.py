"""Entropy models: codes of a picture to segments of bytes, one for each turn, and back.

Segment n holds, for each site that took turn n - 1, whether it goes on (n >= 1), then the codes of
turn n of the sites that take it, both in raster order.

Axis letters: h w grid, T turns, K codes, N sites.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor


class EntropyModel(ABC):
    """A way to write codes as bytes.

    Attributes:
        mode: Byte that names the way in a file.
    """

    mode: int

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Return 4 bytes that another model, whose bytes would decode to other codes, has not."""

    @abstractmethod
    def encode(self, codes: Tensor) -> Iterator[bytes]:
        """Encode the codes of a picture.

        Args:
            codes: (h, w, T) int64 that the quantizer's loop produces, -1 after a site's end.

        Yields:
            One segment for each turn that a site takes: at least one, at most T.
        """

    @abstractmethod
    def decode(self, segments: Sequence[bytes], grid: tuple[int, int]) -> Tensor:
        """Decode as many turns as there are segments.

        Args:
            segments: The first of those that `encode` gave, at least one, at most T.
            grid: (h, w), of at least one site.

        Returns:
            (h, w, T) int64: the codes, cut to the turns that there are.

        Raises:
            ValueError: The bytes are not those of such a grid and model.
        """
