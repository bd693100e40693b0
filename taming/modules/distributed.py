"""Collective operations over all training processes; the identity when there is only one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise sum of a tensor over all ranks; the argument is not changed."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return the first rank's tensor on every rank; the argument is not changed."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    shared = tensor.clone()
    dist.broadcast(shared, src=0)
    return shared


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the first axis, in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
