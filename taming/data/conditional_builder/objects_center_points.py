"""Objects as pairs of tokens: category and centre."""

from __future__ import annotations

from collections.abc import Sequence

from taming.data.conditional_builder.builder import Brush, ObjectsConditionalBuilder
from taming.data.conditional_builder.utils import BLACK, Color, get_circle_size
from taming.data.helper_types import BoundingBox


class ObjectsCenterPointsConditionalBuilder(ObjectsConditionalBuilder[tuple[float, float]]):
    """Encode the centre of each object."""

    object_descriptor_length = 2

    def tokens_from_place(self, bbox: BoundingBox) -> tuple[int, ...]:
        """Encode the centre of a box."""
        left, top, width, height = bbox
        return (self.tokenize_coordinates(left + width / 2, top + height / 2),)

    def place_from_tokens(self, tokens: Sequence[int]) -> tuple[float, float]:
        """Decode a centre: x and y, in [0, 1]."""
        return self.coordinates_from_token(tokens[0])

    def draw_object(
        self, brush: Brush, place: tuple[float, float], label: str, color: Color
    ) -> None:
        """Draw a labelled point."""
        x, y = place[0] * brush.figure_size[0], place[1] * brush.figure_size[1]
        radius = get_circle_size(brush.figure_size)
        brush.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, width=0)
        brush.draw.text((x, y), label, anchor="md", fill=BLACK, font=brush.font)
