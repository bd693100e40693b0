"""ADE20k: scenes with class maps of 150 classes, and class 0 for everything else.

Below the data root: ``ade20k_root`` with the content of the archive (``images``, ``annotations``,
``sceneCategories.txt``), and the lists ``ade20k_train.txt`` and ``ade20k_test.txt``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from taming.data.crops import SquareCrop
from taming.data.roots import data_root, read_list, require
from taming.data.segmentation import ExampleImages, SegmentationPaths, mask_name

N_LABELS = 151
ARCHIVE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


class Examples(ExampleImages):
    """The example scenes of the original repository.

    Args:
        size: Side of the square crops in pixels; None leaves images whole.
        **options: As in :class:`~taming.data.segmentation.ExampleImages`.
    """

    def __init__(self, size: int | None = 256, **options: Any) -> None:
        super().__init__(name="ade20k", n_labels=N_LABELS, size=size, **options)


def _read_labels(root: Path, list_name: str) -> dict[str, list[str]]:
    folder = require(root / "ade20k_root", "the content of ADEChallengeData2016.zip", ARCHIVE)
    scenes = dict(line.split() for line in read_list(folder / "sceneCategories.txt", ARCHIVE))
    images = read_list(root / list_name)
    masks = [mask_name(name) for name in images]
    return {
        "relative_file_path_": images,
        "file_path_": [os.path.join(folder, "images", name) for name in images],
        "relative_segmentation_path_": masks,
        "segmentation_path_": [os.path.join(folder, "annotations", name) for name in masks],
        "scene_category": [scenes[Path(name).stem] for name in images],
    }


class ADE20kBase(SegmentationPaths):
    """The scenes that a list names. Items also have ``scene_category``.

    Args:
        list_name: File name of the list below the data root.
        config: Not used; the original took and ignored it.
        size: Length that the short side gets, in pixels; None leaves images as they are.
        random_crop: Cut anywhere instead of from the middle.
        interpolation: How images are rescaled: nearest, bilinear, bicubic, area or lanczos.
        crop_size: Side of the square crops in pixels; by default ``size``.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: A part of the data set is not there.
    """

    def __init__(
        self,
        list_name: str,
        config: Any = None,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        labels = _read_labels(data_root(root), list_name)
        crop = SquareCrop(size, random_crop, crop_size=crop_size)
        super().__init__(labels, crop, interpolation, N_LABELS)


class ADE20kTrain(ADE20kBase):
    """The training scenes, cut anywhere by default. Arguments are those of :class:`ADE20kBase`."""

    def __init__(self, random_crop: bool = True, **options: Any) -> None:
        super().__init__(list_name="ade20k_train.txt", random_crop=random_crop, **options)


class ADE20kValidation(ADE20kBase):
    """The validation scenes. Arguments are those of :class:`ADE20kBase`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(list_name="ade20k_test.txt", **options)
