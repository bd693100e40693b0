"""Annotated objects of COCO 2017: things, stuff, or both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, ImageDescription
from taming.data.roots import require, resolve

SOURCE = "https://cocodataset.org/#download (2017 images and annotations)"
FOLDERS = {"train": "train2017", "validation": "val2017"}


class AnnotatedObjectsCoco(AnnotatedObjectsDataset):
    """Annotated objects of COCO 2017.

    ``data_path`` contains the images in ``train2017`` and ``val2017``, and ``annotations`` with
    ``{instances,stuff}_{train,val}2017.json``.

    Args:
        data_path: The folder; ``data/...`` lies below TAMING_DATA if that is set.
        split: "train" or "validation".
        use_things: Include objects such as people and cars.
        use_stuff: Include regions such as sky and grass.
        legacy_group_bit: Never mark crowds as groups in the token sequences
            (``use_group_parameter``): the original meant to mark them but did not, and its
            published models depend on it. False marks them.
        **options: Other arguments of `AnnotatedObjectsDataset`.

    Raises:
        FileNotFoundError: A part of the folder does not exist.
        ValueError: An option is out of range, or no image is left.
    """

    description_keys: ClassVar[tuple[str, ...]] = ImageDescription._fields

    def __init__(
        self,
        data_path: str,
        split: Literal["train", "validation"],
        use_things: bool = True,
        use_stuff: bool = True,
        legacy_group_bit: bool = True,
        **options: Any,
    ) -> None:
        if split not in FOLDERS:
            raise ValueError(f"split must be 'train' or 'validation' for COCO, got {split!r}")
        if not use_things and not use_stuff:
            raise ValueError("use_things and use_stuff must not both be false: no object is left")
        root, folder = resolve(data_path), FOLDERS[split]
        self.images = require(root / folder, f"the images {folder}", SOURCE)
        self.annotation_files = [
            require(root / "annotations" / f"{kind}_{folder}.json", "the annotations", SOURCE)
            for kind, used in (("instances", use_things), ("stuff", use_stuff))
            if used
        ]
        self.legacy_group_bit = legacy_group_bit
        self.descriptions: dict[str, ImageDescription] = {}
        super().__init__(**options)

    def load(self) -> tuple[dict[str, Category], Iterable[Annotation]]:
        """Read all categories by id, and all objects; their ``category_no`` is -1."""
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in self.annotation_files]
        for image in contents[0]["images"]:
            self.descriptions[str(image["id"])] = ImageDescription(
                id=image["id"],
                file_name=image["file_name"],
                original_size=(image["width"], image["height"]),
                license=image.get("license"),
                coco_url=image.get("coco_url"),
                date_captured=image.get("date_captured"),
                flickr_url=image.get("flickr_url"),
            )
        categories = {
            str(c["id"]): Category(str(c["id"]), c["supercategory"], c["name"])
            for content in contents
            for c in content["categories"]
            if c["name"] != "other"
        }
        return categories, self._annotations(contents)

    def _annotations(self, contents: list[dict[str, Any]]) -> Iterator[Annotation]:
        for annotation in (a for content in contents for a in content["annotations"]):
            image_id = str(annotation["image_id"])
            if image_id not in self.descriptions:
                raise ValueError(
                    f"object {annotation['id']} refers to image {image_id}, which does not exist"
                )
            width, height = self.descriptions[image_id].original_size
            left, top, box_width, box_height = annotation["bbox"]
            bbox = (left / width, top / height, box_width / width, box_height / height)
            yield Annotation(
                id=annotation["id"],
                area=bbox[2] * bbox[3],
                is_group_of=bool(annotation["iscrowd"]) and not self.legacy_group_bit,
                image_id=annotation["image_id"],
                bbox=bbox,
                category_id=str(annotation["category_id"]),
                category_no=-1,
            )

    def image_path(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.images / self.descriptions[image_id].file_name

    def describe(self, image_id: str) -> dict[str, Any]:
        """Return COCO's description of an image."""
        return self.descriptions[image_id]._asdict()
