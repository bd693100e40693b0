"""Crops: each class chooses a view (rescaling, crop and flip) of a picture of a given size.

Random choices use torch's global generator, so seeding torch repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from taming.data.preprocessing import View, scale_short_side
from taming.data.utils import refuse_text


class Crop(Protocol):
    """Interface of the crops."""

    def view(self, height: int, width: int) -> View:
        """Return the view of a picture with ``height`` rows and ``width`` columns."""
        ...


def _sample_flip(random_flip: bool) -> bool:
    return random_flip and bool(torch.rand(()) < 0.5)


def _sample_offset(room: int, random_crop: bool) -> int:
    return int(torch.randint(room + 1, ())) if random_crop else room // 2


@dataclass(frozen=True)
class SquareCrop:
    """Rescale the short side, then crop a square at the centre or at random.

    Attributes:
        size: Length of the rescaled short side in pixels; None or 0 keeps it, unless the picture
            must be enlarged to contain the square.
        random_crop: Crop at random instead of at the centre.
        random_flip: Mirror pictures with probability 1/2.
        random_scale: (lo, hi) with 1 <= lo <= hi: sample the short side from
            [lo * size, hi * size]; None makes it ``size``.
        allow_upscale: Enlarge pictures whose short side is too small. False keeps their
            resolution, and refuses a picture smaller than the square.
        crop_size: Side of the square in pixels; by default ``size``. With neither, pictures stay
            whole.
    """

    size: int | None
    random_crop: bool = False
    random_flip: bool = False
    random_scale: Sequence[float] | None = None
    allow_upscale: bool = True
    crop_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("crop_size", self.crop_size)):
            if value is not None and value < 0:
                raise ValueError(f"{name} must be a positive number of pixels, got {value}")
        if self.size and self.crop_size and self.crop_size > self.size:
            raise ValueError(f"crop_size {self.crop_size} must not exceed size {self.size}")
        if self.random_scale is not None:
            refuse_text("random_scale", self.random_scale)
            bounds = list(self.random_scale)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"random_scale must be [lo, hi] with 1 <= lo <= hi, got {bounds}")

    def view(self, height: int, width: int) -> View:
        """Return the view of a picture with ``height`` rows and ``width`` columns.

        Raises:
            ValueError: The picture is smaller than the square and ``allow_upscale`` is off.
        """
        flip = _sample_flip(self.random_flip)
        side = self.crop_size or self.size
        if not side:
            return View((height, width), 0, 0, height, width, flip)
        if min(height, width) < side and not self.allow_upscale:
            raise ValueError(
                f"{width}x{height} pixels are fewer than the crop of {side}x{side}; "
                f"remove the picture, choose a smaller size, or set allow_upscale: true"
            )
        short_side = self._choose_short_side(min(height, width), side)
        scaled = scale_short_side(height, width, short_side)
        top, left = (_sample_offset(length - side, self.random_crop) for length in scaled)
        return View(scaled, top, left, side, side, flip)

    def _choose_short_side(self, short_side: int, side: int) -> float:
        if not self.size:
            return max(short_side, side)
        lo, hi = (self.size * scale for scale in self.random_scale or (1, 1))
        if not self.allow_upscale:
            lo, hi = min(lo, short_side), min(hi, short_side)
        return lo + (hi - lo) * torch.rand(()).item() if hi > lo else lo


@dataclass(frozen=True)
class RandomSquare:
    """Crop a square of random side at random, then rescale it.

    Attributes:
        size: Side of the result in pixels. The side of the square is sampled between ``size`` and
            the picture's short side; smaller pictures are enlarged.
        random_flip: Mirror pictures with probability 1/2.
    """

    size: int
    random_flip: bool = False

    def sample_side(self, short_side: int) -> int:
        """Sample the side in pixels of the square to crop from a picture with this short side."""
        return int(torch.randint(min(self.size, short_side), short_side + 1, ()))

    def view(self, height: int, width: int) -> View:
        """Return the view of a picture with ``height`` rows and ``width`` columns."""
        short_side = min(height, width)
        enlarged = self.size * short_side / self.sample_side(short_side)
        scaled = scale_short_side(height, width, enlarged)
        top, left = (_sample_offset(length - self.size, random_crop=True) for length in scaled)
        return View(scaled, top, left, self.size, self.size, _sample_flip(self.random_flip))


@dataclass(frozen=True)
class Stretch:
    """Rescale the whole picture to a square, ignoring its aspect ratio.

    Attributes:
        size: Side of the square in pixels.
        random_flip: Mirror pictures with probability 1/2.
    """

    size: int
    random_flip: bool = False

    def view(self, height: int, width: int) -> View:
        """Return the view of a picture with ``height`` rows and ``width`` columns."""
        flip = _sample_flip(self.random_flip)
        return View((self.size, self.size), 0, 0, self.size, self.size, flip)
