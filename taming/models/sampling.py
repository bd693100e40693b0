"""Windows over large grids, known sites, progress and pictures: what sampling needs besides tokens.

A prior samples a grid larger than the one it was trained on through a window. The window moves so
that the site to be sampled lies in its middle, or as near to it as the border allows
(arXiv:2012.09841, section 3.2, figure 3). A grid that fits into the window is sampled in one pass.

A ``model`` here is a `Prior`, whose module imports this one.

Axis letters: B images, C channels, H W image, h w grid, S = h w sites, T turns, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor
from tqdm import tqdm

from taming.modules.transformer.generate import DEFAULT_SAMPLING
from taming.modules.transformer.generate import SamplingParams as SamplingParams
from taming.modules.transformer.generate import generators_of as generators_of

Grid = tuple[int, int]


class Window(NamedTuple):
    """A rectangle of sites of a grid."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, table: Tensor) -> Tensor:
        """Return the window's part of a table (B, h, w, ...)."""
        return table[:, self.top : self.top + self.height, self.left : self.left + self.width]


# Tokens (B, L) of a condition: the same for all windows, or as a function of the window.
Condition = Tensor | Callable[[Window], Tensor]


def condition_in(condition: Condition, window: Window) -> Tensor:
    """Return the tokens (B, L) of a condition for a window."""
    return condition if isinstance(condition, Tensor) else condition(window)


class Progress(NamedTuple):
    """The state of sampling after a step."""

    # Sampled so far, of the image with the most in each window; a turn is a token of each site.
    tokens: int
    most: int  # tokens that may have to be sampled in all
    sites: Callable[[], int]  # computes the number finished in all images
    codes: Callable[[], Tensor]  # computes (B, h, w, T) int64; code 0 in sites that are unfinished


ProgressCallback = Callable[[Progress], None]


@dataclass
class Report:
    """Counts the steps of sampling, and passes them on.

    Attributes:
        most: Tokens that may have to be sampled in all.
        callback: Called after each step, or None.
        tokens: Number sampled so far.
    """

    most: int
    callback: ProgressCallback | None
    tokens: int = 0

    def __call__(
        self, sites: Callable[[], int], codes: Callable[[], Tensor], tokens: int = 1
    ) -> None:
        """Report a step of so many tokens, by the functions of a `Progress`."""
        self.tokens += tokens
        if self.callback is not None:
            self.callback(Progress(self.tokens, self.most, sites, codes))


class Completion(NamedTuple):
    """Codes with unknown sites, and how to sample these (see `Prior.sample_codes`)."""

    codes: Tensor  # (B, h, w, T) int64, which may be changed; empty in unknown sites
    known: Tensor  # (h, w) bool
    condition: Condition
    params: SamplingParams
    window: Grid | None  # None for the grid trained on
    report: Report  # called after each step


