"""Images with class maps (semantic segmentations) cropped alike.

Items have ``image``, (H, W, 3) float32 in [-1, 1], ``segmentation``, (H, W, n_labels) float32
one-hot classes, and the paths of both files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from taming.data.crops import Crop, SquareCrop
from taming.data.paths import compact
from taming.data.preprocessing import (
    check_interpolation,
    decode_mask,
    error_context,
    one_hot,
    read_pair,
    shift_classes,
    to_unit_range,
)
from taming.data.roots import UPSTREAM_LISTS, data_root, read_list, require


class SegmentationPaths(Dataset[dict[str, Any]]):
    """Images and class maps from two lists of files.

    Args:
        labels: Item key -> one value per image; ``file_path_`` holds the images' paths and
            ``segmentation_path_`` those of the class maps.
        crop: Chooses the part of each image that is shown.
        interpolation: Rescaling of the images: nearest, bilinear, bicubic, area or lanczos. Class
            maps always take the class of the nearest pixel.
        n_labels: Number of classes.
        shift_segmentation: Add one to all classes, so that 255 (of 16 bits 65535; unlabelled)
            becomes class 0.
    """

    def __init__(
        self,
        labels: Mapping[str, Sequence[Any]],
        crop: Crop,
        interpolation: str,
        n_labels: int,
        shift_segmentation: bool = False,
    ) -> None:
        self.labels = {name: compact(name, values) for name, values in labels.items()}
        self.crop = crop
        self.interpolation = check_interpolation(interpolation)
        self.n_labels = n_labels
        self.shift_segmentation = shift_segmentation

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {name: values[index] for name, values in self.labels.items()}
        image, mask = read_pair(item["file_path_"], item["segmentation_path_"], decode_mask)
        if self.shift_segmentation:
            mask = shift_classes(mask)
        view = self.crop.view(*image.shape[-2:])
        item["image"] = to_unit_range(view.apply(image, self.interpolation))
        with error_context(f"map {item['segmentation_path_']}"):
            mask = view.apply(mask, "nearest")
            item["segmentation"] = one_hot(mask, self.n_labels)
        return item


def mask_name(image_name: str) -> str:
    """Return the file name of an image's class or depth map: the same with extension ``.png``."""
    return f"{os.path.splitext(image_name)[0]}.png"


class SegmentationBase(SegmentationPaths):
    """Images named by a text file, and class maps of the same names in another folder.

    Args:
        data_csv: Text file, one image per line, relative to ``data_root``.
        data_root: Folder of the images.
        segmentation_root: Folder of the class maps (PNG).
        size: Side of the square crops in pixels; None keeps images whole.
        random_crop: Crop at random instead of at the centre.
        interpolation: Rescaling of the images: nearest, bilinear, bicubic, area or lanczos.
        n_labels: Number of classes.
        shift_segmentation: Add one to all classes, so that 255 (of 16 bits 65535; unlabelled)
            becomes class 0.

    Raises:
        FileNotFoundError: The list does not exist.
        ValueError: The list is empty, or an option is out of range.
    """

    def __init__(
        self,
        data_csv: str,
        data_root: str,
        segmentation_root: str,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        n_labels: int = 182,
        shift_segmentation: bool = False,
    ) -> None:
        names = read_list(data_csv)
        folder, maps = os.path.expanduser(data_root), os.path.expanduser(segmentation_root)
        labels = {
            "relative_file_path_": names,
            "file_path_": [os.path.join(folder, name) for name in names],
            "segmentation_path_": [os.path.join(maps, mask_name(name)) for name in names],
        }
        crop = SquareCrop(size, random_crop)
        super().__init__(labels, crop, interpolation, n_labels, shift_segmentation)


class ExampleImages(SegmentationBase):
    """The examples of a data set that come with the original repository; subclasses name the set.

    Args:
        size: Side of the square crops in pixels; None keeps images whole.
        random_crop: Crop at random instead of at the centre.
        interpolation: Rescaling of the images: nearest, bilinear, bicubic, area or lanczos.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: The examples do not exist.
    """

    name: str
    shift_segmentation = False

    def __init__(
        self,
        size: int | None = 256,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        root: str | None = None,
    ) -> None:
        paths = [f"{self.name}_{part}" for part in ("examples.txt", "images", "segmentations")]
        what = f"the {self.name} examples"
        names, images, masks = (
            str(require(data_root(root) / path, what, UPSTREAM_LISTS)) for path in paths
        )
        options = (size, random_crop, interpolation, self.n_labels, self.shift_segmentation)
        super().__init__(names, images, masks, *options)
