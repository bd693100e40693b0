"""From a picture file to a training example: decode, rescale, cut a square, mirror.

Pictures are tensors (C, H, W): C channels (3, red green blue, for images), H rows, W columns.
Rescaling follows OpenCV's conventions (half-pixel centres, no antialiasing unless asked for),
because the published models were trained and measured on pictures made that way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


def decode_image(file: str | os.PathLike[str] | IO[bytes]) -> Tensor:
    """Decode an image file of any kind that Pillow reads, upright and in colour.

    The EXIF orientation is applied; grey, palette, CMYK and transparent images become RGB.

    Args:
        file: A path, or an open binary file.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: The file is missing, truncated or no image.
    """
    try:
        with Image.open(file) as image:
            return F.pil_to_tensor(_to_rgb(ImageOps.exif_transpose(image)))
    # A damaged file makes Pillow raise OSError, SyntaxError, struct.error, EOFError and others.
    except Exception as error:
        raise ValueError(f"cannot be decoded as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255, which turns nearly every picture white.
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Straight to RGB, transparent palettes raise a warning.
    return image.convert("RGB")


def to_unit_range(picture: Tensor) -> np.ndarray:
    """Turn a uint8 picture (C, H, W) into what models take: (H, W, C) float32 in [-1, 1]."""
    return picture.permute(1, 2, 0).to(torch.float32).div(127.5).sub(1).contiguous().numpy()


def _resize(
    picture: Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool
) -> Tensor:
    as_opencv = interpolation == InterpolationMode.BILINEAR and not antialias
    if as_opencv and picture.dtype == torch.uint8:
        # OpenCV rounds halves up; torch's uint8 path comes out a third of a level too bright.
        resized = F.resize(picture.to(torch.float32), list(size), interpolation, antialias=False)
        return (resized + 0.5).to(torch.uint8)
    return F.resize(picture, list(size), interpolation, antialias=antialias)


class View(NamedTuple):
    """What is shown of a picture: rescaled, cut and perhaps mirrored.

    Apply one view to several pictures (image, mask, depth) to keep them aligned.

    Attributes:
        scaled: (rows, columns) the whole picture is rescaled to.
        top: First row of the cut.
        left: First column of the cut.
        height: Rows of the cut.
        width: Columns of the cut.
        flip: Mirror left and right.
    """

    scaled: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def apply(
        self,
        picture: Tensor,
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        antialias: bool = False,
    ) -> Tensor:
        """Show this view of a picture.

        Args:
            picture: (C, H, W), any dtype.
            interpolation: BILINEAR for images, NEAREST for class maps.
            antialias: Average over all the pixels that one pixel of the result covers.

        Returns:
            (C, height, width), dtype as given.
        """
        picture = _resize(picture, self.scaled, interpolation, antialias)
        picture = F.crop(picture, self.top, self.left, self.height, self.width)
        return F.horizontal_flip(picture) if self.flip else picture


def scale_short_side(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Return (rows, columns) of a picture after its shorter side became ``short_side`` long."""
    scale = round(short_side) / min(height, width)
    return round(height * scale), round(width * scale)


@dataclass(frozen=True)
class SquareCrop:
    """Draws views: the short side is rescaled, then a square is cut from the middle or anywhere.

    Random choices come from torch's global generator, so seeding torch repeats them.

    Attributes:
        size: Side of the square in pixels; None or 0 leaves pictures whole.
        random_crop: Cut anywhere instead of from the middle.
        random_flip: Mirror every other picture.
        random_scale: (lo, hi) with 1 <= lo <= hi: the short side is drawn between lo * size and
            hi * size; None makes it ``size``.
        allow_upscale: Enlarge pictures that are smaller than asked for. If not, they are cut at
            their own resolution, and a picture smaller than ``size`` is an error.
    """

    size: int | None
    random_crop: bool = False
    random_flip: bool = False
    random_scale: Sequence[float] | None = None
    allow_upscale: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 0:
            raise ValueError(f"size must be a positive number of pixels, got {self.size}")
        if self.random_scale is not None:
            bounds = list(self.random_scale)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"random_scale must be [lo, hi] with 1 <= lo <= hi, got {bounds}")

    def draw(self, height: int, width: int) -> View:
        """Draw the view of a picture with ``height`` rows and ``width`` columns.

        Raises:
            ValueError: The picture is smaller than the crop and may not be enlarged.
        """
        flip = self.random_flip and bool(torch.rand(()) < 0.5)
        if not self.size:
            return View((height, width), 0, 0, height, width, flip)
        if min(height, width) < self.size and not self.allow_upscale:
            raise ValueError(
                f"{width}x{height} pixels are fewer than the crop of {self.size}x{self.size}; "
                f"remove it, choose a smaller size, or set allow_upscale: true"
            )
        scaled = scale_short_side(height, width, self._draw_short_side(min(height, width)))
        top, left = (self._draw_offset(side - self.size) for side in scaled)
        return View(scaled, top, left, self.size, self.size, flip)

    def _draw_short_side(self, short_side: int) -> float:
        assert self.size
        lo, hi = (self.size * scale for scale in self.random_scale or (1, 1))
        if not self.allow_upscale:
            lo, hi = min(lo, short_side), min(hi, short_side)
        return lo + (hi - lo) * torch.rand(()).item() if hi > lo else lo

    def _draw_offset(self, room: int) -> int:
        return int(torch.randint(room + 1, ())) if self.random_crop else room // 2
