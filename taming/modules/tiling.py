"""Large pictures through convolutional networks tile by tile, in bounded memory and linear time.

A convolution sees some pixels around each, so tiles overlap by a margin that is cut off. Group
norms and attention see the whole picture. They take what they need of it from a `Survey`, a sample
of blocks that goes through the network first; all tiles share it, so that there are no seams.

Axis letters: B images, C channels, G groups of a norm, H W map, N blocks of the sample. Lengths are
in sites unless they are called pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARGIN = 6  # overlap on each side of a tile: most of what convolutions see of a trained network
BLOCK = 6  # side of a sampled block, without its margin
BLOCK_MARGIN = 2
LEAST_BLOCKS = 16
SHARE = 0.3  # of the picture that may go through the network for the sample
KEYS = 1024  # sites that each site attends to
LEAST_TILE = 4 * MARGIN  # smaller ones would be mostly margin

_SURVEY: ContextVar[Survey | None] = ContextVar("survey", default=None)


class Sample(NamedTuple):
    """Blocks of a picture that stand for all of it.

    Attributes:
        blocks: (N, C, H, W) with their margins.
        weights: (N,) share of the picture that each stands for.
        margins: Rows and columns of a margin, as shares of H and W.
    """

    blocks: Tensor
    weights: Tensor
    margins: tuple[float, float]


class Survey:
    """What layers that see a whole picture find in a sample of it.

    Args:
        sample: Its weights and margins are used; the blocks go through the network.
    """

    def __init__(self, sample: Sample) -> None:
        self.weights, self.margins = sample.weights, sample.margins
        self.found: dict[object, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def active() -> Survey | None:
        """Return the survey of the picture that is going through the network, if there is one."""
        return _SURVEY.get()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let layers use it: the first pass fills it."""
        token = _SURVEY.set(self)
        try:
            yield
        finally:
            _SURVEY.reset(token)

    def moments(self, layer: object, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each group (G,) of a layer's input x (N, C, H, W)."""
        if layer not in self.found:
            values = self._inner(x).float().unflatten(1, (groups, -1)).flatten(2)  # (N, G, ...)
            weights = self.weights[:, None]
            variances, means = torch.var_mean(values, dim=2, correction=0)
            mean = (weights * means).sum(dim=0)
            variance = (weights * (variances + (means - mean).square())).sum(dim=0)
            self.found[layer] = mean, variance
        return self.found[layer]

    def keys(self, layer: object, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return at most `KEYS` keys and values (1, 1, keys, C) out of maps (N, C, H, W)."""
        if layer not in self.found:
            k, v = self._inner(k), self._inner(v)
            order, chosen = _spread(k.shape[2], k.shape[3], self.weights)
            k, v = (t.movedim(1, -1).flatten(1, 2)[:, order][chosen] for t in (k, v))  # (keys, C)
            self.found[layer] = k[None, None], v[None, None]
        return self.found[layer]

    def _inner(self, x: Tensor) -> Tensor:
        """Cut off the margins of maps (N, C, H, W)."""
        top, left = (round(x.shape[axis] * self.margins[axis - 2]) for axis in (2, 3))
        return x[:, :, top : x.shape[2] - top, left : x.shape[3] - left]


def _spread(height: int, width: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Choose sites of blocks evenly, of each block as many as its weight demands.

    Returns:
        An order of the sites (H W,) whose beginnings cover a block evenly; (N, H W) True for the
        chosen ones in this order.
    """
    rows, columns = (torch.arange(side, device=weights.device) for side in (height, width))
    # Multiples of these numbers modulo 1 are spread evenly in two dimensions.
    order = (rows[:, None] * 0.7548776662 + columns * 0.5698402910).remainder(1).flatten().argsort()
    most = min(KEYS, max(1, len(weights) * len(order) // 2))  # no weight is over 2 / N
    ends = (weights.cpu().double().cumsum(0) * most).round()
    counts = ends.diff(prepend=ends.new_zeros(1))
    return order, (torch.arange(len(order)) < counts[:, None]).to(weights.device)


def draw_sample(x: Tensor, unit: int, most: int) -> Sample:
    """Choose blocks of a picture, more often where it varies more, and weigh them accordingly.

    Args:
        x: (1, C, H, W).
        unit: Side of a site in pixels of x.
        most: Largest number of sites in all blocks with their margins, beyond `LEAST_BLOCKS`.

    Returns:
        The same blocks for the same picture.
    """
    grid = (x.shape[2] // unit, x.shape[3] // unit)
    whole = BLOCK + 2 * BLOCK_MARGIN
    sides = [min(length, whole) for length in grid]
    margins = [BLOCK_MARGIN if side == whole else 0 for side in sides]
    # One channel at a time: squares of a large picture would take as much as the picture.
    pooled = [
        [F.avg_pool2d(t, BLOCK * unit, ceil_mode=True) for t in (values, values**2)]
        for values in x.float().split(1, dim=1)
    ]
    mean, square = (torch.cat(parts, dim=1) for parts in zip(*pooled, strict=True))
    deviation = (square - mean**2).clamp(min=0).sqrt().mean(dim=(0, 1)).cpu().double()  # by block
    order = deviation.flatten().argsort()
    chance = deviation.flatten()[order]
    chance = 0.5 / len(chance) + 0.5 * chance / chance.sum().clamp(min=1e-12)
    count = min(max(LEAST_BLOCKS, most // math.prod(sides)), len(chance))
    places = (torch.arange(count) + 0.5) / count * chance.sum()
    picked = torch.searchsorted(chance.cumsum(0), places).clamp(max=len(chance) - 1)
    blocks = []
    for number in order[picked].tolist():
        corner = divmod(number, deviation.shape[1])
        starts = [
            min(max(0, BLOCK * index - margin), length - side)
            for index, margin, length, side in zip(corner, margins, grid, sides, strict=True)
        ]
        blocks.append(_window(x, unit, starts, sides))
    weights = 1 / chance[picked]
    shares = (margins[0] / sides[0], margins[1] / sides[1])
    return Sample(torch.cat(blocks), (weights / weights.sum()).float().to(x.device), shares)


def _window(x: Tensor, unit: int, starts: Any, sides: Any) -> Tensor:
    (top, left), (height, width) = ([unit * n for n in pair] for pair in (starts, sides))
    return x[:, :, top : top + height, left : left + width]


def set_tile(model: nn.Module, tile: int | None) -> None:
    """Set the side of the tiles of all networks of a model that can take them.

    Args:
        model: The model.
        tile: Side of a tile in pixels; None sends every picture whole.

    Raises:
        ValueError: The tile is not positive.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a positive number of pixels or None, got {tile}")
    parts: Iterator[Any] = model.modules()
    for part in parts:
        if "tile" in vars(part):
            part.tile = tile


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, unit: int, to: int) -> Tensor:
    """Run a network on pictures of any size, at most ``tile`` x ``tile`` sites at once.

    A picture of at most ``tile`` squared sites is computed as without tiles.

    Args:
        run: The network: (B, C, H, W) -> (B, C', H', W').
        x: (B, C, H, W).
        tile: Side of a tile with its margins; a smaller one than `LEAST_TILE` counts as that.
        unit: Side of a site in pixels of x.
        to: Side of a site in pixels of the result.

    Returns:
        (B, C', H', W').
    """
    sites, tile = (x.shape[2] // unit) * (x.shape[3] // unit), max(tile, LEAST_TILE)
    if sites <= tile * tile:
        return torch.cat([run(part) for part in x.split(max(1, tile * tile // sites))])
    if len(x) > 1:
        return torch.cat([in_tiles(run, image, tile, unit, to) for image in x.split(1)])
    sample = draw_sample(x, unit, min(round(SHARE * sites), 2 * tile * tile))
    survey = Survey(sample)
    with survey.used():
        run(sample.blocks)
        return _joined(run, x, tile, unit, to)


def _joined(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, unit: int, to: int) -> Tensor:
    """Run a network tile by tile and put the results together."""
    height, width = x.shape[2] // unit, x.shape[3] // unit
    result = None
    for top, bottom in spans(height, tile):
        for left, right in spans(width, tile):
            first = [max(0, top - MARGIN), max(0, left - MARGIN)]
            last = [min(height, bottom + MARGIN), min(width, right + MARGIN)]
            sides = [end - start for start, end in zip(first, last, strict=True)]
            part = run(_window(x, unit, first, sides))
            if result is None:
                result = part.new_empty(1, part.shape[1], height * to, width * to)
            inner = _window(
                part, to, [top - first[0], left - first[1]], [bottom - top, right - left]
            )
            _window(result, to, [top, left], [bottom - top, right - left]).copy_(inner)
    assert result is not None
    return result


def spans(length: int, tile: int) -> list[tuple[int, int]]:
    """Divide a length into equal parts that with their margins are no longer than a tile."""
    parts = math.ceil(length / (tile - 2 * MARGIN))
    edges = [length * i // parts for i in range(parts + 1)]
    return [*zip(edges[:-1], edges[1:], strict=True)]
