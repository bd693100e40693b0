"""Portraits: CelebA-HQ, FFHQ, and both together.

Files below the data root: ``celebahq/*.npy``, each (1, 3, 1024, 1024) uint8; the images of
``ffhq``; and the lists ``{celebahq,ffhq}{train,validation}.txt`` of files in these folders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from taming.data.base import ConcatDatasetWithIndex, ImagePaths, NumpyPaths
from taming.data.crops import SquareCrop
from taming.data.preprocessing import View
from taming.data.roots import data_root, read_list, require
from taming.data.utils import refuse_text

# Reader and source of each set.
_SETS = {
    "celebahq": (NumpyPaths, "https://github.com/tkarras/progressive_growing_of_gans"),
    "ffhq": (ImagePaths, "https://github.com/NVlabs/ffhq-dataset (images1024x1024)"),
}


class FacesBase(Dataset[dict[str, Any]]):
    """One split of one set of portraits; subclasses name them.

    Args:
        size: Side of the square images in pixels.
        keys: Keys to keep of ``image`` and ``file_path_``; None keeps both.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: The folder of portraits or its list does not exist.
        ValueError: ``keys`` is a text.
    """

    name: ClassVar[str]
    split: ClassVar[str]

    def __init__(
        self, size: int, keys: Sequence[str] | None = None, root: str | None = None
    ) -> None:
        refuse_text("keys", keys)
        reader, source = _SETS[self.name]
        folder = require(data_root(root) / self.name, f"the portraits of {self.name}", source)
        files = read_list(data_root(root) / f"{self.name}{self.split}.txt")
        self.data = reader([os.path.join(folder, file) for file in files], size)
        self.keys = keys

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        return item if self.keys is None else {key: item[key] for key in self.keys}


class CelebAHQTrain(FacesBase):
    """Training portraits of CelebA-HQ."""

    name, split = "celebahq", "train"


class CelebAHQValidation(FacesBase):
    """Validation portraits of CelebA-HQ."""

    name, split = "celebahq", "validation"


class FFHQTrain(FacesBase):
    """Training portraits of FFHQ."""

    name, split = "ffhq", "train"


class FFHQValidation(FacesBase):
    """Validation portraits of FFHQ."""

    name, split = "ffhq", "validation"


class FacesHQBase(Dataset[dict[str, Any]]):
    """One split of CelebA-HQ and FFHQ together.

    Items also have ``class`` (0 for CelebA-HQ, 1 for FFHQ) and, with ``coord``, the key ``coord``:
    (H, W, 1) float32, the row-major position of each pixel in the uncropped image, in [0, 1).

    Args:
        size: Side of the square images in pixels.
        keys: Keys to keep of the portraits, ``image`` among them; None keeps all.
        crop_size: Side in pixels of the square cut from the image; None cuts nothing.
        coord: Add ``coord``.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: A folder of portraits or a list does not exist.
        ValueError: ``crop_size`` exceeds ``size``.
    """

    parts: ClassVar[tuple[type[FacesBase], ...]]
    random_crop: ClassVar[bool]

    def __init__(
        self,
        size: int,
        keys: Sequence[str] | None = None,
        crop_size: int | None = None,
        coord: bool = False,
        root: str | None = None,
    ) -> None:
        self.data = ConcatDatasetWithIndex([part(size, keys, root) for part in self.parts])
        self.crop = SquareCrop(size, self.random_crop, crop_size=crop_size)
        self.coord = coord

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, number = self.data[index]
        height, width, _ = item["image"].shape
        view = self.crop.view(height, width)
        item = {**item, "image": _cut(item["image"], view), "class": number}
        if self.coord:
            positions = np.arange(height * width).reshape(height, width, 1) / (height * width)
            item["coord"] = _cut(positions.astype(np.float32), view)
        return item


def _cut(picture: np.ndarray, view: View) -> np.ndarray:
    """Apply a view to (H, W, C)."""
    shown = view.apply(torch.from_numpy(picture).movedim(-1, 0))
    return shown.movedim(0, -1).contiguous().numpy()


class FacesHQTrain(FacesHQBase):
    """Training portraits, cropped at random."""

    parts = (CelebAHQTrain, FFHQTrain)
    random_crop = True


class FacesHQValidation(FacesHQBase):
    """Validation portraits, cropped at the centre."""

    parts = (CelebAHQValidation, FFHQValidation)
    random_crop = False
