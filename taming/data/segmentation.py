"""Images with class maps (semantic segmentations), cut alike.

An item has ``image``, (H, W, 3) float32 in [-1, 1], ``segmentation``, (H, W, n_labels) float32
indicators of each pixel's class, and the paths of both files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode

from taming.data.crops import Crop, SquareCrop
from taming.data.preprocessing import (
    decode_mask,
    error_context,
    interpolation_mode,
    one_hot,
    read_pair,
    to_unit_range,
)
from taming.data.roots import UPSTREAM_LISTS, data_root, read_list, require


class SegmentationPaths(Dataset[dict[str, Any]]):
    """A list of images and a list of their class maps.

    Args:
        labels: Name -> one value per image, added to the items; ``file_path_`` names the images
            and ``segmentation_path_`` the class maps.
        crop: Which part to show.
        interpolation: How images are rescaled: nearest, bilinear, bicubic, area or lanczos. Class
            maps are always rescaled to the nearest pixel's class.
        n_labels: Number of classes.
        shift_segmentation: Add one to all classes, so that 255 (unlabelled) becomes class 0.
    """

    def __init__(
        self,
        labels: Mapping[str, Sequence[Any]],
        crop: Crop,
        interpolation: str,
        n_labels: int,
        shift_segmentation: bool = False,
    ) -> None:
        self.labels = labels
        self.crop = crop
        self.interpolation = interpolation_mode(interpolation)
        self.n_labels = n_labels
        self.shift_segmentation = shift_segmentation

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {name: values[index] for name, values in self.labels.items()}
        image, mask = read_pair(item["file_path_"], item["segmentation_path_"], decode_mask)
        if self.shift_segmentation:
            mask = mask + 1  # uint8: 255 wraps round to 0
        view = self.crop.draw(*image.shape[-2:])
        item["image"] = to_unit_range(view.apply(image, self.interpolation))
        with error_context(f"map {item['segmentation_path_']}"):
            mask = view.apply(mask, InterpolationMode.NEAREST)
            item["segmentation"] = one_hot(mask, self.n_labels)
        return item


def mask_name(image_name: str) -> str:
    """Return the file name of an image's class map: the same, as PNG."""
    return f"{os.path.splitext(image_name)[0]}.png"


class SegmentationBase(SegmentationPaths):
    """Images that a text file names, and their class maps under the same names in another folder.

    Args:
        data_csv: Text file, one image per line, relative to ``data_root``.
        data_root: Folder of the images.
        segmentation_root: Folder of the class maps (PNG).
        size: Side of the square crops in pixels; None leaves images whole.
        random_crop: Cut anywhere instead of from the middle.
        interpolation: How images are rescaled: nearest, bilinear, bicubic, area or lanczos.
        n_labels: Number of classes.
        shift_segmentation: Add one to all classes, so that 255 (unlabelled) becomes class 0.

    Raises:
        FileNotFoundError: The list does not exist.
        ValueError: It is empty, or an option is out of range.
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
        labels = {
            "relative_file_path_": names,
            "file_path_": [os.path.join(data_root, name) for name in names],
            "segmentation_path_": [os.path.join(segmentation_root, mask_name(n)) for n in names],
        }
        crop = SquareCrop(size, random_crop)
        super().__init__(labels, crop, interpolation, n_labels, shift_segmentation)


class ExampleImages(SegmentationBase):
    """The few images of a data set that come with the original repository.

    Args:
        name: The data set, such as ``coco``.
        n_labels: Number of classes.
        shift_segmentation: Add one to all classes, so that 255 (unlabelled) becomes class 0.
        size: Side of the square crops in pixels; None leaves images whole.
        random_crop: Cut anywhere instead of from the middle.
        interpolation: How images are rescaled: nearest, bilinear, bicubic, area or lanczos.
        root: Folder of the data sets; by default TAMING_DATA, or ``data``.

    Raises:
        FileNotFoundError: They are not there.
    """

    def __init__(
        self,
        name: str,
        n_labels: int,
        shift_segmentation: bool = False,
        size: int | None = 256,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        root: str | None = None,
    ) -> None:
        paths = [f"{name}_examples.txt", f"{name}_images", f"{name}_segmentations"]
        what = f"the {name} examples"
        names, images, masks = (
            str(require(data_root(root) / path, what, UPSTREAM_LISTS)) for path in paths
        )
        super().__init__(
            names, images, masks, size, random_crop, interpolation, n_labels, shift_segmentation
        )
