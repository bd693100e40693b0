"""Batches: the tensors and images in them, checked against what a model was built for.

Axis letters: B images, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.modules.util import checks_values
from taming.util import DataError


def tensor_of(batch: Mapping[str, Any], key: str, parameter: str) -> Tensor:
    """Take a tensor out of a batch.

    Args:
        batch: Name -> value.
        key: Name.
        parameter: The parameter that names the key, for the message.

    Raises:
        DataError: The batch has no such tensor.
    """
    if not isinstance(value := batch.get(key), Tensor):
        found = f"is a {type(value).__name__}, not a tensor" if key in batch else "is missing"
        raise DataError(f"{key!r}, {parameter}, {found} in the batch, which has {', '.join(batch)}")
    return value


def images_of(
    batch: Mapping[str, Any],
    key: str,
    parameter: str,
    channels: int,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """Take images out of a batch, and refuse those that a model was not built for.

    Args:
        batch: Name -> value.
        key: Name.
        parameter: The parameter that names the key, for the message.
        channels: C, the model's ``ddconfig.in_channels``.
        value_range: Smallest and largest value of an image. Values may lie outside by half its
            width, which resampling does not reach; they are looked at as `checks_values` allows.

    Returns:
        (B, H, W, C), of the batch's dtype.

    Raises:
        DataError: There is no such tensor, or it has another layout, number of channels, type or
            range.
    """
    x, what = tensor_of(batch, key, parameter), f"{key!r}, {parameter},"
    if x.ndim == 3 and channels == 1:
        x = x[..., None]  # (B, H, W, 1)
    if x.ndim != 4 or x.shape[3] != channels or 0 in x.shape[1:3]:
        is_first = x.ndim == 4 and x.shape[1] == channels
        raise DataError(
            f"{what} is {tuple(x.shape)}{', channels first' * is_first}: expected images (B, H, W, "
            f"{channels}), channels last, for a ddconfig.in_channels of {channels}"
        )
    low, high = value_range
    if x.is_complex() or (low < 0 and not x.is_floating_point()):
        raise DataError(
            f"{what} holds {str(x.dtype).removeprefix('torch.')}: expected floats from {low:g} to "
            f"{high:g}; bytes are brought there by x / 127.5 - 1"
        )
    if checks_values(x) and x.numel() > 0:
        least, most, slack = float(x.min()), float(x.max()), (high - low) / 2
        if not (least >= low - slack and most <= high + slack):  # nor nan
            raise DataError(
                f"{what} has values from {least:.4g} to {most:.4g}: expected {low:g} to {high:g}"
            )
    return x


def pixels_inside(x: Tensor, size: Sequence[int] | Tensor | None) -> Tensor:
    """Mark the pixels of pictures that do not fill their images.

    Args:
        x: (B, C, H, W) images.
        size: (H, W) of the picture at the top left of an image; one for all or one per image
            (B, 2). None for all of it.

    Returns:
        (B, H, W) bool.
    """
    size = torch.as_tensor(x.shape[2:] if size is None else size, device=x.device)
    height, width = size.expand(len(x), 2)[..., None].unbind(1)  # (B, 1)
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    return (rows < height)[:, :, None] & (columns < width)[:, None]
