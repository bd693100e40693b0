"""Helpers of data sets: items collated into batches, arguments that are lists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from taming.data.helper_types import Annotation
from taming.util import DataError


def custom_collate(batch: Sequence[Any]) -> Any:
    """Collate items as torch does, but keep lists of annotations and None in a list.

    Images have different numbers of objects, which cannot be stacked.

    Args:
        batch: Items: dictionaries, or anything that torch's ``default_collate`` takes.

    Returns:
        One item with a batch axis; values that are lists of annotations or None form a list.

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
            f"the pictures of a batch differ in shape: {some}; set the size of their data set"
        )
    return default_collate(list(batch))


def _are_annotations(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Annotation)


def refuse_text(name: str, values: Any) -> None:
    """Refuse a text where a list is meant: its letters would be taken for the items.

    Args:
        name: Name of the parameter, for the error.
        values: Its value.

    Raises:
        ValueError: The value is a text, bytes or a path.
    """
    if isinstance(values, (str, bytes, os.PathLike)):
        raise ValueError(f"{name} must be a list, got the text {values!r}: use [{values!r}]")
