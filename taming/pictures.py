"""Pictures of any kind to image tensors, and image tensors to pictures.

Axis letters: B pictures, C channels, H W picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from taming.decoding import MODES, Colour, decode_image, pil_to_tensor, to_mode
from taming.util import at_least, replacing

EXACT = 1e-10  # smallest mean squared error reported, 100 dB: JSON has no infinity
Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor


def is_single(pictures: Any) -> bool:
    """Return False for several pictures: a list or tuple of them, or an array of four axes."""
    return not isinstance(pictures, (list, tuple)) and getattr(pictures, "ndim", 0) != 4


def to_tensor(
    picture: Picture,
    channels: int = 3,
    background: Colour = "white",
    max_pixels: int | None = None,
) -> Tensor:
    """Turn a picture of any kind into an image tensor.

    Args:
        picture: A path; a PIL image; an array (H, W) or (H, W, C); or a tensor (H, W) or (C, H, W).
            Integers must be uint8 or uint16 and use the whole range; floats must lie in [-1, 1].
            Files and PIL images are turned upright by their EXIF orientation.
        channels: C, channels wanted. Files and PIL images are converted, as by `decode_image`; an
            array or tensor of one channel serves for three.
        background: Colour under what is transparent in a file or PIL image.
        max_pixels: Refuse a larger file, as `decode_image` does.

    Returns:
        (C, H, W) float32 in [-1, 1].

    Raises:
        ValueError: It is of another kind, the file is not an image, the array has another number of
            axes or channels, or a value is out of range.

    Example:
        >>> to_tensor(np.full((2, 3, 3), 255, np.uint8)).unique()
        tensor([1.])
        >>> to_tensor(torch.zeros(4, 5)).shape
        torch.Size([3, 4, 5])
    """
    values = _values_of(picture, channels, background, max_pixels)
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            "expected a picture as an array (H, W) or (H, W, C) or a tensor (H, W) or (C, H, W), "
            f"got the shape {tuple(getattr(picture, 'shape', values.shape))}"
        )
    if values.shape[0] == 1 and channels == 3:
        values = values.expand(channels, -1, -1)
    if values.shape[0] != channels:
        raise ValueError(f"expected a picture of {channels} channels, got {values.shape[0]}")
    return _in_unit_range(values)


def _in_unit_range(values: Tensor) -> Tensor:
    """Scale integers of a whole range to float32 in [-1, 1]; refuse floats outside it."""
    if values.dtype == torch.bool:
        return values.float() * 2 - 1
    if values.dtype in (torch.uint8, torch.uint16):
        # In float32 throughout, like the data sets: the same picture, the same values.
        return values.float().div(torch.iinfo(values.dtype).max / 2).sub(1)
    if not values.is_floating_point():
        raise ValueError(
            f"a picture of integers must be uint8 or uint16, got {values.dtype}, of unknown range"
        )
    if not (values.abs() <= 1).all():  # False for NaN as well
        raise ValueError(
            f"floats of a picture must lie in [-1, 1], got {values.min():.4g} to {values.max():.4g}"
        )
    return values.float()


def _values_of(
    picture: Picture, channels: int, background: Colour, max_pixels: int | None
) -> Tensor:
    """Return the values (C, H, W) of a picture as they are; files are decoded to ``channels``."""
    if isinstance(picture, Tensor):
        values = picture.detach().cpu()
        return values[None] if values.ndim == 2 else values
    if isinstance(picture, np.ndarray):
        array = picture[..., None] if picture.ndim == 2 else picture
        if array.ndim == 0 or array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise ValueError(f"expected a picture of numbers, got {array.dtype} {array.shape}")
        # A copy: torch takes no negative strides or foreign byte order, and warns if read-only.
        own = np.array(array, array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(own).movedim(-1, 0)
    if not isinstance(picture, Image.Image):
        if not isinstance(picture, (str, os.PathLike)) and not hasattr(picture, "read"):
            kinds = "a path, a PIL image, an array or a tensor"
            raise ValueError(f"expected one picture, {kinds}, got a {type(picture).__name__}")
        return decode_image(picture, True, channels, background, max_pixels)
    if channels not in MODES:
        raise ValueError(f"a PIL image has at most 4 channels, not {channels}: give an array")
    return pil_to_tensor(to_mode(picture, channels, True, background))


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Scale an image (C, H, W), of floats or uint8, as torchvision does by default."""
    size = (height, width)
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def load_image(path: Path, size: int | None = None) -> Tensor:
    """Load an image file, and scale its short side.

    Args:
        path: The file.
        size: Length of the short side in pixels; None keeps it.

    Returns:
        (3, H, W) float32 in [-1, 1].

    Raises:
        ValueError: The file is not an image, or the size is below 1.
    """
    at_least(1, size=size)
    pixels = decode_image(path)  # (3, H, W) uint8
    if size is not None:
        scale = size / min(pixels.shape[1:])
        pixels = resize(pixels, *(round(side * scale) for side in pixels.shape[1:]))
    return to_tensor(pixels)


