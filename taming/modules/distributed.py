"""Collective operations over all training processes; the identity when there is only one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise sum of a tensor over all ranks; the argument is not changed."""
    if not is_distributed():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


def differentiable_sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return `sum_over_ranks` for losses of all ranks, whose gradients are summed in turn."""
    total: Any = _Sum.apply(tensor)
    return total


def share_of_rank(count: int, like: Tensor) -> Tensor | float:
    """Return the factor by which a mean over this rank's values counts in a mean over ranks.

    With it, the mean over ranks, which is that of gradients too, is the mean over the values of
    all ranks, of which there may be a different number on each.

    Args:
        count: Number of this rank's values.
        like: Any tensor on the device to compute on.
    """
    if not is_distributed():
        return 1.0
    mine = like.new_tensor([count, 1.0], dtype=torch.promote_types(like.dtype, torch.float32))
    total, ranks = sum_over_ranks(mine)
    return mine[0] * ranks / total


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return the first rank's tensor on every rank; the argument is not changed."""
    if not is_distributed():
        return tensor
    shared = tensor.clone()
    dist.broadcast(shared, src=0)
    return shared


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the first axis, in rank order."""
    if not is_distributed():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
