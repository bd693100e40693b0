"""Helpers of data sets: items collated into batches, arguments that are lists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from taming.data.helper_types import Annotation
from taming.util import DataError


@dataclass(frozen=True)
class Unreadable:
    """Stands for an item that cannot be read.

    Attributes:
        reason: Message of the `DataError`, which names the file.
    """

    reason: str


class Readable:
    """Data set with indices that gives `Unreadable` in place of raising a `DataError`.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.data = dataset
        self.buckets = getattr(dataset, "buckets", None)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except DataError as error:
            return Unreadable(str(error))


def stackable(value: Any) -> Any:
    """Return a list of numbers as a tensor, which collation stacks; other values as they are."""
    return torch.tensor(value) if isinstance(value, list) else value


def custom_collate(batch: Sequence[Any], name: str = "items") -> Any:
    """Collate items as torch does, but keep lists of annotations and None in a list.

    Images have different numbers of objects, which cannot be stacked.

    Args:
        batch: Items: dictionaries, or anything that torch's ``default_collate`` takes.
        name: Key of the items in those around them, for errors.

    Returns:
        One item with a batch axis; values that are lists of annotations or None form a list. Items
        that are `Unreadable` are left out, and ``unreadable`` lists their reasons.

    Raises:
        DataError: Arrays or tensors differ in shape; names their key.
    """
    if reasons := [item.reason for item in batch if isinstance(item, Unreadable)]:
        readable = [item for item in batch if not isinstance(item, Unreadable)]
        return {**(custom_collate(readable) if readable else {}), "unreadable": reasons}
    first = batch[0]
    if isinstance(first, Mapping):
        return {key: custom_collate([item[key] for item in batch], key) for key in first}
    if any(value is None or _are_annotations(value) for value in batch):
        return list(batch)
    shapes = {tuple(value.shape) for value in batch if isinstance(value, np.ndarray | Tensor)}
    if len(shapes) > 1:
        some = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(
            f"the arrays {name!r} of a batch differ in shape: {some}; where they are pictures, set "
            "the size of their data set"
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
