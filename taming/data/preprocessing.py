"""Decode picture files, then rescale, crop and mirror them.

Axis letters: C channels (3, RGB, for images; 1 for masks and depth), H rows, W columns. Rescaling
follows OpenCV's conventions (half-pixel centres, no antialiasing by default), because the
published models were trained and measured on such pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from taming.pictures import decode, to_rgb
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
    """Look up an interpolation by its name in configurations.

    "area" and "lanczos" are Pillow's; both average over the pixels that one new pixel covers.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in INTERPOLATIONS:
        valid = ", ".join(INTERPOLATIONS)
        raise ValueError(f"interpolation must be one of {valid}; got {name!r}")
    return INTERPOLATIONS[name]


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Re-raise a ValueError as a `DataError` whose message starts with ``what``.

    Args:
        what: Name of the file that is read, such as "image a.png".
    """
    try:
        yield
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error


def decode_image(file: File, upright: bool = True) -> Tensor:
    """Decode an image file of any format that Pillow reads, and convert it to RGB.

    Args:
        file: A path, or an open binary file.
        upright: Apply the EXIF orientation. Masks, depth maps and boxes refer to the stored
            image, so an image that goes with them must not be rotated.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: The file is missing, truncated or not an image.
    """
    return decode(file, lambda image: F.pil_to_tensor(to_rgb(image, upright)))


def decode_mask(file: File) -> Tensor:
    """Decode a class map with one class number per pixel.

    Returns:
        (1, H, W) uint8.

    Raises:
        ValueError: The file cannot be decoded or has more than one byte per pixel.
    """

    def convert(image: Image.Image) -> Tensor:
        if image.mode not in ("L", "P"):
            raise ValueError(f"expected one class number per pixel, found colours ({image.mode})")
        return F.pil_to_tensor(image)

    return decode(file, convert)


def decode_depth(file: File) -> Tensor:
    """Decode a depth map whose float32 values are stored as the bytes of an RGBA image.

    Returns:
        (1, H, W) float32, rescaled to [-1, 1].

    Raises:
        ValueError: The file cannot be decoded or does not have four bytes per pixel.
    """

    def convert(image: Image.Image) -> Tensor:
        if image.mode != "RGBA":
            raise ValueError(f"expected float32 depth stored as RGBA, found {image.mode}")
        depth = np.array(image).view("<f4")[..., 0]
        scaled = (depth - depth.min()) / max(1e-8, depth.max() - depth.min())
        return torch.from_numpy(2 * scaled - 1)[None]

    return decode(file, convert)


def read_pair(image: str, other: str, decode: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Read an image in its stored orientation, and a map of it.

    Args:
        image: Path of the image.
        other: Path of the map.
        decode: Decodes the map, such as `decode_mask`.

    Returns:
        The image (3, H, W) uint8, and the decoded map.

    Raises:
        DataError: A file cannot be decoded, or the aspect ratios differ; names the file.
    """
    with error_context(f"image {image}"):
        picture = decode_image(image, upright=False)
    with error_context(f"map {other}"):
        map_ = decode(other)
    (height, width), (rows, columns) = picture.shape[-2:], map_.shape[-2:]
    # A map may be smaller or larger, with sides rounded by less than a pixel.
    if abs(height * columns - width * rows) > max(height + width, rows + columns):
        raise DataError(
            f"the stored image {image} is {width} x {height} pixels (its EXIF orientation is "
            f"ignored), but its map {other} is {columns} x {rows}: their aspect ratios must agree"
        )
    return picture, map_


def to_unit_range(picture: Tensor) -> np.ndarray:
    """Convert a picture (C, H, W) uint8 to (H, W, C) float32 in [-1, 1]."""
    return picture.permute(1, 2, 0).to(torch.float32).div(127.5).sub(1).contiguous().numpy()


def one_hot(mask: Tensor, n_labels: int) -> np.ndarray:
    """Convert a class map (1, H, W) to one-hot vectors (H, W, n_labels) float32.

    Raises:
        ValueError: A class number is not below ``n_labels``.
    """
    highest = int(mask.max())
    if highest >= n_labels:
        raise ValueError(f"the map holds class {highest}, but there are only {n_labels} labels")
    return np.eye(n_labels, dtype=np.float32)[mask[0].numpy()]


def _nearest(length: int, new_length: int) -> Tensor:
    """Return the source pixel of each of ``new_length`` pixels, (new_length,) int64, as OpenCV."""
    step = 1 / (new_length / length)
    return (torch.arange(new_length, dtype=torch.float64) * step).long().clamp(max=length - 1)


def resize(
    picture: Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool
) -> Tensor:
    """Rescale a picture.

    Args:
        picture: (C, H, W), any dtype; uint8 for BOX and LANCZOS.
        size: (rows, columns) of the result.
        interpolation: One of `INTERPOLATIONS`.
        antialias: Average over all pixels that one new pixel covers.

    Returns:
        (C, rows, columns) of the same dtype.
    """
    if interpolation in (InterpolationMode.BOX, InterpolationMode.LANCZOS):  # only Pillow has them
        return F.pil_to_tensor(F.resize(F.to_pil_image(picture), list(size), interpolation))
    if interpolation == InterpolationMode.NEAREST:
        rows, columns = map(_nearest, picture.shape[-2:], size)
        return picture[:, rows[:, None], columns]
    if not antialias and picture.dtype == torch.uint8:
        # OpenCV rounds half up; torch's uint8 path is a third of a grey level too bright.
        resized = F.resize(picture.to(torch.float32), list(size), interpolation, antialias=False)
        return (resized + 0.5).clamp(0, 255).to(torch.uint8)
    return F.resize(picture, list(size), interpolation, antialias=antialias)


class View(NamedTuple):
    """Rescaling, crop and flip of a picture.

    Applying one view to an image, its mask and its depth keeps them aligned.

    Attributes:
        scaled: (rows, columns) of the whole rescaled picture.
        top: First row of the crop.
        left: First column of the crop.
        height: Rows of the crop.
        width: Columns of the crop.
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
        """Left, top, width, height of the crop before mirroring, as fractions of the picture."""
        rows, columns = self.scaled
        return self.left / columns, self.top / rows, self.width / columns, self.height / rows

    def apply(
        self,
        picture: Tensor,
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        antialias: bool = False,
    ) -> Tensor:
        """Rescale, crop and mirror a picture.

        Args:
            picture: (C, H, W), any dtype.
            interpolation: BILINEAR for images, NEAREST for class maps.
            antialias: Average over all pixels that one new pixel covers.

        Returns:
            (C, height, width) of the same dtype.
        """
        picture = resize(picture, self.scaled, interpolation, antialias)
        picture = F.crop(picture, self.top, self.left, self.height, self.width)
        return F.horizontal_flip(picture) if self.flip else picture


def scale_short_side(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Return (rows, columns) of a picture rescaled so that its short side is ``short_side``."""
    scale = round(short_side) / min(height, width)
    return round(height * scale), round(width * scale)