def window_around(row: int, column: int, grid: Grid, size: Grid) -> Window:
    """Return the window of a size (h, w) in which a site of a grid is sampled."""
    (h, w), (height, width) = grid, size
    top = min(max(row - height // 2, 0), h - height)
    left = min(max(column - width // 2, 0), w - width)
    return Window(top, left, height, width)


class Stretch(NamedTuple):
    """Neighbouring sites in raster order that are sampled through one window."""

    window: Window
    sites: range  # the sites, by their number in the grid
    before: int  # number of the window's sites that come before them


def stretches(grid: Grid, size: Grid, sites: range) -> Iterator[Stretch]:
    """Split sites of a grid into stretches that share a window of a size (h, w)."""
    for window, group in groupby(sites, lambda s: window_around(*divmod(s, grid[1]), grid, size)):
        same = list(group)
        row, column = divmod(same[0], grid[1])
        before = (row - window.top) * window.width + column - window.left
        yield Stretch(window, range(same[0], same[-1] + 1), before)


def upper_part(share: float, grid: Grid) -> Tensor:
    """Return a mask (h, w) bool, True in the upper share of the rows."""
    rows = torch.arange(grid[0]) < round(share * grid[0])
    return rows[:, None].expand(grid)  # (h, w)


def known_mask(known: int | Tensor, grid: Grid, device: torch.device) -> Tensor:
    """Return a mask (h, w) bool of the known sites, given their number or a mask.

    Raises:
        ValueError: A mask has another grid.
    """
    if isinstance(known, int):
        return (torch.arange(grid[0] * grid[1], device=device) < known).view(grid)
    if tuple(known.shape) != grid:
        raise ValueError(f"the mask of known sites is {tuple(known.shape)}, but the grid is {grid}")
    return known.bool().to(device)


def unknown_range(known: Tensor) -> range:
    """Return the range from the first to the last unknown site of a mask (S,)."""
    unknown = (~known).nonzero()[:, 0].tolist()
    return range(min(unknown, default=0), max(unknown, default=-1) + 1)


def condition_windows(model: Any, c: Tensor, grid: Grid) -> Condition:
    """Encode conditions so that each window over a grid (h, w) gets its own part.

    Args:
        model: A `Net2NetTransformer`.
        c: A batch of conditions, as the condition stage takes them.
        grid: (h, w) of the image to sample.

    Returns:
        For conditions with a token per site, such as depth maps, the tokens in each window; for
        others, such as classes, all tokens.

    Raises:
        ValueError: The condition is an image of another grid than the sampled image, which is too
            large for one window.
    """
    quant_c, tokens = model.encode_to_c(c)
    if quant_c.ndim == 4 and tuple(quant_c.shape[2:]) == grid:
        table = tokens.unflatten(1, grid)  # (B, h, w)
        return lambda window: window.cut(table).flatten(1)
    if quant_c.ndim == 4 and model.window_size(grid) != grid:
        raise ValueError(
            f"the condition's grid {tuple(quant_c.shape[2:])} is not the image's {grid}, so a "
            "window cannot show the same part of both"
        )
    return tokens


def paste(images: Tensor, given: Tensor, known: Tensor) -> Tensor:
    """Paste the known sites (h, w) of given images over others, all (B, C, H, W).

    A decoder sees the whole grid, so sampled codes also change the pixels of known sites. For
    completions, ``given`` are the decoded known codes; a single image serves all.
    """
    factor = images.shape[2] // known.shape[0]
    pixels = repeat(known, "h w -> (h f) (w g)", f=factor, g=factor).to(images.device)
    return torch.where(pixels, given, images)


def numbers_of(item: int, samples: Iterable[int]) -> list[int]:
    """Return distinct image numbers, for `generators_of`, of the samples of an item."""
    return [(item << 32) + sample for sample in samples]


def sample_images(
    model: Any,
    condition: Condition,
    params: SamplingParams = DEFAULT_SAMPLING,
    *,
    codes: Tensor | None = None,
    known: int | Tensor = 0,
    grid: Grid | None = None,
    window: Grid | None = None,
) -> Tensor:
    """Sample codes with a progress bar, and decode them: (B, C, H, W), about in [-1, 1].

    The arguments are those of `Prior.sample_codes`, of the prior ``model``.
    """
    start = {"codes": codes, "known": known, "grid": grid, "window": window}
    with tqdm(desc="tokens", leave=False) as bar:

        def update(progress: Progress) -> None:
            bar.total = progress.most
            bar.update(progress.tokens - bar.n)

        return model.decode_codes(model.sample_codes(condition, params, **start, callback=update))


def pictures_of(
    model: Any, batch: Mapping[str, Any], params: SamplingParams, datasets: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return pictures of a batch: inputs, conditions, reconstructions, completed halves, samples.

    Args:
        model: A `Prior`, in eval mode.
        batch: Images, or cached tokens.
        params: How tokens are sampled.
        datasets: Data sets of the run by split, some of which can draw conditions.

    Returns:
        Name -> (B, 3, H, W) in [-1, 1], for at most 4 images.
    """
    batch = {k: v[:4].to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    seen = model.tokenize_batch(batch)
    sites = seen.grid[0] * seen.grid[1]
    first = torch.arange(sites, device=model.device) < sites // 2  # in the prior's order
    half = model.permuter(first[None], reverse=True).view(seen.grid)
    start = {"codes": seen.codes, "window": seen.grid}
    greedy = replace(params, greedy=True)
    codes = {
        "reconstructions": seen.codes,
        "samples_half": model.sample_codes(seen.condition, params, known=half, **start),
        "samples_nopix": model.sample_codes(seen.condition, params, **start),
        "samples_det": model.sample_codes(seen.condition, greedy, **start),
    }
    pictures = {name: model.decode_codes(c, seen.quant_c) for name, c in codes.items()}
    if model.first_stage_key in batch:  # not in a cache of tokens
        pictures = {"inputs": model.get_input(model.first_stage_key, batch)} | pictures
    shown = {name: model.show(picture) for name, picture in pictures.items()}
    height, width = shown["reconstructions"].shape[2:]
    stage, size = model.cond_stage_model, (height, width)
    return shown | stage.condition_pictures(seen.c, seen.quant_c, size, datasets)
