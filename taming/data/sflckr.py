"""S-FLCKR: landscapes with COCO-Stuff class maps made by a network; the base for own sets."""

from __future__ import annotations

from typing import Any

from taming.data.segmentation import ExampleImages, SegmentationBase

__all__ = ["Examples", "SegmentationBase"]


class Examples(ExampleImages):
    """Example landscapes of the original repository, whole unless ``size`` is given."""

    name = "sflckr"
    n_labels = 182

    def __init__(self, size: int | None = None, **options: Any) -> None:
        super().__init__(size, **options)
