"""What a model takes out of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from taming.util import DataError


def tensor_of(batch: Mapping[str, Any], key: str, parameter: str) -> Tensor:
    """Take a tensor out of a batch.

    Args:
        batch: Name -> value.
        key: Name.
        parameter: What named it, for the message.

    Raises:
        DataError: The batch has no such tensor.
    """
    if not isinstance(value := batch.get(key), Tensor):
        found = f"is a {type(value).__name__}, no tensor" if key in batch else "is missing"
        raise DataError(f"{key!r}, {parameter}, {found} in the batch, which has {', '.join(batch)}")
    return value
