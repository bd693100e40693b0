"""Images of any size from a prior, through a window of the size that it was trained for.

The window moves so that the site to be written lies in its middle, or as near to that as the border
allows (arXiv:2012.09841, section 3.2, figure 3). An image that fits into it is drawn in one go.

Axis letters: B images, C channels, H W image, h w grid, S = h w sites, T turns, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import singledispatch
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from tqdm import tqdm

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.fit import check_lengths
from taming.models.prior import Grid, Prior
from taming.modules.transformer.generate import SamplingParams, sample_tokens
from taming.modules.transformer.permuter import Identity


class Window(NamedTuple):
    """A rectangle of sites of a grid."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, table: Tensor) -> Tensor:
        """Take what the window shows of a table (B, h, w, ...)."""
        return table[:, self.top : self.top + self.height, self.left : self.left + self.width]


# Tokens (B, L) of the condition, as seen through a window.
Condition = Callable[[Window], Tensor]


def trained_grid(model: Prior) -> Grid:
    """Return the grid (h, w) that a prior was trained for: of its tables, or of its tokenizer."""
    if isinstance(model, Net2NetTransformer) and model.transformer.config.site_shape is not None:
        rows, columns, _ = model.transformer.config.site_shape
        return rows, columns
    return model.first_stage_model.grid


def window_size(model: Net2NetTransformer, grid: Grid) -> Grid:
    """Return the size of the window for a grid: the trained one, or the grid if it is smaller.

    Raises:
        ValueError: A window would have to move, which only works for sites in raster order.
    """
    (h, w), (height, width) = grid, trained_grid(model)
    size = min(h, height), min(w, width)
    if size != grid and not isinstance(model.permuter, Identity):
        raise ValueError(
            f"a grid of {h}x{w} sites is larger than the {height}x{width} that the prior was "
            f"trained for, and its permuter {type(model.permuter).__name__} knows no larger one"
        )
    return size


