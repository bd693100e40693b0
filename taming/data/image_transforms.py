"""Crops and flips of single pictures that also return their parameters.

They take Pillow images or tensors (C, H, W), crop at the picture's own resolution, and use torch's
global random generator. The data sets use `View` instead, which also rescales and applies to
several pictures at once. Boxes are left, top, width and height as fractions of the picture.
"""

from __future__ import annotations

from typing import cast

import torch
from PIL import Image as pil_image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from taming.data.crops import Crop, RandomSquare, SquareCrop
from taming.data.helper_types import BoundingBox, Image


def convert_pil_to_tensor(image: pil_image.Image) -> Tensor:
    """Convert a Pillow image to (C, H, W) uint8."""
    return F.pil_to_tensor(image)


def _size(image: Image) -> tuple[int, int]:
    height, width = F.get_size(cast(Tensor, image))  # accepts Pillow images despite its annotation
    return height, width


def _cut(image: Image, crop: Crop) -> tuple[BoundingBox, Image]:
    view = crop.view(*_size(image))
    shown = F.crop(cast(Tensor, image), view.top, view.left, view.height, view.width)
    return view.bbox, shown


class CenterCropReturnCoordinates:
    """Crop a square from the centre.

    Args:
        size: Side of the square in pixels.
    """

    random_crop = False

    def __init__(self, size: int) -> None:
        self.crop = SquareCrop(None, self.random_crop, crop_size=size, allow_upscale=False)

    def __call__(self, image: Image) -> tuple[BoundingBox, Image]:
        """Return the box of the square, and the square.

        Raises:
            ValueError: The picture is smaller than the square.
        """
        return _cut(image, self.crop)


class RandomCrop1dReturnCoordinates(CenterCropReturnCoordinates):
    """Crop a square at random: along the long side, if the short side equals ``size``."""

    random_crop = True


class Random2dCropReturnCoordinates:
    """Crop a square of random side, from ``min_size`` to the picture's short side, at random.

    Args:
        min_size: Smallest side in pixels; from smaller pictures the largest square is cropped.
    """

    def __init__(self, min_size: int) -> None:
        self.crop = RandomSquare(min_size)

    def __call__(self, image: Image) -> tuple[BoundingBox, Image]:
        """Return the box of the square, and the square."""
        side = self.crop.sample_side(min(_size(image)))
        return _cut(image, SquareCrop(None, random_crop=True, crop_size=side))


class RandomHorizontalFlipReturn:
    """Mirror pictures at random.

    Args:
        p: Probability of mirroring.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image) -> tuple[bool, Image]:
        """Return True if the picture was mirrored, and the picture."""
        if torch.rand(()) < self.p:
            return True, F.horizontal_flip(cast(Tensor, image))
        return False, image
