"""ImageNet with depth maps, the Restricted ImageNet (RIN) part of it, and examples with depth.

Below the data root: ``imagenet_depth/{train,val}/<synset>/*.png``, one map per image, whose RGBA
bytes are float32 (``scripts/extract_depth.py`` makes them); ImageNet itself; for the examples
``drin_examples.txt``, ``drin_images`` and ``drin_depth``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from taming.data.crops import Crop, SquareCrop
from taming.data.imagenet_base import ImageNetBase, ImageNetTrain, ImageNetValidation
from taming.data.preprocessing import decode_depth, read_pair, to_unit_range
from taming.data.roots import UPSTREAM_LISTS, data_root, read_list, require, resolve

# Restricted ImageNet: Tsipras et al., "Robustness may be at odds with accuracy", 2019, and more.
RIN = "30-32, 33-37, 151-268, 281-285, 80-100, 365-382, 389-397, 118-121, 300-319"


def _item(image_path: str, depth_path: str, crop: Crop) -> dict[str, np.ndarray]:
    image, depth = read_pair(image_path, depth_path, decode_depth)
    view = crop.draw(*image.shape[-2:])
    return {"image": to_unit_range(view.apply(image)), "depth": view.apply(depth)[0].numpy()}


def _depth_name(relpath: str) -> str:
    return f"{os.path.splitext(relpath)[0]}.png"


class BaseWithDepth(Dataset[dict[str, Any]]):
    """Images of ImageNet with ``depth``, (H, W) float32 in [-1, 1], besides what they have.

    Args:
        base: The images.
        split: Folder below ``root``: "train" or "val".
        size: Side of the square crops in pixels, to which the short side is rescaled first. With
            ``random_crop``, every other one is mirrored.
        random_crop: Cut anywhere instead of from the middle.
        crop_size: Without ``size``: side of squares cut at the images' own resolution.
        root: Folder of the depth maps; by default ``imagenet_depth`` below TAMING_DATA or ``data``.

    Raises:
        FileNotFoundError: The folder of the depth maps is not there.
    """

    def __init__(
        self,
        base: ImageNetBase,
        split: str,
        size: int | None,
        random_crop: bool,
        crop_size: int | None,
        root: str | None,
    ) -> None:
        folder = resolve(root or "data/imagenet_depth") / split
        self.folder = require(folder, "depth maps of ImageNet", "scripts/extract_depth.py")
        self.base = base
        self.crop = SquareCrop(None, random_crop, crop_size=crop_size)
        if size:
            self.crop = SquareCrop(size, random_crop, random_flip=random_crop)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.base.data.labels_of(index)
        depth_path = os.path.join(self.folder, _depth_name(item["relpath"]))
        return {**item, **_item(item["file_path_"], depth_path, self.crop)}


def _config(config: Mapping[str, Any] | None, sub_indices: str | None) -> dict[str, Any]:
    return {"root": (config or {}).get("root"), "sub_indices": sub_indices}


class ImageNetTrainWithDepth(BaseWithDepth):
    """The training images with depth.

    Args:
        random_crop: Cut anywhere instead of from the middle.
        sub_indices: Class numbers to take, such as "30-32, 80"; None takes all.
        config: ``root``: folder of ImageNet, see :class:`ImageNetTrain`; nothing else is read.
        size: See :class:`BaseWithDepth`, also for the arguments that follow.
    """

    def __init__(
        self,
        random_crop: bool = True,
        sub_indices: str | None = None,
        config: Mapping[str, Any] | None = None,
        size: int | None = None,
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        base = ImageNetTrain(_config(config, sub_indices))
        super().__init__(base, "train", size, random_crop, crop_size, root)


class ImageNetValidationWithDepth(BaseWithDepth):
    """The validation images with depth. Arguments are as for :class:`ImageNetTrainWithDepth`."""

    def __init__(
        self,
        sub_indices: str | None = None,
        config: Mapping[str, Any] | None = None,
        size: int | None = None,
        random_crop: bool = False,
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        base = ImageNetValidation(_config(config, sub_indices))
        super().__init__(base, "val", size, random_crop, crop_size, root)


class RINTrainWithDepth(ImageNetTrainWithDepth):
    """Restricted ImageNet's training images with depth (D-RIN)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(sub_indices=RIN, **options)


class RINValidationWithDepth(ImageNetValidationWithDepth):
    """Restricted ImageNet's validation images with depth (D-RIN)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(sub_indices=RIN, **options)


class DRINExamples(Dataset[dict[str, np.ndarray]]):
    """The example images with depth of the original repository, cut from the middle.

    Args:
        size: Side of the square crops in pixels.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: They are not there.
    """

    def __init__(self, size: int = 256, root: str | None = None) -> None:
        folder = data_root(root)
        names = read_list(folder / "drin_examples.txt")
        images, depths = (
            require(folder / part, "the D-RIN examples", UPSTREAM_LISTS)
            for part in ("drin_images", "drin_depth")
        )
        self.image_paths = [os.path.join(images, name) for name in names]
        self.depth_paths = [os.path.join(depths, _depth_name(name)) for name in names]
        self.crop = SquareCrop(size)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _item(self.image_paths[index], self.depth_paths[index], self.crop)
