"""Rate control: from distances along the loop to lengths, and from budgets back to thresholds.

A budget is a number of codes per image. A turn adds one code, dummies included, so a site's
length is its number of turns.

Axis letters: N latents, B images, S sites of an image, T turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.util import checks_values


def one_rate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the rate that is not None, if there is one; raise a ValueError for several."""
    rates = {name: value for name, value in given.items() if value is not None}
    if len(rates) > 1:
        raise ValueError(f"give one rate, got {' and '.join(rates)}")
    return rates


def check_ranges(
    length_range: Sequence[float] | None, rate_range: Sequence[float] | None, max_loops: int
) -> None:
    """Refuse ranges from which training cannot sample mean lengths, or lambdas."""
    if length_range is not None and rate_range is not None:
        raise ValueError("give length_range or rate_range, not both: each sets an image's rate")
    bounds = list(length_range or (1.0, 1.0))
    if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= max_loops:
        limits = f"[1, max_loops = {max_loops}]"
        raise ValueError(f"length_range must be two bounds in {limits}, got {bounds}")
    bounds = list(rate_range or (1.0, 1.0))
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ValueError(f"rate_range must be two lambdas above 0, got {bounds}")


def expand_per_image(name: str, value: Tensor, images: int) -> Tensor:
    """Expand one number, or one per image, to (B,); raise a ValueError for any other shape."""
    if value.ndim > 1 or value.numel() not in (1, images):
        expected = f"one number or one for each of {images} images"
        raise ValueError(f"{name} must be {expected}, got the shape {tuple(value.shape)}")
    return value.expand(images)


def lengths_within(distances: Tensor, threshold: Tensor) -> Tensor:
    """Count the turns until a code is within the threshold; T if none ever is.

    Args:
        distances: (N, T), distances of a `Path`.
        threshold: (N,).

    Returns:
        (N,) int64 in [1, T].
    """
    within = distances[:, :-1] <= threshold[:, None]  # (N, T - 1)
    ends = F.pad(within, (0, 1), value=True)  # (N, T): the last turn ends every loop
    return ends.int().argmax(dim=1) + 1


def threshold_for(distances: Tensor, max_codes: Tensor) -> Tensor:
    """Find the smallest threshold at which an image has no more codes than wanted.

    A site goes past turn t as long as the smallest distance so far is above the threshold. So an
    image's codes are S plus the number of running minima (of all turns but the last) above it,
    and its threshold is one of those minima: no search is needed.

    Args:
        distances: (N, T) along the whole paths of N = B S latents.
        max_codes: (B,) int64, at least S.

    Returns:
        (N,) thresholds, the same for all sites of an image.

    Raises:
        ValueError: A budget is smaller than the number of sites, or not a whole number.
    """
    sites = len(distances) // max(len(max_codes), 1)
    distances = distances.unflatten(0, (len(max_codes), sites))  # (B, S, T)
    if max_codes.is_floating_point():
        raise ValueError(f"max_codes must be a whole number, got {max_codes.tolist()}")
    if checks_values(max_codes) and (max_codes < sites).any():
        raise ValueError(
            f"an image of {sites} sites needs at least {sites} codes, got {int(max_codes.min())}"
        )
    minima = distances.cummin(dim=2).values[..., :-1].flatten(1)  # (B, S (T - 1))
    # The threshold 0 at the end is for budgets in which every site may take every turn.
    ordered = F.pad(minima.sort(dim=1, descending=True).values, (0, 1))  # (B, S (T - 1) + 1)
    # With the m-th largest minimum (from 0) as threshold, at most m minima are above it.
    further = (max_codes.to(ordered.device) - sites).clamp(0, minima.shape[1])  # (B,)
    return ordered.gather(1, further[:, None]).squeeze(1).repeat_interleave(sites)


def fewest_codes(
    quality: Callable[[Tensor], Tensor],
    target: Tensor,
    sites: int,
    max_loops: int,
) -> Tensor:
    """Find the smallest budget of each image that reaches a quality, by nine measurements at most.

    Probes the quarters of the range upward until the quality is reached, then bisects below. So the
    result is within 1/256 of the range of the smallest, if the quality rises with every code; even
    where it does not, a budget returned was measured to reach it, unless it is S T.

    Args:
        quality: Budgets (B,) -> quality (B,) of the images encoded within them.
        target: (B,), the quality wanted.
        sites: S.
        max_loops: T.

    Returns:
        (B,) int64 in [S, S T]; S T where nothing measured reaches the target.
    """
    most = sites * max_loops
    failed = torch.full(target.shape, sites - 1, device=target.device)
    enough = torch.full_like(failed, most)
    for probe in torch.linspace(sites, most, 5, dtype=torch.float64).long()[1:-1].tolist():
        reached = (enough == most) & (quality(torch.full_like(failed, probe)) >= target)
        enough = torch.where(reached, probe, enough)
        failed = torch.where(enough == most, probe, failed)
    for _ in range(6):
        if (enough - failed <= 1).all():
            break
        middle = torch.where(enough - failed > 1, (failed + enough) // 2, enough)
        reached = quality(middle) >= target
        enough = torch.where(reached, middle, enough)
        failed = torch.where(reached, failed, middle)
    return enough


def rates_between(
    share: Tensor,
    sites: int,
    length_range: Sequence[float] | None,
    rate_range: Sequence[float] | None,
) -> dict[str, Tensor]:
    """Return a rate for each image, at a share of the way between bounds.

    Args:
        share: (B,) float32 in [0, 1]; uniform random numbers to sample rates.
        sites: S.
        length_range: Bounds of a mean length; times S, it is a budget.
        rate_range: Instead: bounds of lambda, between which the logarithm is taken.

    Returns:
        ``max_codes`` (B,) int64, or ``rate`` (B,) float32; {} without bounds.
    """
    if length_range is not None:
        low, high = length_range
        return {"max_codes": ((low + (high - low) * share) * sites).round().long()}
    if rate_range is not None:
        low, high = map(math.log, rate_range)
        return {"rate": (low + (high - low) * share).exp()}
    return {}
