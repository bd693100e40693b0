"""Encode the objects in an image as a sequence of tokens, and decode it.

Positions are rounded to a grid of S x S points, S = floor(sqrt(no_tokens)), numbered row by row.
An object is its category (with flags) followed by one or two points; the unused end of the
sequence is filled with ``none``, the last token. With ``encode_crop`` two more tokens hold the
corners of the crop, and positions refer to the whole image instead of the crop.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import cycle
from math import isqrt
from typing import Generic, NamedTuple, TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from taming.data.conditional_builder.utils import (
    COLOR_PALETTE,
    FULL_CROP,
    GRAY_75,
    WHITE,
    Color,
    absolute_bbox,
    additional_parameters_string,
    filter_annotations,
    get_plot_font_size,
    horizontally_flip_bbox,
    rescale_annotations,
)
from taming.data.helper_types import Annotation, BoundingBox
from taming.data.image_transforms import convert_pil_to_tensor

logger = logging.getLogger(__name__)

Place = TypeVar("Place")

# Bit of each flag in an object's first token, above the category number.
_GROUP, _OCCLUDED, _DEPICTION, _INSIDE = 1, 2, 4, 8


class Brush(NamedTuple):
    """Drawing tools; sizes are in pixels.

    Attributes:
        draw: Draws on the figure.
        font: Font of the labels.
        figure_size: (width, height).
        line_width: Width of outlines.
    """

    draw: ImageDraw.ImageDraw
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    figure_size: tuple[int, int]
    line_width: int


class ObjectsConditionalBuilder(ABC, Generic[Place]):
    """Token sequences of the objects in an image; subclasses encode an object's position.

    Args:
        no_object_classes: Number of categories.
        no_max_objects: Largest number of objects in a sequence.
        no_tokens: Vocabulary size.
        encode_crop: Append the crop, and give positions in the whole image.
        use_group_parameter: Mark groups of objects.
        use_additional_parameters: Mark objects that are occluded, depicted or seen from inside.

    Raises:
        ValueError: The vocabulary is too small.
    """

    object_descriptor_length: int

    def __init__(
        self,
        no_object_classes: int,
        no_max_objects: int,
        no_tokens: int,
        encode_crop: bool,
        use_group_parameter: bool,
        use_additional_parameters: bool,
    ) -> None:
        kinds = 16 if use_additional_parameters else 2 if use_group_parameter else 1
        least = max(4, no_object_classes * kinds + 1)
        if no_tokens < least:
            raise ValueError(
                f"no_tokens is {no_tokens}, but {no_object_classes} categories with flags and "
                f"a token for absent objects need {least}"
            )
        self.no_object_classes = no_object_classes
        self.no_max_objects = no_max_objects
        self.no_tokens = no_tokens
        self.encode_crop = encode_crop
        self.no_sections = isqrt(no_tokens)
        self.use_group_parameter = use_group_parameter
        self.use_additional_parameters = use_additional_parameters

    @property
    def none(self) -> int:
        """The token that fills the unused end of the sequence."""
        return self.no_tokens - 1

    @property
    def embedding_dim(self) -> int:
        """Length of the sequence."""
        crop_length = 2 if self.encode_crop else 0
        return self.no_max_objects * self.object_descriptor_length + crop_length

    @abstractmethod
    def tokens_from_place(self, bbox: BoundingBox) -> tuple[int, ...]:
        """Encode an object's position as tokens."""

    @abstractmethod
    def place_from_tokens(self, tokens: Sequence[int]) -> Place:
        """Invert `tokens_from_place`, up to the rounding to the grid."""

    @abstractmethod
    def draw_object(self, brush: Brush, place: Place, label: str, color: Color) -> None:
        """Draw one object."""

    def tokenize_coordinates(self, x: float, y: float) -> int:
        """Return the number of the grid point nearest to (x, y), both in [0, 1]."""
        column, row = (round(value * (self.no_sections - 1)) for value in (x, y))
        return row * self.no_sections + column

    def coordinates_from_token(self, token: int) -> tuple[float, float]:
        """Return x and y of a grid point, both in [0, 1]."""
        row, column = divmod(token, self.no_sections)
        return column / (self.no_sections - 1), row / (self.no_sections - 1)

    def token_pair_from_bbox(self, bbox: BoundingBox) -> tuple[int, int]:
        """Encode a box as its upper left and lower right corner."""
        left, top, width, height = bbox
        corner = self.tokenize_coordinates(left + width, top + height)
        return self.tokenize_coordinates(left, top), corner

    def bbox_from_token_pair(self, token1: int, token2: int) -> BoundingBox:
        """Decode a box from its two corners."""
        left, top = self.coordinates_from_token(token1)
        right, bottom = self.coordinates_from_token(token2)
        return left, top, right - left, bottom - top

    def object_representation(self, annotation: Annotation) -> int:
        """Return the token of an object's category and flags."""
        flags = 0
        if self.use_group_parameter:
            flags |= _GROUP * bool(annotation.is_group_of)
        if self.use_additional_parameters:
            flags |= _OCCLUDED * bool(annotation.is_occluded)
            flags |= _DEPICTION * bool(annotation.is_depiction)
            flags |= _INSIDE * bool(annotation.is_inside)
        return annotation.category_no + self.no_object_classes * flags

    def representation_to_annotation(self, representation: int) -> Annotation:
        """Invert `object_representation`; all other fields are empty."""
        flags, category_no = divmod(representation, self.no_object_classes)
        return Annotation(
            area=0.0,
            image_id="",
            bbox=FULL_CROP,
            category_no=category_no,
            category_id="",
            is_group_of=bool(flags & _GROUP),
            is_occluded=bool(flags & _OCCLUDED),
            is_depiction=bool(flags & _DEPICTION),
            is_inside=bool(flags & _INSIDE),
        )

    def build(
        self,
        annotations: Sequence[Annotation],
        crop_coordinates: BoundingBox | None = None,
        horizontal_flip: bool = False,
    ) -> Tensor:
        """Encode the objects in a crop, in random order (torch's global generator).

        Args:
            annotations: Objects of the image; those beyond ``no_max_objects`` are dropped.
            crop_coordinates: Box of the crop; None for the whole image.
            horizontal_flip: The crop is mirrored.

        Returns:
            Tokens (embedding_dim,) int64.
        """
        if len(annotations) > self.no_max_objects:
            logger.warning("kept %d of %d objects", self.no_max_objects, len(annotations))
        crop = crop_coordinates or FULL_CROP
        objects = filter_annotations(annotations[: self.no_max_objects], crop)
        objects = [objects[i] for i in torch.randperm(len(objects)).tolist()]
        frame = FULL_CROP if self.encode_crop else crop
        tokens: list[int] = []
        for annotation in rescale_annotations(objects, frame, horizontal_flip):
            tokens.append(self.object_representation(annotation))
            tokens.extend(self.tokens_from_place(annotation.bbox))
        unused = (self.no_max_objects - len(objects)) * self.object_descriptor_length
        tokens.extend([self.none] * unused)
        if self.encode_crop:
            shown = horizontally_flip_bbox(crop) if horizontal_flip else crop
            tokens.extend(self.token_pair_from_bbox(shown))
        return torch.tensor(tokens, dtype=torch.int64)

    def inverse_build(
        self, conditional: Tensor
    ) -> tuple[list[tuple[int, Place]], BoundingBox | None]:
        """Invert `build`, up to the rounding to the grid.

        Args:
            conditional: Tokens (embedding_dim,) int64.

        Returns:
            First token and position of each object; and the crop, or None if it is not encoded.

        Raises:
            ValueError: The sequence has the wrong length.
        """
        if conditional.shape != (self.embedding_dim,):
            raise ValueError(
                f"expected {self.embedding_dim} tokens, got shape {tuple(conditional.shape)}"
            )
        tokens, crop = conditional.tolist(), None
        if self.encode_crop:
            *tokens, first, last = tokens
            crop = self.bbox_from_token_pair(first, last)
        length = self.object_descriptor_length
        described = [tokens[i : i + length] for i in range(0, len(tokens), length)]
        return [(o[0], self.place_from_tokens(o[1:])) for o in described if o[0] != self.none], crop

    def plot(
        self,
        conditional: Tensor,
        label_for_category_no: Callable[[int], str],
        figure_size: tuple[int, int],
        line_width: int = 3,
        font_size: int | None = None,
    ) -> Tensor:
        """Draw the objects of a sequence.

        Args:
            conditional: Tokens (embedding_dim,) int64.
            label_for_category_no: Category number -> name.
            figure_size: (width, height) in pixels.
            line_width: Width of outlines in pixels.
            font_size: Height of labels in pixels; None derives it from the figure's size.

        Returns:
            (3, height, width) float32 in [-1, 1].
        """
        figure = Image.new("RGB", figure_size, WHITE)
        font = ImageFont.load_default(get_plot_font_size(font_size, figure_size))
        brush = Brush(ImageDraw.Draw(figure), font, figure_size, line_width)
        objects, crop = self.inverse_build(conditional)
        for (representation, place), color in zip(objects, cycle(COLOR_PALETTE), strict=False):
            annotation = self.representation_to_annotation(representation)
            name = label_for_category_no(annotation.category_no)
            label = f"{name} {additional_parameters_string(annotation)}"
            self.draw_object(brush, place, label, color)
        if crop is not None:
            box = absolute_bbox(crop, *figure_size)
            brush.draw.rectangle(box, outline=GRAY_75, width=line_width)
        return convert_pil_to_tensor(figure) / 127.5 - 1
