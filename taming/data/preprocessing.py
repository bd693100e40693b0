"""From a picture file to a training example: decode, and show a view of what was decoded.

Pictures are tensors (C, H, W): C channels (3, red green blue, for images; 1 for masks and depth),
H rows, W columns. Rescaling follows OpenCV's conventions (half-pixel centres, no antialiasing
unless asked for), because the published models were trained and measured on pictures made so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from taming.util import DataError

File = str | os.PathLike[str] | IO[bytes]

INTERPOLATIONS = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "area": InterpolationMode.BOX,
    "lanczos": InterpolationMode.LANCZOS,
}


def interpolation_mode(name: str) -> InterpolationMode:
    """Return the way to rescale that a configuration names.

    "area" and "lanczos" are Pillow's; both average over the pixels that one pixel covers.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in INTERPOLATIONS:
        valid = ", ".join(INTERPOLATIONS)
        raise ValueError(f"interpolation must be one of {valid}; got {name!r}")
    return INTERPOLATIONS[name]


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Turn a ValueError into a `DataError` that names what is being read."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error


def _decode(file: File, convert: Callable[[Image.Image], Tensor]) -> Tensor:
    try:
        with Image.open(file) as image:
            return convert(image)
    # A damaged file makes Pillow raise OSError, SyntaxError, struct.error, EOFError and others.
    except Exception as error:
        raise ValueError(f"cannot be decoded as an image: {error}") from error


def decode_image(file: File, upright: bool = True) -> Tensor:
    """Decode an image file of any kind that Pillow reads, in colour.

    Grey, palette, CMYK and transparent images become RGB.

    Args:
        file: A path, or an open binary file.
        upright: Apply the EXIF orientation. Masks, depth maps and boxes belong to images as they
            are stored, so these must not be turned.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: The file is missing, truncated or no image.
    """

    def convert(image: Image.Image) -> Tensor:
        return F.pil_to_tensor(_to_rgb(ImageOps.exif_transpose(image) if upright else image))

    return _decode(file, convert)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255, which turns nearly every picture white.
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Straight to RGB, transparent palettes raise a warning.
    return image.convert("RGB")


def decode_mask(file: File) -> Tensor:
    """Decode a class map that holds one class number per pixel.

    Returns:
        (1, H, W) uint8.

    Raises:
        ValueError: The file cannot be decoded, or has more than one byte per pixel.
    """

    def convert(image: Image.Image) -> Tensor:
        if image.mode not in ("L", "P"):
            raise ValueError(f"expected one class number per pixel, found colours ({image.mode})")
        return F.pil_to_tensor(image)

    return _decode(file, convert)


def decode_depth(file: File) -> Tensor:
    """Decode a depth map whose float32 values are stored as the bytes of an RGBA image.

    Returns:
        (1, H, W) float32, rescaled to [-1, 1].

    Raises:
        ValueError: The file cannot be decoded, or has not four bytes per pixel.
    """

    def convert(image: Image.Image) -> Tensor:
        if image.mode != "RGBA":
            raise ValueError(f"expected float32 depth stored as RGBA, found {image.mode}")
        depth = np.array(image).view("<f4")[..., 0]
        scaled = (depth - depth.min()) / max(1e-8, depth.max() - depth.min())
        return torch.from_numpy(2 * scaled - 1)[None]

    return _decode(file, convert)


def read_pair(image: str, other: str, decode: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Read an image as it is stored, and a map of it.

    Args:
        image: Path of the image.
        other: Path of the map.
        decode: Reads the map, such as :func:`decode_mask`.

    Returns:
        The image (3, H, W) uint8, and what ``decode`` returns.

    Raises:
        DataError: One of them cannot be decoded, or they have other shapes; names the file.
    """
    with error_context(f"image {image}"):
        picture = decode_image(image, upright=False)
    with error_context(f"map {other}"):
        drawn = decode(other)
    (height, width), (rows, columns) = picture.shape[-2:], drawn.shape[-2:]
    # A map may be smaller or larger, with sides that are rounded by less than a pixel.
    if abs(height * columns - width * rows) > max(height + width, rows + columns):
        raise DataError(
            f"the image {image} is {width} x {height} pixels as it is stored (EXIF orientation "
            f"plays no part), but its map {other} is {columns} x {rows}: their shapes must agree"
        )
    return picture, drawn


def to_unit_range(picture: Tensor) -> np.ndarray:
    """Turn a uint8 picture (C, H, W) into what models take: (H, W, C) float32 in [-1, 1]."""
    return picture.permute(1, 2, 0).to(torch.float32).div(127.5).sub(1).contiguous().numpy()


def one_hot(mask: Tensor, n_labels: int) -> np.ndarray:
    """Turn a class map (1, H, W) into indicators: (H, W, n_labels) float32, 0 or 1.

    Raises:
        ValueError: A class number is too high.
    """
    highest = int(mask.max())
    if highest >= n_labels:
        raise ValueError(f"the map holds class {highest}, but there are only {n_labels} labels")
    return np.eye(n_labels, dtype=np.float32)[mask[0].numpy()]


def _nearest(length: int, new_length: int) -> Tensor:
    """Return which of ``length`` pixels each of ``new_length`` shows, rounded as OpenCV does."""
    step = 1 / (new_length / length)
    return (torch.arange(new_length, dtype=torch.float64) * step).long().clamp(max=length - 1)


def resize(
    picture: Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool
) -> Tensor:
    """Rescale a picture.

    Args:
        picture: (C, H, W), any dtype; uint8 for BOX and LANCZOS.
        size: (rows, columns) of the result.
        interpolation: One of :data:`INTERPOLATIONS`.
        antialias: Average over all the pixels that one pixel of the result covers.

    Returns:
        (C, rows, columns), dtype as given.
    """
    if interpolation in (InterpolationMode.BOX, InterpolationMode.LANCZOS):  # Pillow's alone
        return F.pil_to_tensor(F.resize(F.to_pil_image(picture), list(size), interpolation))
    if interpolation == InterpolationMode.NEAREST:
        rows, columns = map(_nearest, picture.shape[-2:], size)
        return picture[:, rows[:, None], columns]
    if not antialias and picture.dtype == torch.uint8:
        # OpenCV rounds halves up; torch's uint8 path comes out a third of a level too bright.
        resized = F.resize(picture.to(torch.float32), list(size), interpolation, antialias=False)
        return (resized + 0.5).clamp(0, 255).to(torch.uint8)
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

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """The cut in the picture before mirroring: left, top, width, height as shares of it."""
        rows, columns = self.scaled
        return self.left / columns, self.top / rows, self.width / columns, self.height / rows

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
        picture = resize(picture, self.scaled, interpolation, antialias)
        picture = F.crop(picture, self.top, self.left, self.height, self.width)
        return F.horizontal_flip(picture) if self.flip else picture


def scale_short_side(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Return (rows, columns) of a picture after its shorter side became ``short_side`` long."""
    scale = round(short_side) / min(height, width)
    return round(height * scale), round(width * scale)
