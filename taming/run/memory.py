"""Build a model only if its weights fit into the memory of this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taming.run.sources import entries
from taming.util import instantiate_from_config


class _Limit(TorchDispatchMode):
    """Refuse tensors that together exceed a number of bytes, before they are allocated."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        sizes: Any = args[0] if args and isinstance(args[0], list | torch.Size) else [None]
        if all(isinstance(size, int) for size in sizes):  # a factory such as empty or randn
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self.asked += math.prod(sizes) * dtype.itemsize
            if self.asked > self.limit:
                raise MemoryError
        return func(*args, **kwargs)


def build_model(block: Mapping[str, Any]) -> Any:
    """Build the object of a ``model`` block.

    Raises:
        ValueError: Its weights need more than the memory of this machine, or sizes do not make a
            model.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    mode = _Limit(total or 1 << 42)
    try:
        with mode:
            return instantiate_from_config(block)
    except (MemoryError, OverflowError, RuntimeError) as error:
        key, value = max(_numbers(block, "model"), key=lambda item: item[1], default=("model", "?"))
        if isinstance(error, MemoryError) or "allocate" in str(error):
            reason = f"its weights need {mode.asked / 1e9:.0f} GB or more, this machine has"
            reason = f"{reason} {mode.limit / 1e9:.0f} GB"
        else:
            reason = " ".join(str(error).split())
        message = f"the model cannot be built; its largest size is {key}={value}: {reason}"
        raise ValueError(message) from error


def _numbers(value: Any, path: str) -> Iterable[tuple[str, int]]:
    """Yield the key paths and values of all whole numbers inside a value."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    for key, item in entries(value):
        yield from _numbers(item, f"{path}.{key}")
