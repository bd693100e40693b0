"""Portraits: CelebA-HQ, FFHQ, and both together.

Below the data root: ``celebahq`` with ``.npy`` files of (1, 3, 1024, 1024) uint8, ``ffhq`` with
images, and the lists ``{celebahq,ffhq}{train,validation}.txt`` of files in these folders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from taming.data.base import ConcatDatasetWithIndex, ImagePaths, NumpyPaths
from taming.data.crops import SquareCrop
from taming.data.preprocessing import View
from taming.data.roots import data_root, read_list, require

# How each set is read, and where it comes from.
_SETS = {
    "celebahq": (NumpyPaths, "https://github.com/tkarras/progressive_growing_of_gans"),
    "ffhq": (ImagePaths, "https://github.com/NVlabs/ffhq-dataset (images1024x1024)"),
}


class FacesBase(Dataset[dict[str, Any]]):
    """The portraits that one list names.

    Args:
        name: "celebahq" or "ffhq".
        split: "train" or "validation".
        size: Side of the square images in pixels.
        keys: What items keep, of ``image`` and ``file_path_``; None keeps both.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: The folder of the portraits or the list is not there.
    """

    def __init__(
        self,
        name: str,
        split: str,
        size: int,
        keys: Sequence[str] | None = None,
        root: str | None = None,
    ) -> None:
        reader, source = _SETS[name]
        folder = require(data_root(root) / name, f"the portraits of {name}", source)
        names = read_list(data_root(root) / f"{name}{split}.txt")
        self.data = reader([os.path.join(folder, name) for name in names], size)
        self.keys = keys

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        return item if self.keys is None else {key: item[key] for key in self.keys}


class CelebAHQTrain(FacesBase):
    """The training portraits of CelebA-HQ. Arguments are those of :class:`FacesBase`."""

    def __init__(
        self, size: int, keys: Sequence[str] | None = None, root: str | None = None
    ) -> None:
        super().__init__("celebahq", "train", size, keys, root)


class CelebAHQValidation(FacesBase):
    """The validation portraits of CelebA-HQ. Arguments are those of :class:`FacesBase`."""

    def __init__(
        self, size: int, keys: Sequence[str] | None = None, root: str | None = None
    ) -> None:
        super().__init__("celebahq", "validation", size, keys, root)


class FFHQTrain(FacesBase):
    """The training portraits of FFHQ. Arguments are those of :class:`FacesBase`."""

    def __init__(
        self, size: int, keys: Sequence[str] | None = None, root: str | None = None
    ) -> None:
        super().__init__("ffhq", "train", size, keys, root)


class FFHQValidation(FacesBase):
    """The validation portraits of FFHQ. Arguments are those of :class:`FacesBase`."""

    def __init__(
        self, size: int, keys: Sequence[str] | None = None, root: str | None = None
    ) -> None:
        super().__init__("ffhq", "validation", size, keys, root)


class FacesHQBase(Dataset[dict[str, Any]]):
    """CelebA-HQ and FFHQ together.

    Items also have ``class`` (0 for CelebA-HQ, 1 for FFHQ) and, if asked for, ``coord``,
    (H, W, 1) float32: every pixel's place in the uncut image, row by row, from 0 up to 1.

    Args:
        split: "train" or "validation".
        random_crop: Cut anywhere instead of from the middle.
        size: Side of the square images in pixels.
        keys: What items keep of the portraits; must name ``image``. None keeps everything.
        crop_size: Side of the square cut from the square image in pixels; None cuts nothing.
        coord: Add ``coord``.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: A folder of portraits or a list is not there.
        ValueError: ``crop_size`` exceeds ``size``.
    """

    def __init__(
        self,
        split: str,
        random_crop: bool,
        size: int,
        keys: Sequence[str] | None = None,
        crop_size: int | None = None,
        coord: bool = False,
        root: str | None = None,
    ) -> None:
        sets = [FacesBase(name, split, size, keys, root) for name in _SETS]
        self.data = ConcatDatasetWithIndex(sets)
        self.crop = SquareCrop(size, random_crop, crop_size=crop_size)
        self.coord = coord

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, number = self.data[index]
        height, width, _ = item["image"].shape
        view = self.crop.draw(height, width)
        item = {**item, "image": _cut(item["image"], view), "class": number}
        if self.coord:
            places = np.arange(height * width).reshape(height, width, 1) / (height * width)
            item["coord"] = _cut(places.astype(np.float32), view)
        return item


def _cut(picture: np.ndarray, view: View) -> np.ndarray:
    """Show a view of (H, W, C)."""
    shown = view.apply(torch.from_numpy(picture).movedim(-1, 0))
    return shown.movedim(0, -1).contiguous().numpy()


class FacesHQTrain(FacesHQBase):
    """The training portraits, cut anywhere. Arguments are those of :class:`FacesHQBase`."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(split="train", random_crop=True, size=size, **options)


class FacesHQValidation(FacesHQBase):
    """The validation portraits, cut in the middle. Arguments are those of :class:`FacesHQBase`."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(split="validation", random_crop=False, size=size, **options)
