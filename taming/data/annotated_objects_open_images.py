"""Annotated objects of Open Images."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, SplitType
from taming.data.roots import require, resolve

SOURCE = "https://storage.googleapis.com/openimages/web/download.html"
ANNOTATIONS = {
    "train": "oidv6-train-annotations-bbox.csv",
    "validation": "validation-annotations-bbox.csv",
    "test": "test-annotations-bbox.csv",
}


def _flag(text: str) -> bool:
    # -1 (unknown) counts as set; published models depend on this.
    return int(text) != 0


class AnnotatedObjectsOpenImages(AnnotatedObjectsDataset):
    """Annotated objects of Open Images.

    ``data_path`` contains folders of images (``train``, ``validation``, ``test``),
    ``class-descriptions-boxable.csv``, and the boxes: ``oidv6-train-annotations-bbox.csv``,
    ``validation-annotations-bbox.csv`` and ``test-annotations-bbox.csv``. Reading the 14.6 million
    training boxes takes minutes.

    Args:
        data_path: The folder; ``data/...`` lies below TAMING_DATA if that is set.
        split: "train", "validation" or "test".
        use_additional_parameters: Mark objects that are occluded, depicted or seen from inside in
            the token sequences.
        **options: Other arguments of `AnnotatedObjectsDataset`.

    Raises:
        FileNotFoundError: A part of the folder does not exist.
        ValueError: An option is out of range, or no image is left.
    """

    description_keys: ClassVar[tuple[str, ...]] = ("file_path", "file_name")

    def __init__(
        self,
        data_path: str,
        split: SplitType,
        use_additional_parameters: bool = False,
        **options: Any,
    ) -> None:
        if split not in ANNOTATIONS:
            raise ValueError(f"split must be one of {', '.join(ANNOTATIONS)}; got {split!r}")
        root = resolve(data_path)
        self.images = require(root / split, f"the {split} images", SOURCE)
        self.boxes = require(root / ANNOTATIONS[split], "the boxes", SOURCE)
        self.classes = require(root / "class-descriptions-boxable.csv", "the class names", SOURCE)
        super().__init__(use_additional_parameters=use_additional_parameters, **options)

    def load(self) -> tuple[dict[str, Category], Iterable[Annotation]]:
        """Read all categories by id, and all objects; their ``category_no`` is -1."""
        with open(self.classes, encoding="utf-8", newline="") as file:
            categories = {row[0]: Category(row[0], None, row[1]) for row in csv.reader(file)}
        return categories, self._annotations()

    def _annotations(self) -> Iterator[Annotation]:
        with open(self.boxes, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                left, right, top, bottom = (float(row[k]) for k in ("XMin", "XMax", "YMin", "YMax"))
                yield Annotation(
                    id=number,
                    image_id=row["ImageID"],
                    source=row["Source"],
                    category_id=row["LabelName"],
                    category_no=-1,
                    confidence=float(row["Confidence"]),
                    bbox=(left, top, right - left, bottom - top),
                    area=(right - left) * (bottom - top),
                    is_occluded=_flag(row["IsOccluded"]),
                    is_truncated=_flag(row["IsTruncated"]),
                    is_group_of=_flag(row["IsGroupOf"]),
                    is_depiction=_flag(row["IsDepiction"]),
                    is_inside=_flag(row["IsInside"]),
                )

    def image_path(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.images / f"{image_id:0>16}.jpg"

    def describe(self, image_id: str) -> dict[str, Any]:
        """Return the path and the name of an image's file."""
        path = self.image_path(image_id)
        return {"file_path": str(path), "file_name": path.name}
