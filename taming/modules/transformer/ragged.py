"""Batches of sequences of different lengths, computed without much padding.

Axis letters: B sequences, R rows (some of the sequences), L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

WASTE = 0.1  # largest share of padding in what goes through a transformer


def length_groups(lengths: Tensor, waste: float = WASTE) -> list[Tensor]:
    """Put sequences of about the same length together, so that little of a group is padding.

    Args:
        lengths: (B,) int64, at least 1.
        waste: Largest share of padding in a group.

    Returns:
        Row numbers of each group, the longest sequence first.
    """
    groups: list[list[int]] = []
    total = longest = 0
    for length, row in sorted(
        zip(lengths.tolist(), range(len(lengths)), strict=True), reverse=True
    ):
        if not groups or total + length < (1 - waste) * longest * (len(groups[-1]) + 1):
            groups.append([])
            total, longest = 0, length
        groups[-1].append(row)
        total += length
    return [torch.tensor(group, device=lengths.device) for group in groups]


def token_numbers(lengths: Tensor, rows: Tensor, longest: int) -> Tensor:
    """Count the tokens of all sequences through: numbers (R, L) of those of some rows."""
    first = lengths.cumsum(dim=0) - lengths
    return first[rows, None] + torch.arange(longest, device=lengths.device)
