"""S-FLCKR: landscapes with machine-made COCO-Stuff class maps, and the base for own sets."""

from __future__ import annotations

from typing import Any

from taming.data.segmentation import ExampleImages, SegmentationBase

__all__ = ["Examples", "SegmentationBase"]


class Examples(ExampleImages):
    """The example landscapes of the original repository, with 182 classes.

    Args:
        size: Side of the square crops in pixels; None leaves images whole.
        **options: As in :class:`~taming.data.segmentation.ExampleImages`.
    """

    def __init__(self, size: int | None = None, **options: Any) -> None:
        super().__init__(name="sflckr", n_labels=182, size=size, **options)
