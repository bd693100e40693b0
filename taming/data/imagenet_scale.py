"""ImageNet with a poorer version of each image, ``lr``: coarser, or its edges alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode

from taming.data.crops import SquareCrop
from taming.data.imagenet_base import ImageNetBase, ImageNetTrain, ImageNetValidation
from taming.data.preprocessing import error_context, interpolation_mode, resize, to_unit_range


def shrink(picture: Tensor, factor: int) -> Tensor:
    """Divide the sides of a picture (C, H, W) uint8 by a factor, averaging.

    Raises:
        ValueError: Nothing would be left of it.
    """
    rows, columns = (side // factor for side in picture.shape[-2:])
    if not rows or not columns:
        raise ValueError(f"{tuple(picture.shape[-2:])} pixels cannot be divided by {factor}")
    return resize(picture, (rows, columns), InterpolationMode.BICUBIC, antialias=True)


def coarsen(picture: Tensor, factor: int, mode: InterpolationMode) -> Tensor:
    """Shrink a picture (3, H, W) uint8 and enlarge it again.

    Returns:
        (3, H, W) float32 in [-1, 1].
    """
    height, width = picture.shape[-2:]
    enlarged = resize(shrink(picture, factor), (height, width), mode, antialias=True)
    return enlarged.to(torch.float32) / 127.5 - 1


def edges(picture: Tensor) -> Tensor:
    """Find the edges in a picture (3, H, W) uint8 with Canny's method.

    Returns:
        (3, H, W) float32, 0 or 1, the same in all channels.
    """
    from skimage.color import rgb2gray  # takes a second to import, and only this needs it
    from skimage.feature import canny

    found = canny(rgb2gray(to_unit_range(picture)), sigma=2)
    return torch.from_numpy(found.astype(np.float32)).expand(3, -1, -1)


class ImageNetWithDegraded(Dataset[dict[str, Any]]):
    """Images of ImageNet with ``lr``, (H, W, 3) float32, cut alike.

    Args:
        base: The images.
        crop: Which part to show.
        degrade: Makes ``lr`` of a picture, (3, H, W) uint8 -> float32; None leaves it out.
        hr_factor: Divide the sides of the images by it first.
    """

    def __init__(
        self,
        base: ImageNetBase,
        crop: SquareCrop,
        degrade: Callable[[Tensor], Tensor] | None,
        hr_factor: int = 1,
    ) -> None:
        self.base = base
        self.crop = crop
        self.degrade = degrade
        self.hr_factor = hr_factor

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.base.data.labels_of(index)
        with error_context(f"image {item['file_path_']}"):
            picture = shrink(self.base.data.read(item["file_path_"]), self.hr_factor)
        view = self.crop.draw(*picture.shape[-2:])
        if self.degrade is not None:
            item["lr"] = view.apply(self.degrade(picture)).movedim(0, -1).contiguous().numpy()
        return {"image": to_unit_range(view.apply(picture)), **item}


class ImageNetScale(ImageNetWithDegraded):
    """Images with a coarser version; for both splits.

    Args:
        base: The images.
        size: Length that the short side gets, in pixels; None leaves images as they are.
        crop_size: Side of the square crops in pixels; by default ``size``.
        random_crop: Cut anywhere instead of from the middle.
        up_factor: ``lr`` is the image shrunk and enlarged by this factor; None leaves it out.
        hr_factor: Divide the sides of the images by it first.
        keep_mode: How ``lr`` is enlarged: nearest, bilinear or bicubic.
    """

    def __init__(
        self,
        base: ImageNetBase,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
    ) -> None:
        mode = interpolation_mode(keep_mode)
        degrade = partial(coarsen, factor=up_factor, mode=mode) if up_factor else None
        crop = SquareCrop(size, random_crop, crop_size=crop_size)
        super().__init__(base, crop, degrade, hr_factor or 1)


class ImageNetScaleTrain(ImageNetScale):
    """The training images with a coarser version. Other arguments as in :class:`ImageNetScale`.

    Args:
        random_crop: Cut anywhere instead of from the middle.
        config: ``root``: folder of ImageNet, see :class:`ImageNetTrain`.
    """

    def __init__(
        self, random_crop: bool = True, config: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(base=ImageNetTrain(config), random_crop=random_crop, **options)


class ImageNetScaleValidation(ImageNetScale):
    """The validation images with a coarser version; otherwise as :class:`ImageNetScaleTrain`."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(base=ImageNetValidation(config), **options)


class ImageNetEdgesTrain(ImageNetWithDegraded):
    """The training images with their edges.

    Args:
        random_crop: Cut anywhere instead of from the middle.
        size: Length that the short side gets, in pixels; None leaves images as they are.
        crop_size: Side of the square crops in pixels; by default ``size``.
        config: ``root``: folder of ImageNet, see :class:`ImageNetTrain`.
    """

    def __init__(
        self,
        random_crop: bool = True,
        size: int | None = None,
        crop_size: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        crop = SquareCrop(size, random_crop, crop_size=crop_size)
        super().__init__(ImageNetTrain(config), crop, edges)


class ImageNetEdgesValidation(ImageNetWithDegraded):
    """The validation images with their edges; otherwise as :class:`ImageNetEdgesTrain`."""

    def __init__(
        self,
        random_crop: bool = False,
        size: int | None = None,
        crop_size: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        crop = SquareCrop(size, random_crop, crop_size=crop_size)
        super().__init__(ImageNetValidation(config), crop, edges)
