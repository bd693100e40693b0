"""Geometry and drawing of boxes: left, top, width, height as fractions of the picture."""

from __future__ import annotations

from collections.abc import Sequence

from taming.data.helper_types import Annotation, BoundingBox

Color = tuple[int, int, int]

# The ten categorical colours of Tableau and Matplotlib.
COLOR_PALETTE: list[Color] = [
    *[(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)],
    *[(140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207)],
]
BLACK: Color = (0, 0, 0)
GRAY_75: Color = (63, 63, 63)
WHITE: Color = (255, 255, 255)
FULL_CROP: BoundingBox = (0.0, 0.0, 1.0, 1.0)


def intersection_area(first: BoundingBox, second: BoundingBox) -> float:
    """Return the area of the intersection of two boxes."""
    sides = (
        max(0.0, min(first[i] + first[i + 2], second[i] + second[i + 2]) - max(first[i], second[i]))
        for i in (0, 1)
    )
    width, height = sides
    return width * height


def horizontally_flip_bbox(bbox: BoundingBox) -> BoundingBox:
    """Return the box in the mirrored picture."""
    left, top, width, height = bbox
    return 1 - (left + width), top, width, height


def absolute_bbox(bbox: BoundingBox, width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom in whole pixels of a picture of the given size."""
    left, top, box_width, box_height = bbox
    right, bottom = left + box_width, top + box_height
    return int(left * width), int(top * height), int(right * width), int(bottom * height)


def filter_annotations(
    annotations: Sequence[Annotation], crop_coordinates: BoundingBox
) -> list[Annotation]:
    """Keep the objects that overlap a crop."""
    return [a for a in annotations if intersection_area(a.bbox, crop_coordinates) > 0]


def _rescale_side(
    start: float, length: float, crop_start: float, crop_length: float
) -> tuple[float, float]:
    raw = (start - crop_start) / crop_length
    begin = min(max(raw, 0.0), 1.0)
    return begin, min(length / crop_length - (begin - raw), 1 - begin)


def rescale_annotations(
    annotations: Sequence[Annotation], crop_coordinates: BoundingBox, flip: bool
) -> list[Annotation]:
    """Express boxes as fractions of a crop, clipped to its edges.

    Args:
        annotations: Objects that overlap the crop.
        crop_coordinates: Box of the crop.
        flip: Mirror the boxes.
    """
    crop_left, crop_top, crop_width, crop_height = crop_coordinates

    def rescale(bbox: BoundingBox) -> BoundingBox:
        left, width = _rescale_side(bbox[0], bbox[2], crop_left, crop_width)
        top, height = _rescale_side(bbox[1], bbox[3], crop_top, crop_height)
        rescaled = (left, top, width, height)
        return horizontally_flip_bbox(rescaled) if flip else rescaled

    return [annotation._replace(bbox=rescale(annotation.bbox)) for annotation in annotations]


def additional_parameters_string(annotation: Annotation, short: bool = True) -> str:
    """Name the flags of an object, such as ``(g,o)`` or ``(group,occluded)``."""
    special = {
        "group": annotation.is_group_of,
        "occluded": annotation.is_occluded,
        "depiction": annotation.is_depiction,
        "inside": annotation.is_inside,
    }
    names = [name[0] if short else name for name, present in special.items() if present]
    return f"({','.join(names)})" if names else ""


def get_plot_font_size(font_size: int | None, figure_size: tuple[int, int]) -> int:
    """Return ``font_size`` in pixels, by default one that suits the figure."""
    if font_size is not None:
        return font_size
    side = max(figure_size)
    return 15 if side >= 512 else 12 if side >= 256 else 10


def get_circle_size(figure_size: tuple[int, int]) -> int:
    """Return a radius of points in pixels that suits the figure."""
    side = max(figure_size)
    return 4 if side >= 512 else 3 if side >= 256 else 2
