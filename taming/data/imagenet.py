"""ImageNet under the original's names: plain, with depth maps, at lower resolution, with edges.

Files below the data root besides those of `taming.data.imagenet_base`:
``imagenet_depth/{train,val}/<synset>/*.png``, one map per image, whose RGBA bytes are float32
(``scripts/extract_depth.py`` makes them); for the examples with depth ``drin_examples.txt``,
``drin_images`` and ``drin_depth``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.crops import Crop, SquareCrop
from taming.data.imagenet_base import ImageNetBase, ImageNetTrain, ImageNetValidation
from taming.data.imagenet_base import give_synsets_from_indices as give_synsets_from_indices
from taming.data.imagenet_base import str_to_indices as str_to_indices
from taming.data.preprocessing import (
    check_interpolation,
    decode_depth,
    error_context,
    read_pair,
    resize,
    to_unit_range,
)
from taming.data.roots import UPSTREAM_LISTS, data_root, read_list, require, resolve
from taming.data.segmentation import mask_name
from taming.extras import naming_extras

# Restricted ImageNet: Tsipras et al., "Robustness may be at odds with accuracy", 2019, and more.
RIN = "30-32, 33-37, 151-268, 281-285, 80-100, 365-382, 389-397, 118-121, 300-319"


def _item(image_path: str, depth_path: str, crop: Crop) -> dict[str, np.ndarray]:
    image, depth = read_pair(image_path, depth_path, decode_depth)
    view = crop.view(*image.shape[-2:])
    return {"image": to_unit_range(view.apply(image)), "depth": view.apply(depth)[0].numpy()}


class BaseWithDepth(Dataset[dict[str, Any]]):
    """ImageNet items with ``depth`` added, (H, W) float32 in [-1, 1]; subclasses name the split.

    Args:
        sub_indices: Class numbers to keep, such as "30-32, 80"; None keeps all.
        config: ``root``: folder of ImageNet, as for `ImageNetTrain`; other keys are ignored.
        size: Length of the rescaled short side and side of the square crops in pixels. With
            ``random_crop``, crops are mirrored with probability 1/2.
        random_crop: Crop at random instead of at the centre.
        crop_size: Without ``size``: side of square crops at the image's own resolution, in pixels.
        root: Folder of the depth maps; by default ``imagenet_depth`` below TAMING_DATA or ``data``.

    Raises:
        FileNotFoundError: The folder of the images or of the depth maps does not exist.
    """

    images: ClassVar[type[ImageNetBase]]
    split: ClassVar[str]

    def __init__(
        self,
        sub_indices: str | None = None,
        config: Mapping[str, Any] | None = None,
        size: int | None = None,
        random_crop: bool = False,
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        self.base = self.images({"root": (config or {}).get("root"), "sub_indices": sub_indices})
        folder = resolve(root or "data/imagenet_depth") / self.split
        self.folder = require(folder, "depth maps of ImageNet", "scripts/extract_depth.py")
        self.crop = SquareCrop(None, random_crop, crop_size=crop_size)
        if size:
            self.crop = SquareCrop(size, random_crop, random_flip=random_crop)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.base.labels_of(index)
        depth_path = os.path.join(self.folder, mask_name(item["relpath"]))
        return {**item, **_item(item["file_path_"], depth_path, self.crop)}


class ImageNetTrainWithDepth(BaseWithDepth):
    """Training images with depth, cropped at random by default."""

    images, split = ImageNetTrain, "train"

    def __init__(
        self, random_crop: bool = True, sub_indices: str | None = None, **options: Any
    ) -> None:
        super().__init__(sub_indices, random_crop=random_crop, **options)


class ImageNetValidationWithDepth(BaseWithDepth):
    """Validation images with depth, cropped at the centre by default."""

    images, split = ImageNetValidation, "val"


class RINTrainWithDepth(ImageNetTrainWithDepth):
    """Restricted ImageNet's training images with depth (D-RIN)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(sub_indices=RIN, **options)


