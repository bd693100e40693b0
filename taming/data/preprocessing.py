"""Decode picture files, then rescale, crop and mirror them.

Axis letters: C channels (3, RGB, for images; 1 for masks and depth), H rows, W columns. Rescaling
follows OpenCV's conventions (half-pixel centres, no antialiasing by default), because the
published models were trained and measured on such pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from taming.decoding import File, decode, decode_image, pil_to_tensor, raw_mode
from taming.util import DataError, IncompleteError

logger = logging.getLogger(__name__)

# Both average over the pixels that one new pixel covers.
_OF_PILLOW = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", *_OF_PILLOW)


def check_interpolation(name: str) -> str:
    """Return the name of an interpolation.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in INTERPOLATIONS:
        valid = ", ".join(INTERPOLATIONS)
        raise ValueError(f"interpolation must be one of {valid}; got {name!r}")
    return name


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Re-raise a ValueError as a `DataError` whose message starts with ``what``.

    Args:
        what: Name of the file that is read, such as "image a.png".
    """
    try:
        yield
    except ValueError as error:
        reason = str(error).removeprefix(f"{what.partition(' ')[2]}: ")  # some name it themselves
        raise DataError(f"{what}: {reason}") from error


@contextmanager
def skipping(failed: list[str]) -> Iterator[None]:
    """Log and collect a `DataError` about one of several files, so that the others go on."""
    try:
        yield
    except DataError as error:
        logger.warning("skipped: %s", error)
        failed.append(str(error))


def refuse_failed(failed: Sequence[str], total: int) -> None:
    """End a program that has gone through all files, if some failed in `skipping`.

    Raises:
        IncompleteError: Counts the failures, and names the first.
    """
    if failed:
        raise IncompleteError(f"{len(failed)} of {total} files failed; the first: {failed[0]}")


def decode_mask(file: File) -> Tensor:
    """Decode a class map with one class number per pixel: the number that the file stores.

    Args:
        file: A path, or an open binary file. In a picture of one bit, white is class 1.

    Returns:
        (1, H, W) uint8, or int32 if the file holds more than 8 bits.

    Raises:
        ValueError: The file cannot be decoded, or holds colours or floats.
    """

    def convert(image: Image.Image) -> Tensor:
        unit = _unit_of(image)
        if image.mode in ("1", "L", "P"):
            values = np.asarray(image).astype(np.uint8)
        elif image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int32)
        else:
            kind = "floats" if image.mode == "F" else f"colours ({image.mode})"
            raise ValueError(f"expected one class number per pixel, found {kind}")
        return torch.from_numpy((values / unit).round().astype(values.dtype))[None]

    return decode(file, convert)


def _unit_of(image: Image.Image) -> float:
    """Return the grey level of class 1, since Pillow scales fewer than 8 or 16 bits to all."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    if isinstance(arguments, tuple) and image.format == "PPM" and image.mode in ("L", "I"):
        return (65535 if image.mode == "I" else 255) / int(arguments[1])
    return {"L;2": 85, "L;4": 17}.get(raw_mode(image)[:3], 1)


def decode_depth(file: File) -> Tensor:
    """Decode a depth map whose float32 values are stored as the bytes of an RGBA image.

    Returns:
        (1, H, W) float32, rescaled to [-1, 1].

    Raises:
        ValueError: The file cannot be decoded, does not have four bytes per pixel, or holds a
            value that is not finite.
    """

    def convert(image: Image.Image) -> Tensor:
        if image.mode != "RGBA":
            raise ValueError(f"expected float32 depth stored as RGBA, found {image.mode}")
        depth = np.array(image).view("<f4")[..., 0]
        if not np.isfinite(depth).all():
            raise ValueError("the depth is not finite everywhere")
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
    return picture.permute(1, 2, 0).div(127.5).sub_(1).contiguous().numpy()


def shift_classes(mask: Tensor) -> Tensor:
    """Add one to all classes; the last of 8 or 16 bits (unlabelled) becomes class 0."""
    unlabelled = 255 if mask.dtype == torch.uint8 else 65535
    return torch.where(mask == unlabelled, 0, mask + 1)


def one_hot(mask: Tensor, n_labels: int) -> np.ndarray:
    """Convert a class map (1, H, W) to one-hot vectors (H, W, n_labels) float32.

    Raises:
        ValueError: A class number is negative or not below ``n_labels``.
    """
    lowest, highest = int(mask.min()), int(mask.max())
    if lowest < 0:
        raise ValueError(f"the map holds class {lowest}, but classes count from 0")
    if highest >= n_labels:
        raise ValueError(f"the map holds class {highest}, but there are only {n_labels} labels")
    return np.eye(n_labels, dtype=np.float32)[mask[0].numpy()]


def _nearest(length: int, new_length: int) -> Tensor:
    """Return the source pixel of each of ``new_length`` pixels, (new_length,) int64, as OpenCV."""
    step = 1 / (new_length / length)
    return (torch.arange(new_length, dtype=torch.float64) * step).long().clamp(max=length - 1)


def resize(picture: Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> Tensor:
    """Rescale a picture.

    Args:
        picture: (C, H, W), any dtype; uint8 for area and lanczos.
        size: (rows, columns) of the result.
        interpolation: One of `INTERPOLATIONS`.
        antialias: Average over all pixels that one new pixel covers.

    Returns:
        (C, rows, columns) of the same dtype.
    """
    if size == picture.shape[-2:]:
        return picture
    if interpolation in _OF_PILLOW:
        pixels = picture.permute(1, 2, 0).numpy()  # (H, W, C)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return pil_to_tensor(image.resize((size[1], size[0]), _OF_PILLOW[interpolation]))
    if interpolation == "nearest":
        rows, columns = map(_nearest, picture.shape[-2:], size)
        return picture[:, rows[:, None], columns]
    if not antialias and picture.dtype == torch.uint8:
        # OpenCV rounds half up; torch's uint8 path is a third of a grey level too bright.
        resized = resize(picture.to(torch.float32), size, interpolation, antialias=False)
        return (resized + 0.5).clamp(0, 255).to(torch.uint8)
    # With such strides, torch keeps the channels of decoded pictures together, which is faster.
    batch = picture.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # (1, C, H, W)
    return F.interpolate(batch, size, mode=interpolation, antialias=antialias)[0]


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
        interpolation: str = "bilinear",
        antialias: bool = False,
    ) -> Tensor:
        """Rescale, crop and mirror a picture.

        Args:
            picture: (C, H, W), any dtype.
            interpolation: bilinear for images, nearest for class maps.
            antialias: Average over all pixels that one new pixel covers.

        Returns:
            (C, height, width) of the same dtype.
        """
        picture = resize(picture, self.scaled, interpolation, antialias)
        below, right = self.top + self.height, self.left + self.width
        picture = picture[:, self.top : below, self.left : right]
        return picture.flip(-1) if self.flip else picture


def scale_short_side(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Return (rows, columns) of a picture rescaled so that its short side is ``short_side``."""
    scale = round(short_side) / min(height, width)
    return round(height * scale), round(width * scale)
