"""Crops and flips of single pictures that also return what they did.

They take Pillow images and tensors (C, H, W), cut at the picture's own resolution, and draw from
torch's global generator. The data sets themselves draw :class:`~taming.data.preprocessing.View`
objects, which rescale too and serve several pictures at once.
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
    """Turn a Pillow image into a tensor (C, H, W) uint8."""
    return F.pil_to_tensor(image)


def _size(image: Image) -> tuple[int, int]:
    height, width = F.get_size(cast(Tensor, image))  # takes Pillow images too, whatever it declares
    return height, width


def _cut(image: Image, crop: Crop) -> tuple[BoundingBox, Image]:
    view = crop.draw(*_size(image))
    shown = F.crop(cast(Tensor, image), view.top, view.left, view.height, view.width)
    return view.bbox, shown


class CenterCropReturnCoordinates:
    """Cuts a square from the middle.

    Args:
        size: Its side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.crop = SquareCrop(None, crop_size=size, allow_upscale=False)

    def __call__(self, image: Image) -> tuple[BoundingBox, Image]:
        """Return the square's box in the picture, and the square.

        Raises:
            ValueError: The picture is smaller than the square.
        """
        return _cut(image, self.crop)


class RandomCrop1dReturnCoordinates:
    """Cuts a square anywhere; of a picture whose short side is ``size``, along the long side.

    Args:
        size: Its side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.crop = SquareCrop(None, random_crop=True, crop_size=size, allow_upscale=False)

    def __call__(self, image: Image) -> tuple[BoundingBox, Image]:
        """Return the square's box in the picture, and the square.

        Raises:
            ValueError: The picture is smaller than the square.
        """
        return _cut(image, self.crop)


class Random2dCropReturnCoordinates:
    """Cuts a square of any side from ``min_size`` up to the picture's short side, anywhere.

    Args:
        min_size: Its least side in pixels; smaller pictures give the largest square they hold.
    """

    def __init__(self, min_size: int) -> None:
        self.crop = RandomSquare(min_size)

    def __call__(self, image: Image) -> tuple[BoundingBox, Image]:
        """Return the square's box in the picture, and the square."""
        side = self.crop.draw_side(min(_size(image)))
        return _cut(image, SquareCrop(None, random_crop=True, crop_size=side))


class RandomHorizontalFlipReturn:
    """Mirrors pictures at random.

    Args:
        p: Share of the pictures that are mirrored.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image) -> tuple[bool, Image]:
        """Return whether the picture was mirrored, and the picture."""
        if torch.rand(()) < self.p:
            return True, F.horizontal_flip(cast(Tensor, image))
        return False, image
