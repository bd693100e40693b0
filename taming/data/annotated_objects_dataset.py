"""Images with annotated objects, as pictures and as token sequences."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from taming.data.conditional_builder.builder import ObjectsConditionalBuilder
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import (
    ObjectsCenterPointsConditionalBuilder,
)
from taming.data.crops import Crop, RandomSquare, SquareCrop, Stretch
from taming.data.helper_types import Annotation, Category, CropMethodType
from taming.data.preprocessing import error_context, to_unit_range
from taming.data.utils import refuse_text
from taming.decoding import decode_image
from taming.util import get_obj_from_str

logger = logging.getLogger(__name__)

BUILDERS: dict[str, type[ObjectsConditionalBuilder[Any]]] = {
    "objects_center_points": ObjectsCenterPointsConditionalBuilder,
    "objects_bbox": ObjectsBoundingBoxConditionalBuilder,
}
PICTURE_KEYS = ("image", "image_path", "crop_bbox", "flipped")

# The original numbers Open Images' Suitcase last; published models depend on this order.
_LAST_CATEGORY = "/m/01s55n"


def build_crop(method: CropMethodType, size: int, random_flip: bool) -> Crop:
    """Build the crop of a method's name.

    Args:
        method: "none" (rescale the whole picture to a square), "center" (a square at the centre),
            "random-1d" (a square at random along the long side), or "random-2d" (a square of
            random side, at least ``size``, at random).
        size: Side of the result in pixels.
        random_flip: Mirror pictures with probability 1/2.

    Raises:
        ValueError: The method is unknown.
    """
    if method == "none":
        return Stretch(size, random_flip)
    if method == "random-2d":
        return RandomSquare(size, random_flip)
    if method in ("center", "random-1d"):
        return SquareCrop(size, random_crop=method == "random-1d", random_flip=random_flip)
    valid = "none, center, random-1d or random-2d"
    raise ValueError(f"crop_method must be {valid}, got {method!r}")


class AnnotatedObjectsDataset(Dataset[dict[str, Any]], ABC):
    """Images with annotated objects; subclasses read the files of a data set.

    Items have those of the following that ``keys`` names: the data set's description of the image
    (``file_name`` and others); ``annotations``, a list of `Annotation`; ``image``,
    (H, W, 3) float32 in [-1, 1], ``image_path``, ``crop_bbox`` (left, top, width and height of the
    crop as fractions of the image) and ``flipped``; ``objects_bbox`` and
    ``objects_center_points``, int64 tokens of the objects in the crop.

    Args:
        keys: Keys of the items; an empty list keeps all. Without ``image`` nothing is cropped.
        target_image_size: Side of the square pictures in pixels.
        min_object_area: Drop objects whose box covers at most this fraction of the image.
        min_objects_per_image: Drop images with fewer objects.
        max_objects_per_image: Drop images with more objects.
        crop_method: "none", "center", "random-1d" or "random-2d", as for `build_crop`.
        random_flip: Mirror pictures with probability 1/2.
        no_tokens: Vocabulary size of the token sequences.
        use_group_parameter: Mark groups of objects in the sequences.
        encode_crop: Append the crop to the sequences.
        category_allow_list_target: Dotted path to a list of (category name, number of objects);
            objects of other categories are dropped.
        category_mapping_target: Dotted path to a dictionary of category ids; objects of a key
            count as objects of its value.
        no_object_classes: Number of categories that get tokens; by default those in use.
        use_additional_parameters: Also mark objects that are occluded, depicted or seen from
            inside.

    Attributes:
        description_keys: Keys of the dictionary that `describe` returns.
        categories: Categories in use, by id.
        category_ids: Their ids, by number.
        category_number: Their numbers, by id.
        annotations: Objects by image id.
        image_ids: Ids of the images, in the order of the items.
        no_classes: Number of categories that have tokens.
        conditional_builders: Item key -> the builder of its token sequences.

    Raises:
        ValueError: A key or method is unknown, the vocabulary is too small, or no image is left.
    """

    description_keys: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        keys: Sequence[str],
        target_image_size: int,
        min_object_area: float,
        min_objects_per_image: int,
        max_objects_per_image: int,
        crop_method: CropMethodType,
        random_flip: bool,
        no_tokens: int,
        use_group_parameter: bool,
        encode_crop: bool,
        category_allow_list_target: str | None = None,
        category_mapping_target: str | None = None,
        no_object_classes: int | None = None,
        use_additional_parameters: bool = False,
    ) -> None:
        self.keys = _check_keys(keys, self.description_keys)
        self.crop = build_crop(crop_method, target_image_size, random_flip)
        categories, annotations = self.load()
        if category_allow_list_target:
            categories = _allowed(categories, get_obj_from_str(category_allow_list_target))
        mapping = get_obj_from_str(category_mapping_target) if category_mapping_target else {}
        self.categories = {i: c for i, c in categories.items() if i not in mapping}
        self.category_ids = sorted(self.categories, key=lambda i: (i == _LAST_CATEGORY, i))
        self.category_number = {i: number for number, i in enumerate(self.category_ids)}
        grouped = self._group(annotations, mapping, min_object_area)
        self.annotations = _within(grouped, min_objects_per_image, max_objects_per_image)
        self.image_ids = list(self.annotations)
        self.no_classes = no_object_classes or len(self.categories)
        vocabulary = (self.no_classes, max_objects_per_image, no_tokens)
        flags = (encode_crop, use_group_parameter, use_additional_parameters)
        self.conditional_builders = {
            key: builder(*vocabulary, *flags) for key, builder in BUILDERS.items()
        }

    @abstractmethod
    def load(self) -> tuple[dict[str, Category], Iterable[Annotation]]:
        """Read all categories by id, and all objects; their ``category_no`` is -1 for now."""

    @abstractmethod
    def image_path(self, image_id: str) -> Path:
        """Return the path of an image."""

    @abstractmethod
    def describe(self, image_id: str) -> dict[str, Any]:
        """Return the data set's description of an image, with ``file_name`` in it."""

    def _group(
        self, annotations: Iterable[Annotation], mapping: Mapping[str, str], min_area: float
    ) -> dict[str, list[Annotation]]:
        """Drop small objects and unused categories, number the rest, and group them by image."""
        grouped: dict[str, list[Annotation]] = {}
        for annotation in annotations:
            category_id = mapping.get(annotation.category_id, annotation.category_id)
            if annotation.area > min_area and category_id in self.category_number:
                number = self.category_number[category_id]
                numbered = annotation._replace(category_id=category_id, category_no=number)
                grouped.setdefault(str(annotation.image_id), []).append(numbered)
        return grouped

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_id = self.image_ids[index]
        annotations = self.annotations[image_id]
        item = {**self.describe(image_id), "annotations": annotations}
        if "image" in self.keys:
            item.update(self._picture(self.image_path(image_id)))
        for key, builder in self.conditional_builders.items():
            if key in self.keys:
                crop, flip = item.get("crop_bbox"), item.get("flipped", False)
                item[key] = builder.build(annotations, crop, flip)
        return {key: item[key] for key in self.keys}

    def _picture(self, path: Path) -> dict[str, Any]:
        with error_context(f"image {path}"):
            picture = decode_image(path, upright=False)
        view = self.crop.view(*picture.shape[-2:])
        return {
            "image_path": str(path),
            "image": torch.from_numpy(to_unit_range(view.apply(picture))),
            "crop_bbox": view.bbox,
            "flipped": view.flip,
        }

    def get_textual_label_for_category_id(self, category_id: str) -> str:
        """Return the name of a category by its id."""
        return self.categories[category_id].name

    def get_textual_label_for_category_no(self, category_no: int) -> str:
        """Return the name of a category by its number."""
        return self.categories[self.category_ids[category_no]].name

    def get_category_number(self, category_id: str) -> int:
        """Return the number of a category by its id."""
        return self.category_number[category_id]

    def get_category_id(self, category_no: int) -> str:
        """Return the id of a category by its number."""
        return self.category_ids[category_no]