def window_around(row: int, column: int, grid: Grid, size: Grid) -> Window:
    """Return the window in which a site is written."""
    (h, w), (height, width) = grid, size
    top = min(max(row - height // 2, 0), h - height)
    left = min(max(column - width // 2, 0), w - width)
    return Window(top, left, height, width)


def whole_condition(tokens: Tensor) -> Condition:
    """Return a condition of which every window sees all tokens (B, L), such as a class."""
    return lambda window: tokens


def condition_windows(model: Net2NetTransformer, c: Tensor, grid: Grid) -> Condition:
    """Encode a condition, to be seen through a window.

    Args:
        model: The prior.
        c: A batch of conditions, as the condition stage takes them.
        grid: (h, w) of the image to be drawn.

    Returns:
        The part in the window of a condition that has a token for each site, such as a depth map;
        any other, such as a class, as a whole.

    Raises:
        ValueError: The condition is an image of another grid than the image's, which is too large
            to be seen at once.
    """
    quant_c, tokens = model.encode_to_c(c)
    if quant_c.ndim == 4 and tuple(quant_c.shape[2:]) == grid:
        table = tokens.unflatten(1, grid)
        return lambda window: window.cut(table).flatten(1)
    if quant_c.ndim == 4 and window_size(model, grid) != grid:
        raise ValueError(
            f"the condition's grid {tuple(quant_c.shape[2:])} is not the image's {grid}, so a "
            "window cannot show the same part of both"
        )
    return whole_condition(tokens)


def upper_part(share: float, grid: Grid) -> Tensor:
    """Return which sites (h, w) are known, as bool, where a share of the rows is, from above."""
    rows = torch.arange(grid[0]) < round(share * grid[0])
    return rows[:, None].expand(grid)


def known_sites(known: int | Tensor, grid: Grid, device: torch.device) -> Tensor:
    """Return which sites (S,) are known, in raster order, as bool.

    Args:
        known: How many at the beginning; or (h, w) bool.
        grid: (h, w).
        device: Where to put it.

    Raises:
        ValueError: A mask is of another grid.
    """
    if isinstance(known, int):
        return torch.arange(grid[0] * grid[1], device=device) < known
    if tuple(known.shape) != grid:
        raise ValueError(f"the mask of known sites is {tuple(known.shape)}, but the grid is {grid}")
    return known.bool().flatten().to(device)


def sites_to_write(kept: Tensor) -> range:
    """Return the sites from the first to the last that is not kept (S,), in the same order."""
    free = (~kept).nonzero()[:, 0].tolist()
    return range(min(free, default=0), max(free, default=-1) + 1)


def _stretches(
    grid: Grid, size: Grid, sites: range, longest: int | None
) -> Iterator[tuple[Window, range]]:
    """Yield windows and the sites to be written through each, neighbours in raster order."""
    for window, group in groupby(sites, lambda s: window_around(*divmod(s, grid[1]), grid, size)):
        same = list(group)
        for start in range(0, len(same), longest or len(same)):
            part = same[start : start + (longest or len(same))]
            yield window, range(part[0], part[-1] + 1)


def _check_window(model: Net2NetTransformer, condition: int, size: Grid) -> None:
    """Refuse a window (h, w) that the transformer is too short for, before anything is drawn."""
    try:
        check_lengths(model.transformer, model.sequence, condition, size[0] * size[1])
    except ValueError as error:
        raise ValueError(
            f"a window of {size[0]}x{size[1]} sites is too large: {error}; a prior without a "
            "site_shape that was trained on smaller images needs their grid, as by --grid"
        ) from error


@singledispatch
@torch.no_grad()
def write_codes(
    model: Net2NetTransformer,
    condition: Condition,
    codes: Tensor,
    drawing: SamplingParams,
    known: int | Tensor = 0,
    longest: int | None = None,
    callback: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Draw codes site by site, in place; each kind of prior registers how.

    Args:
        model: The prior, in eval mode.
        condition: See `condition_windows`.
        codes: (B, h, w, T) int64; what stands in sites that are still to be written is not read.
        drawing: How tokens are drawn.
        known: Sites that stay as they are: how many at the beginning, in raster order; or (h, w)
            bool. What is drawn only knows of those before it, in the model's order.
        longest: Most sites between two yields.
        callback: Called after every token with the number of tokens drawn since the last yield.

    Yields:
        Number of sites that are written, the known ones before and, at last, after them included.
    """
    grid = codes.shape[1], codes.shape[2]
    size = window_size(model, grid)
    kept = model.permuter(known_sites(known, grid, codes.device)[None])[0]
    left = sites_to_write(kept)
    nothing = empty_codes(model, len(codes), grid).flatten(1, 2)
    ordered = torch.where(kept[:, None], model.permuter(codes.flatten(1, 2)), nothing)
    for window, sites in _stretches(grid, size, left, longest):
        row, column = divmod(sites.start, grid[1])
        before = (row - window.top) * window.width + column - window.left
        end = before + len(sites)
        seen = window.cut(ordered.unflatten(1, grid)).flatten(1, 2)[:, None, :end]
        tokens_of_condition = condition(window)
        _check_window(model, tokens_of_condition.shape[1], size)
        tokens = sample_tokens(
            model.transformer,
            tokens_of_condition,
            model.sequence,
            size,
            drawing,
            prefix=model.sequence.encode(seen)[0],
            known=F.pad(kept[sites.start : sites.stop], (before, 0), value=True),
            sites=end,
            without=(
                model.hidden_condition(tokens_of_condition) if model.condition_dropout else None
            ),
            callback=callback,
        )
        written = model.sequence.decode(tokens, (1, end))
        ordered[:, sites.start : sites.stop] = written[:, 0, before:]
        codes.copy_(model.permuter(ordered, reverse=True).unflatten(1, grid))
        yield len(kept) if sites.stop == left.stop else sites.stop


def empty_codes(model: Prior, batch: int, grid: Grid) -> Tensor:
    """Return codes (B, h, w, T) int64 on which nothing is written: code 0 everywhere."""
    codes = torch.full((batch, *grid, model.sequence.max_loops), -1, device=model.device)
    codes[..., 0] = 0
    return codes


@torch.no_grad()
def encode_codes(model: Prior, x: Tensor) -> Tensor:
    """Encode images (B, C, H, W) in [-1, 1] as codes (B, h, w, T) int64."""
    return model.encode_to_codes(x)[1]


@torch.no_grad()
def decode_codes(model: Prior, codes: Tensor) -> Tensor:
    """Decode codes (B, h, w, T) to images (B, C, H, W), about in [-1, 1]."""
    first_stage, (batch, h, w, _) = model.first_stage_model, codes.shape
    return first_stage.decode_code(codes, (batch, h, w, first_stage.quantize.e_dim))


def paste(images: Tensor, given: Tensor, known: Tensor) -> Tensor:
    """Put the known part of given images over others.

    A decoder sees the whole grid, so what is drawn also moves pixels of sites whose codes stay.

    Args:
        images: (B, C, H, W).
        given: (B, C, H, W), or a single one; for completions, what their known codes come from,
            decoded.
        known: (h, w) bool sites.

    Returns:
        (B, C, H, W).
    """
    factor = images.shape[2] // known.shape[0]
    pixels = repeat(known, "h w -> (h f) (w g)", f=factor, g=factor).to(images.device)
    return torch.where(pixels, given, images)


def numbers_of(item: int, samples: Iterable[int]) -> list[int]:
    """Return image numbers, for `generators_of`, of samples of an item, however many it has."""
    return [(item << 32) + sample for sample in samples]


def sample_images(
    model: Prior,
    condition: Condition,
    codes: Tensor,
    drawing: SamplingParams,
    known: int | Tensor = 0,
) -> Tensor:
    """Draw images with a progress bar that counts tokens; see `write_codes`.

    Returns:
        (B, C, H, W), about in [-1, 1].
    """
    left = ~known_sites(known, (codes.shape[1], codes.shape[2]), codes.device)
    most = int(left.sum()) * model.sequence.site_tokens
    with tqdm(total=most, desc="tokens", leave=False) as progress:

        def advance(_: int) -> None:
            progress.update()

        for _ in write_codes(model, condition, codes, drawing, known, callback=advance):
            pass
    return decode_codes(model, codes)
