"""Types shared by the data sets of annotated objects."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from PIL import Image as pil_image
from torch import Tensor

Image = Tensor | pil_image.Image
BoundingBox = tuple[float, float, float, float]
"""Left, top, width, height as fractions of the picture's width and height."""
CropMethodType = Literal["none", "center", "random-1d", "random-2d"]
SplitType = Literal["train", "validation", "test"]


class ImageDescription(NamedTuple):
    """COCO's description of an image; ``original_size`` is (width, height) in pixels."""

    id: int
    file_name: str
    original_size: tuple[int, int]
    url: str | None = None
    license: int | None = None
    coco_url: str | None = None
    date_captured: str | None = None
    flickr_url: str | None = None
    flickr_id: str | None = None
    coco_id: str | None = None


class Category(NamedTuple):
    """Category of objects."""

    id: str
    super_category: str | None
    name: str


class Annotation(NamedTuple):
    """An object, or a group of objects, in an image.

    Attributes:
        area: Fraction of the image that the box covers.
        category_no: Number of the category among those in use.
    """

    area: float
    image_id: str
    bbox: BoundingBox
    category_no: int
    category_id: str
    id: int | None = None
    source: str | None = None
    confidence: float | None = None
    is_group_of: bool | None = None
    is_truncated: bool | None = None
    is_occluded: bool | None = None
    is_depiction: bool | None = None
    is_inside: bool | None = None
    segmentation: dict[str, Any] | None = None