def _check_keys(keys: Sequence[str], description_keys: Sequence[str]) -> list[str]:
    refuse_text("keys", keys)
    valid = [*description_keys, "annotations", *PICTURE_KEYS, *BUILDERS]
    for key in keys:
        if key not in valid:
            raise ValueError(f"keys has the unknown {key!r}; valid: {', '.join(valid)}")
        if key in PICTURE_KEYS and "image" not in keys:
            raise ValueError(f"keys has {key!r}, which needs 'image' among the keys too")
    return list(keys or valid)


def _allowed(
    categories: Mapping[str, Category], allow_list: Iterable[tuple[str, int]]
) -> dict[str, Category]:
    names = {name for name, _ in allow_list}
    if missing := names - {category.name for category in categories.values()}:
        logger.warning("%d allowed categories do not exist: %s", len(missing), sorted(missing))
    return {i: category for i, category in categories.items() if category.name in names}


def _within(
    grouped: Mapping[str, list[Annotation]], least: int, most: int
) -> dict[str, list[Annotation]]:
    kept = {i: objects for i, objects in grouped.items() if least <= len(objects) <= most}
    if not kept:
        raise ValueError(
            f"no image of {len(grouped)} has {least} to {most} objects of sufficient area; "
            f"change min_objects_per_image, max_objects_per_image or min_object_area"
        )
    return kept