class RINValidationWithDepth(ImageNetValidationWithDepth):
    """Restricted ImageNet's validation images with depth (D-RIN)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(sub_indices=RIN, **options)


class DRINExamples(Dataset[dict[str, np.ndarray]]):
    """Example images with depth of the original repository, cropped at the centre.

    Args:
        size: Side of the square crops in pixels.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: The examples do not exist.
    """

    def __init__(self, size: int = 256, root: str | None = None) -> None:
        folder = data_root(root)
        names = read_list(folder / "drin_examples.txt")
        images, depths = (
            require(folder / part, "the D-RIN examples", UPSTREAM_LISTS)
            for part in ("drin_images", "drin_depth")
        )
        self.image_paths = [os.path.join(images, name) for name in names]
        self.depth_paths = [os.path.join(depths, mask_name(name)) for name in names]
        self.crop = SquareCrop(size)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _item(self.image_paths[index], self.depth_paths[index], self.crop)


def shrink(picture: Tensor, factor: int) -> Tensor:
    """Divide the sides of a picture by a factor, with antialiasing.

    Args:
        picture: (C, H, W) uint8.
        factor: Divisor; sides are rounded down.

    Returns:
        (C, H // factor, W // factor) uint8.

    Raises:
        ValueError: A side would be zero.
    """
    rows, columns = (side // factor for side in picture.shape[-2:])
    if not rows or not columns:
        raise ValueError(f"{tuple(picture.shape[-2:])} pixels cannot be divided by {factor}")
    return resize(picture, (rows, columns), "bicubic", antialias=True)


class ImageNetWithDegraded(Dataset[dict[str, Any]], ABC):
    """ImageNet items with ``lr`` added, (H, W, 3) float32, cropped like the image.

    Args:
        size: Length of the rescaled short side in pixels; None keeps the resolution.
        crop_size: Side of the square crops in pixels; by default ``size``.
        random_crop: Crop at random instead of at the centre.
        config: Options of `ImageNetBase`, such as ``root``, the folder of ImageNet.
    """

    images: ClassVar[type[ImageNetBase]]
    hr_factor: int = 1

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.base = self.images(config)
        self.crop = SquareCrop(size, random_crop, crop_size=crop_size)

    @abstractmethod
    def degrade(self, picture: Tensor) -> Tensor | None:
        """Turn (3, H, W) uint8 into ``lr``, (3, H, W) float32; None leaves ``lr`` out."""

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.base.labels_of(index)
        with error_context(f"image {item['file_path_']}"):
            picture = shrink(self.base.read(item["file_path_"]), self.hr_factor)
        view = self.crop.view(*picture.shape[-2:])
        if (degraded := self.degrade(picture)) is not None:
            item["lr"] = view.apply(degraded).movedim(0, -1).contiguous().numpy()  # (H, W, 3)
        return {"image": to_unit_range(view.apply(picture)), **item}


class ImageNetScale(ImageNetWithDegraded):
    """Images with a copy of lower resolution.

    Args:
        size: Length of the rescaled short side in pixels; None keeps the resolution.
        crop_size: Side of the square crops in pixels; by default ``size``.
        random_crop: Crop at random instead of at the centre.
        up_factor: Factor by which ``lr`` was shrunk and enlarged; None leaves ``lr`` out.
        hr_factor: Divisor of the image's own sides, applied first.
        keep_mode: Interpolation that enlarges ``lr``: nearest, bilinear or bicubic.
        config: Options of `ImageNetBase`, such as ``root``, the folder of ImageNet.
    """

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(size, crop_size, random_crop, config)
        self.up_factor = up_factor
        self.hr_factor = hr_factor or 1
        self.mode = check_interpolation(keep_mode)

    def degrade(self, picture: Tensor) -> Tensor | None:
        """Shrink by ``up_factor`` and enlarge again; float32 in [-1, 1]."""
        if not self.up_factor:
            return None
        height, width = picture.shape[-2:]
        coarse = shrink(picture, self.up_factor)
        return resize(coarse, (height, width), self.mode, antialias=True).float() / 127.5 - 1


class ImageNetScaleTrain(ImageNetScale):
    """Training images with a copy of lower resolution, cropped at random by default."""

    images = ImageNetTrain

    def __init__(self, random_crop: bool = True, **options: Any) -> None:
        super().__init__(random_crop=random_crop, **options)


class ImageNetScaleValidation(ImageNetScale):
    """Validation images with a copy of lower resolution."""

    images = ImageNetValidation


class ImageNetEdges(ImageNetWithDegraded):
    """Images with their edges."""

    def degrade(self, picture: Tensor) -> Tensor:
        """Find the edges with Canny's method: 0 or 1, equal in all channels."""
        with naming_extras():  # takes a second to import and is needed here only
            from skimage.color import rgb2gray
            from skimage.feature import canny

        found = canny(rgb2gray(to_unit_range(picture)), sigma=2)
        return torch.from_numpy(found.astype(np.float32)).expand(3, -1, -1)


class ImageNetEdgesTrain(ImageNetEdges):
    """Training images with their edges, cropped at random by default."""

    images = ImageNetTrain

    def __init__(self, random_crop: bool = True, **options: Any) -> None:
        super().__init__(random_crop=random_crop, **options)


class ImageNetEdgesValidation(ImageNetEdges):
    """Validation images with their edges."""

    images = ImageNetValidation
