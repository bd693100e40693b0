"""Orders in which the sites of a grid become a sequence.

Axis letters: B images, S = H W sites.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn


class Permuter(nn.Module):
    """Reordering of the second axis by a fixed permutation.

    Args:
        order: (S,) int64, ``order[i]`` is the raster number of the site that comes i-th.

    Example:
        >>> spiral = SpiralIn(2, 2)
        >>> spiral(torch.tensor([[1, 2, 3, 4]]))
        tensor([[4, 2, 1, 3]])
        >>> spiral(spiral(torch.tensor([[1, 2, 3, 4]])), reverse=True)
        tensor([[1, 2, 3, 4]])
    """

    forward_shuffle_idx: Tensor
    backward_shuffle_idx: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("forward_shuffle_idx", order)
        self.register_buffer("backward_shuffle_idx", torch.argsort(order))

    @property
    def order(self) -> Tensor | None:
        """The order (S,); None for raster order."""
        return self.forward_shuffle_idx

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Bring sites (B, S, ...) from raster into sequence order, or back with ``reverse``.

        Raises:
            ValueError: The number of sites is not the permuter's.
        """
        index = self.backward_shuffle_idx if reverse else self.forward_shuffle_idx
        if x.shape[1] != len(index):
            raise ValueError(f"{type(self).__name__} orders {len(index)} sites, got {x.shape[1]}")
        return x[:, index]


class Identity(nn.Module):
    """Raster order, for any grid."""

    order: Tensor | None = None

    def __init__(self) -> None:  # the original's takes no arguments
        super().__init__()

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Return x unchanged."""
        return x


def _grid(height: int, width: int) -> Tensor:
    """Return raster numbers (H, W)."""
    return torch.arange(height * width).reshape(height, width)


def _power_of_two(name: str, height: int, width: int) -> int:
    """Return log2 of the side of a square grid, or refuse the grid."""
    if height != width or height < 1 or height & (height - 1):
        raise ValueError(f"{name} needs a square grid of a power of two, got {height}x{width}")
    return height.bit_length() - 1


def _bits(height: int, levels: int) -> Tensor:
    """Split a square grid in halves, level by level: axes are the bits of row, then column."""
    return _grid(height, height).reshape([2] * (2 * levels))


class Subsample(Permuter):
    """Coarse to fine: every second row and column first, recursively."""

    def __init__(self, H: int, W: int) -> None:
        levels = _power_of_two("Subsample", H, W)
        # The lowest bits of row and column become the slowest axes.
        axes = [axis for bit in reversed(range(levels)) for axis in (bit, levels + bit)]
        super().__init__(_bits(H, levels).permute(axes).flatten())


class ZCurve(Permuter):
    """Morton order: quadrant by quadrant, recursively."""

    def __init__(self, H: int, W: int) -> None:
        levels = _power_of_two("ZCurve", H, W)
        axes = [axis for bit in range(levels) for axis in (bit, levels + bit)]
        super().__init__(_bits(H, levels).permute(axes).flatten())


def _spiral(height: int, width: int) -> Tensor:
    """Return the sites from the last one up the right side, round the border and inward."""
    grid, inward = _grid(height, width).rot90(2), []
    while grid.numel():
        # Take the left side of what remains from the top, then turn the next side to the left.
        inward.append(grid[:, 0])
        grid = grid[:, 1:].rot90(-1)
    return torch.cat(inward)


class SpiralIn(Permuter):
    """From the last site round the border inward."""

    def __init__(self, H: int, W: int) -> None:
        super().__init__(_spiral(H, W))


class SpiralOut(Permuter):
    """From the centre outward; `SpiralIn` backwards."""

    def __init__(self, H: int, W: int) -> None:
        super().__init__(_spiral(H, W).flip(0))


class Random(Permuter):
    """A random order, the same in every process and every run."""

    def __init__(self, H: int, W: int) -> None:
        super().__init__(torch.from_numpy(np.random.RandomState(1).permutation(H * W)))


class AlternateParsing(Permuter):
    """Boustrophedon: every second row runs backwards."""

    def __init__(self, H: int, W: int) -> None:
        rows = _grid(H, W)
        rows[1::2] = rows[1::2].flip(1)
        super().__init__(rearrange(rows, "h w -> (h w)"))
