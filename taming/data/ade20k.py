"""ADE20k: scenes with maps of 150 classes; class 0 is everything else.

Files below the data root: ``ade20k_root`` with the content of the archive (``images``,
``annotations``, ``sceneCategories.txt``), and the lists ``ade20k_train.txt`` and
``ade20k_test.txt``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from taming.data.crops import SquareCrop
from taming.data.roots import data_root, read_list, require
from taming.data.segmentation import ExampleImages, SegmentationPaths, mask_name
from taming.util import DataError

N_LABELS = 151
ARCHIVE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


class Examples(ExampleImages):
    """Example scenes of the original repository."""

    name = "ade20k"
    n_labels = N_LABELS


def _read_scenes(path: Path) -> dict[str, str]:
    pairs = [line.split() for line in read_list(path, ARCHIVE)]
    if wrong := [" ".join(pair) for pair in pairs if len(pair) != 2]:
        raise DataError(f"{path} has the line {wrong[0]!r}, expected the name of an image, a scene")
    return {name: scene for name, scene in pairs}


def _read_labels(root: Path, list_name: str) -> dict[str, list[str]]:
    folder = require(root / "ade20k_root", "the content of ADEChallengeData2016.zip", ARCHIVE)
    scenes = _read_scenes(folder / "sceneCategories.txt")
    images = read_list(root / list_name)
    if unknown := [name for name in images if Path(name).stem not in scenes]:
        raise DataError(
            f"{folder / 'sceneCategories.txt'} has no scene for {unknown[0]} of {root / list_name}"
        )
    masks = [mask_name(name) for name in images]
    return {
        "relative_file_path_": images,
        "file_path_": [os.path.join(folder, "images", name) for name in images],
        "relative_segmentation_path_": masks,
        "segmentation_path_": [os.path.join(folder, "annotations", name) for name in masks],
        "scene_category": [scenes[Path(name).stem] for name in images],
    }


class ADE20kBase(SegmentationPaths):
    """Scenes named by a list; items also have ``scene_category``.

    Args:
        config: Ignored, as in the original.
        size: Length of the rescaled short side in pixels; None keeps the resolution.
        random_crop: Crop at random instead of at the centre.
        interpolation: Rescaling of the images: nearest, bilinear, bicubic, area or lanczos.
        crop_size: Side of the square crops in pixels; by default ``size``.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: A part of the data set does not exist.
        DataError: An image has no scene, or a line of the scenes is not one; names it.
    """

    list_name: ClassVar[str]

    def __init__(
        self,
        config: Any = None,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        labels = _read_labels(data_root(root), self.list_name)
        crop = SquareCrop(size, random_crop, crop_size=crop_size)
        super().__init__(labels, crop, interpolation, N_LABELS)


class ADE20kTrain(ADE20kBase):
    """Training scenes, cropped at random by default."""

    list_name = "ade20k_train.txt"

    def __init__(
        self, config: Any = None, size: int | None = None, random_crop: bool = True, **options: Any
    ) -> None:
        super().__init__(config, size, random_crop, **options)


class ADE20kValidation(ADE20kBase):
    """Validation scenes, cropped at the centre by default."""

    list_name = "ade20k_test.txt"
