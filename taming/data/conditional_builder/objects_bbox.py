"""Objects as triples of tokens: category, upper left corner, lower right corner."""

from __future__ import annotations

from collections.abc import Sequence

from taming.data.conditional_builder.builder import Brush, ObjectsConditionalBuilder
from taming.data.conditional_builder.utils import BLACK, Color, absolute_bbox
from taming.data.helper_types import BoundingBox


class ObjectsBoundingBoxConditionalBuilder(ObjectsConditionalBuilder[BoundingBox]):
    """Encode the box of each object."""

    object_descriptor_length = 3

    def tokens_from_place(self, bbox: BoundingBox) -> tuple[int, ...]:
        """Encode a box as its two corners."""
        return self.token_pair_from_bbox(bbox)

    def place_from_tokens(self, tokens: Sequence[int]) -> BoundingBox:
        """Decode a box from its two corners."""
        return self.bbox_from_token_pair(*tokens)

    def draw_object(self, brush: Brush, place: BoundingBox, label: str, color: Color) -> None:
        """Draw a labelled box."""
        box = absolute_bbox(place, *brush.figure_size)
        brush.draw.rectangle(box, outline=color, width=brush.line_width)
        corner = (box[0] + brush.line_width, box[1] + brush.line_width)
        brush.draw.text(corner, label, anchor="la", fill=BLACK, font=brush.font)
