"""Putting items together into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from taming.data.helper_types import Annotation
from taming.util import DataError


def custom_collate(batch: Sequence[Any]) -> Any:
    """Put items together as torch does, but leave lists of annotations as they are.

    Images have different numbers of objects, which cannot be stacked.

    Args:
        batch: The items: dictionaries, or whatever torch's ``default_collate`` takes.

    Returns:
        One item with a batch axis; a list of the values where these are lists of annotations, or
        nothing (None).

    Raises:
        DataError: Arrays or tensors differ in shape.
    """
    first = batch[0]
    if isinstance(first, Mapping):
        return {key: custom_collate([item[key] for item in batch]) for key in first}
    if any(value is None or _are_annotations(value) for value in batch):
        return list(batch)
    shapes = {tuple(value.shape) for value in batch if isinstance(value, np.ndarray | Tensor)}
    if len(shapes) > 1:
        some = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(
            f"pictures of a batch differ in shape, as {some}: give their data set a size"
        )
    return default_collate(list(batch))


def _are_annotations(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Annotation)
