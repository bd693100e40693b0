"""COCO 2017: images with captions and class maps of things and stuff.

Folders below the data root: ``coco`` with ``train2017``, ``val2017`` and ``annotations``, and, for
``use_stuffthing``, ``cocostuffthings`` with ``train2017`` and ``val2017``.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.crops import Crop, SquareCrop, Stretch
from taming.data.preprocessing import (
    decode_image,
    decode_mask,
    error_context,
    one_hot,
    read_pair,
    shift_classes,
    to_unit_range,
)
from taming.data.roots import data_root, require
from taming.data.segmentation import ExampleImages, mask_name
from taming.data.utils import refuse_text

N_LABELS = 183  # unlabelled, 91 things, 91 stuff
COCO = "https://cocodataset.org/#download"
STUFF_THINGS = "https://github.com/nightrome/cocostuff (stuffthingmaps_trainval2017.zip)"


class Examples(ExampleImages):
    """Example images of the original repository."""

    name = "coco"
    n_labels = N_LABELS
    shift_segmentation = True


def _indicators(mask: Tensor) -> np.ndarray:
    """Encode classes 0 to 181 as 1 to 182, and 255 (unlabelled) as 0."""
    return one_hot(shift_classes(mask), N_LABELS)


class CocoBase(Dataset[dict[str, Any]]):
    """Images, captions and class maps of one split; subclasses name it.

    Items have ``image``, (H, W, 3) float32 in [-1, 1]; ``caption``, a list with one caption,
    chosen at random on each access; ``segmentation``, (H, W, 183) float32 one-hot classes, or the
    map's colours in the format of ``image``; ``img_path``, ``seg_path`` and ``filename_``.

    Args:
        size: Length of the rescaled short side in pixels.
        onehot_segmentation: Return one-hot classes instead of colours; needs ``use_stuffthing``.
        use_stuffthing: Use the maps of things and stuff instead of COCO's own maps of stuff.
        crop_size: Side of the square crops in pixels; by default ``size``.
        force_no_crop: Rescale whole images to squares of ``size``, ignoring their aspect ratio.
        given_files: Names of class maps (``000000000139.png``); keep only their images.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: A part of the data set does not exist.
        ValueError: ``onehot_segmentation`` without ``use_stuffthing``, or ``given_files`` is a
            text.
    """

    split: ClassVar[str]
    random_crop: ClassVar[bool]

    def __init__(
        self,
        size: int,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        given_files: Collection[str] | None = None,
        root: str | None = None,
    ) -> None:
        if onehot_segmentation and not use_stuffthing:
            raise ValueError(
                "onehot_segmentation needs use_stuffthing: true, because COCO's own pixel maps "
                "hold colours instead of class numbers"
            )
        refuse_text("given_files", given_files)
        folder = data_root(root)
        self.images = require(folder / "coco" / self.split, f"the images {self.split}", COCO)
        self.maps = _folder_of_maps(folder, self.split, use_stuffthing)
        self.captions, names = _read_captions(folder, self.split)
        self.items = [n for n in names if given_files is None or mask_name(n[1]) in given_files]
        square = SquareCrop(size, self.random_crop, crop_size=crop_size)
        self.crop: Crop = Stretch(size) if force_no_crop else square
        self.decode_map = partial(decode_image, upright=False)
        self.encode_map = to_unit_range
        if onehot_segmentation:
            self.decode_map, self.encode_map = decode_mask, _indicators

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_id, name = self.items[index]
        image_path = os.path.join(self.images, name)
        map_path = os.path.join(self.maps, mask_name(name))
        image, segmentation = read_pair(image_path, map_path, self.decode_map)
        view = self.crop.view(*image.shape[-2:])
        captions = self.captions[image_id]
        with error_context(f"map {map_path}"):
            segmentation = self.encode_map(view.apply(segmentation, "nearest"))
        return {
            "image": to_unit_range(view.apply(image)),
            "caption": [captions[int(torch.randint(len(captions), ()))]],
            "segmentation": segmentation,
            "img_path": image_path,
            "seg_path": map_path,
            "filename_": name,
        }


def _folder_of_maps(root: Path, split: str, use_stuffthing: bool) -> Path:
    if use_stuffthing:
        folder = root / "cocostuffthings" / split
        return require(folder, "the maps of stuff and things", STUFF_THINGS)
    folder = root / "coco" / "annotations" / f"stuff_{split}_pixelmaps"
    return require(folder, "the pixel maps of the stuff annotations", COCO)


def _read_captions(root: Path, split: str) -> tuple[dict[int, list[str]], list[tuple[int, str]]]:
    """Return the captions by image id, and pairs (image id, file name)."""
    file = root / "coco" / "annotations" / f"captions_{split}.json"
    content = json.loads(require(file, "the captions", COCO).read_text(encoding="utf-8"))
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return captions, [(image["id"], image["file_name"]) for image in content["images"]]


class CocoImagesAndCaptionsTrain(CocoBase):
    """Training images, cropped at random."""

    split, random_crop = "train2017", True


class CocoImagesAndCaptionsValidation(CocoBase):
    """Validation images, cropped at the centre."""

    split, random_crop = "val2017", False
