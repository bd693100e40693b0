"""Rate control: from distances along the loop to numbers of turns, and back to thresholds.

A token of an image is a slot that its loops write, so a site costs as many tokens as turns.

Axis letters: N latents, B images, S sites of an image, T turns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def per_image(name: str, value: Tensor, images: int) -> Tensor:
    """Give each image its value: (B,) of one number for all, or of one for each.

    Args:
        name: Of the value, for the message.
        value: A scalar, (1,) or (B,).
        images: B.

    Raises:
        ValueError: There are as many values as neither.
    """
    if value.ndim > 1 or value.numel() not in (1, images):
        raise ValueError(
            f"{name} is one number or one for each of {images} images, got {tuple(value.shape)}"
        )
    return value.expand(images)


def lengths_within(distances: Tensor, threshold: Tensor) -> Tensor:
    """Count the turns until a code is within the threshold; T if none ever is.

    Args:
        distances: (N, T), see `Path`.
        threshold: (N,).

    Returns:
        (N,) int64 in [1, T].
    """
    within = distances[:, :-1] <= threshold[:, None]
    ends = F.pad(within, (0, 1), value=True)
    return ends.int().argmax(dim=1) + 1


def threshold_for(distances: Tensor, tokens: Tensor) -> Tensor:
    """Find the smallest threshold at which an image writes no more tokens than wanted.

    A site goes past turn t as long as the smallest distance so far is above the threshold. So an
    image's tokens are S plus the number of running minima (of all turns but the last) above it,
    and its threshold is one of those minima: no search is needed.

    Args:
        distances: (B, S, T) along whole paths.
        tokens: (B,) int64, at least S.

    Returns:
        (B,) thresholds.

    Raises:
        ValueError: An image would get fewer tokens than it has sites, or part of one.
    """
    sites = distances.shape[1]
    if tokens.is_floating_point():
        raise ValueError(f"an image's tokens are a whole number, got {tokens.tolist()}")
    if (tokens < sites).any():
        raise ValueError(
            f"an image of {sites} sites needs at least {sites} tokens, got {int(tokens.min())}"
        )
    minima = distances.cummin(dim=2).values[..., :-1].flatten(1)
    # The zero stands for "no threshold": where every turn may be taken.
    ordered = F.pad(minima.sort(dim=1, descending=True).values, (0, 1))
    further = (tokens - sites).clamp(max=minima.shape[1])
    return ordered.gather(1, further[:, None]).squeeze(1)


def fewest_codes(
    quality: Callable[[Tensor], Tensor],
    target: Tensor,
    sites: int,
    max_loops: int,
    probes: int = 8,
) -> Tensor:
    """Find, for each image by itself, how few tokens reach a quality.

    Probes upward until the quality is reached, then bisects below: what is returned was seen to
    reach it, even where the quality does not rise with every token.

    Args:
        quality: Tokens (B,) -> quality (B,) of the images encoded with them.
        target: (B,), the quality wanted.
        sites: S.
        max_loops: T.
        probes: Steps of the upward search.

    Returns:
        (B,) int64 in [S, S T]; S T where nothing reaches the target.
    """
    most = sites * max_loops
    failed = torch.full(target.shape, sites - 1, device=target.device)
    enough = torch.full_like(failed, most)
    found = torch.zeros_like(failed, dtype=torch.bool)
    for probe in torch.linspace(sites, most, probes + 1).long().tolist():
        reached = ~found & (quality(torch.full_like(failed, probe)) >= target)
        enough = torch.where(reached, probe, enough)
        found |= reached
        failed = torch.where(found, failed, probe)
    while (enough - failed > 1).any():
        middle = torch.where(enough - failed > 1, (failed + enough) // 2, enough)
        reached = quality(middle) >= target
        enough = torch.where(reached, middle, enough)
        failed = torch.where(reached, failed, middle)
    return enough


def draw_budgets(
    images: int, sites: int, lengths: tuple[float, float], device: torch.device
) -> Tensor:
    """Draw the tokens of each image: a mean length uniform in ``lengths``, times its sites.

    Returns:
        (B,) int64.
    """
    mean = torch.empty(images, device=device).uniform_(*lengths)
    return (mean * sites).round().long()
