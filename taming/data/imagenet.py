"""ImageNet and its variants under the names that configurations use."""

from __future__ import annotations

from taming.data.imagenet_base import (
    ImageNetBase,
    ImageNetTrain,
    ImageNetValidation,
    give_synsets_from_indices,
    str_to_indices,
)
from taming.data.imagenet_depth import (
    BaseWithDepth,
    DRINExamples,
    ImageNetTrainWithDepth,
    ImageNetValidationWithDepth,
    RINTrainWithDepth,
    RINValidationWithDepth,
)
from taming.data.imagenet_scale import (
    ImageNetEdgesTrain,
    ImageNetEdgesValidation,
    ImageNetScale,
    ImageNetScaleTrain,
    ImageNetScaleValidation,
)

__all__ = [
    "BaseWithDepth",
    "DRINExamples",
    "ImageNetBase",
    "ImageNetEdgesTrain",
    "ImageNetEdgesValidation",
    "ImageNetScale",
    "ImageNetScaleTrain",
    "ImageNetScaleValidation",
    "ImageNetTrain",
    "ImageNetTrainWithDepth",
    "ImageNetValidation",
    "ImageNetValidationWithDepth",
    "RINTrainWithDepth",
    "RINValidationWithDepth",
    "give_synsets_from_indices",
    "str_to_indices",
]