def pad(image: Tensor, site: int) -> Tensor:
    """Extend an image (C, H, W) by reflection to multiples of the side of a site."""
    height, width = image.shape[1:]
    right, below = -width % site, -height % site
    if right >= width or below >= height:  # too small to be reflected so far
        return F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
    return F.pad(image[None], (0, right, 0, below), mode="reflect")[0]


def psnr_of(image: Tensor, other: Tensor) -> float:
    """PSNR in dB of one image in [-1, 1] to another of its shape, at most 100."""
    error = float((image - other).square().mean()) / 4
    return -10 * math.log10(max(error, EXACT))


def to_levels(x: Tensor) -> Tensor:
    """Round images in [-1, 1], clamped, to the levels 0 to 255 of a file; any shape, uint8."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_levels(levels: Tensor) -> Tensor:
    """Scale levels, uint8, to float32 in [-1, 1] as the data sets do."""
    return levels.float() / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """Turn an image (C, H, W), clamped to [-1, 1], into an 8-bit picture; C is 2, 3 or 4."""
    return Image.fromarray(to_levels(image).cpu().permute(1, 2, 0).numpy())


def arrange(images: Tensor | Sequence[Picture], columns: int) -> Tensor:
    """Arrange pictures of one size in rows of ``columns`` with white gaps.

    Args:
        images: (B, 3, H, W) in [-1, 1], or pictures of any kind.
        columns: Number of pictures in a row.

    Returns:
        (3, H', W') float32 in [-1, 1].
    """
    if not isinstance(images, Tensor):
        images = torch.stack([to_tensor(image) for image in images])
    if len(images) == 1:
        return images[0].detach().float().cpu()
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    framed = F.pad(images.detach().float().cpu(), (2, 0, 2, 0), value=1.0)
    empty = framed.new_ones(rows * columns - len(images), *framed.shape[1:])
    cells = torch.cat([framed, empty])
    arranged = rearrange(cells, "(r c) d h w -> d (r h) (c w)", r=rows)
    return F.pad(arranged, (0, 2, 0, 2), value=1.0)


def side_by_side(*images: Tensor) -> Tensor:
    """Put images (3, H, W) in [-1, 1] of one size next to each other: (3, H', W')."""
    return arrange(torch.stack([image.detach().float().cpu() for image in images]), len(images))


def save_picture(image: Tensor | Image.Image, path: Path) -> None:
    """Save a picture to a file, whole or not at all; create missing folders.

    Args:
        image: (3, H, W) in [-1, 1], or a PIL image.
        path: The file; its extension names the format.

    Raises:
        WriteError: The file cannot be saved; names it.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    with replacing(path) as part:
        (image if isinstance(image, Image.Image) else to_picture(image)).save(part, format=kind)
