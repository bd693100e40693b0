"""What one turn of the loop does to a latent that no code is near enough to.

A transform follows latents round the loop (`walk`), and turns the codes written on the way back
into vectors (`approximations`). Slots of codes hold 0..K-1 for a codebook vector, K for the dummy
D ("transformed, went round again") and -1 after the end of the loop.

Axis letters: N latents, D channels, K codes, T turns, M searches (one per latent and turn).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taming.modules.vqvae.distributed import sum_over_ranks
from taming.modules.vqvae.nearest import nearest_codes

ABSENT = -1


class Path(NamedTuple):
    """The way of N latents round the loop.

    Attributes:
        codes: (N, T) int64, the slots that were written.
        distances: (N, T) float32, |z - z_q| if the loop ended at this turn; inf where it had
            ended before.
        sites: (M,) int64 in [0, N), the latent of each search.
        turns: (M,) int64 in [0, T), the turn of each search.
        queries: (M, D) float32, the vectors that were searched.
        found: (M,) int64 in [0, K), their nearest codes.
        approximations: (M, D) float32, z_q if the loop ended there.
    """

    codes: Tensor
    distances: Tensor
    sites: Tensor
    turns: Tensor
    queries: Tensor
    found: Tensor
    approximations: Tensor


class Transform(nn.Module, ABC):
    """One turn of the loop and its inverse.

    Attributes:
        dummies: True if a site reads ``D,D,A'`` (dummies, then its one code); False if every turn
            writes a code (``A1,A2,A3``).
    """

    dummies: bool

    @abstractmethod
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop until a code is within the threshold.

        Args:
            z: (N, D) float32 latents; not changed.
            codebook: (K, D) float32.
            threshold: (N,) float32, Euclidean distance in the space of z at which a loop ends.
            max_loops: T, the last turn ends every loop.

        Returns:
            The path; no gradient flows through it.
        """

    @abstractmethod
    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into the vectors z_q (N, D) that they stand for."""

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError for sizes D and T that it was not built for; by default any fit."""

    def adapt(self, z: Tensor, path: Path, momentum: float) -> None:
        """Update running statistics from a training batch; nothing to do by default.

        Args:
            z: (N, D) latents of the batch.
            path: Their path.
            momentum: Weight of the old value, in [0, 1].
        """


class Attract(Transform):
    """Pull the latent a step toward its nearest code: r <- r + step (e_k - r), writing D.

    Moving toward e_k never leaves its Voronoi cell, so k is the same in every turn, the distance
    shrinks by (1 - step) each time, and the number of turns is known after one search:
    n = ceil(log(tau / d) / log(1 - step)). A site decodes to e_k, plus a learned vector b_n for
    its number of turns if ``depth_embedding`` is set: the count then tells the decoder something.

    Args:
        step: Fraction of the way to the code covered in a turn, in (0, 1].
        depth_embedding: (T, D) of the vectors b_n, started at zero; None for none.

    Raises:
        ValueError: ``step`` is out of range.
    """

    dummies = True

    def __init__(self, step: float = 0.5, depth_embedding: tuple[int, int] | None = None) -> None:
        super().__init__()
        if not 0 < step <= 1:
            raise ValueError(f"step must be in (0, 1], got {step}")
        self.step = step
        self.depth = None
        if depth_embedding is not None:
            self.depth = nn.Parameter(torch.zeros(*depth_embedding))

    @torch.no_grad()
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; one search, cost independent of T (see `Transform`)."""
        found, first = nearest_codes(z, codebook)
        dummies = self._turns(first, threshold, max_loops)
        slots = torch.arange(max_loops, device=z.device)
        codes = torch.full((len(z), max_loops), ABSENT, device=z.device)
        codes = codes.masked_fill(slots < dummies[:, None], len(codebook))
        codes = torch.where(slots == dummies[:, None], found[:, None], codes)
        distances = first[:, None] * (1 - self.step) ** slots
        distances = distances.masked_fill(slots > dummies[:, None], math.inf)
        return Path(
            codes=codes,
            distances=distances,
            sites=torch.arange(len(z), device=z.device),
            turns=torch.zeros_like(found),
            queries=z,
            found=found,
            approximations=codebook[found],
        )

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError if the depth embedding has another shape than (T, D)."""
        if self.depth is not None and self.depth.shape != (max_loops, e_dim):
            raise ValueError(
                f"depth_embedding {tuple(self.depth.shape)} must be (max_loops, e_dim) = "
                f"{(max_loops, e_dim)}"
            )

    def _turns(self, distance: Tensor, threshold: Tensor, max_loops: int) -> Tensor:
        """Number of dummies (N,) int64 that each latent writes before its code."""
        # Logarithms of zero (a step of 1, a threshold of 0) give the limits that they should; the
        # one undefined case, both at once, arrives at the code in one step.
        shrink = math.log1p(-self.step) if self.step < 1 else -math.inf
        turns = (torch.log(threshold / distance) / shrink).ceil()
        turns = turns.nan_to_num(nan=1, posinf=max_loops).clamp(min=1)
        return turns.masked_fill(distance <= threshold, 0).clamp(max=max_loops - 1).long()

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into e_k (+ b_n) of shape (N, D) (see `Transform`)."""
        dummies = (codes >= 0).sum(dim=1) - 1
        z_q = codebook[codes.gather(1, dummies[:, None]).squeeze(1)]
        return z_q if self.depth is None else z_q + self.depth[dummies]


class Residual(Transform):
    """Subtract the nearest code and rescale what is left: r <- (r - e_k) / s_t, writing k.

    The running scale s_t brings residuals back to the size of the latents, so one codebook serves
    every turn and all codes compete again (Lee et al. 2022, arXiv:2203.01941, share a codebook
    without the scale). A site decodes to sum_t S_t e_{k_t} with S_t = s_0 ... s_(t-1). Distances
    are S_t |r - e_k|, that is |z - z_q|: the threshold bounds the error of every site that ends by
    itself. The greedy path does not depend on the threshold, which only cuts it.

    Args:
        max_loops: T; T - 1 scales are kept.
    """

    dummies = False

    def __init__(self, max_loops: int) -> None:
        super().__init__()
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(max_loops - 1))

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError if it was built for another number of turns T."""
        if len(self.scales) != max_loops - 1:
            raise ValueError(
                f"Residual has max_loops={len(self.scales) + 1}, but its quantizer {max_loops}"
            )

    def _cumulative(self) -> Tensor:
        """S_t of shape (T,)."""
        return torch.cat([self.scales.new_ones(1), self.scales.cumprod(dim=0)])

    @torch.no_grad()
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; only those still in it are searched (see `Transform`)."""
        codes = torch.full((len(z), max_loops), ABSENT, device=z.device)
        distances = torch.full((len(z), max_loops), math.inf, device=z.device)
        sites, residual, sums = torch.arange(len(z), device=z.device), z, torch.zeros_like(z)
        searches = []
        for turn, scale in enumerate(self._cumulative()):
            found, distance = nearest_codes(residual, codebook)
            distance = distance * scale
            sums = sums + scale * codebook[found]
            codes[sites, turn] = found
            distances[sites, turn] = distance
            searches.append((sites, torch.full_like(sites, turn), residual, found, sums))
            on = distance > threshold[sites]
            if turn == max_loops - 1 or not on.any():
                break
            sites, sums = sites[on], sums[on]
            residual = (residual[on] - codebook[found[on]]) / self.scales[turn]
        return Path(
            codes, distances, *(torch.cat(column) for column in zip(*searches, strict=True))
        )

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into the weighted sums of shape (N, D) (see `Transform`)."""
        z_q = codebook.new_zeros(len(codes), codebook.shape[1])
        for code, scale in zip(codes.unbind(1), self._cumulative(), strict=True):
            # Zero is added where the site has ended, which leaves its sum as it is, bit for bit.
            z_q = z_q + scale * codebook[code.clamp(min=0)] * (code >= 0)[:, None]
        return z_q

    @torch.no_grad()
    def adapt(self, z: Tensor, path: Path, momentum: float) -> None:
        """Move each s_t toward RMS(residual) / RMS(latents) over all ranks (see `Transform`).

        The RMS is taken over the sites that went on after turn t, since only they are rescaled.
        """
        steps = len(self.scales)
        power = path.queries.square().mean(dim=1)
        turns = torch.zeros(steps + 1, 2, device=z.device)
        turns.index_add_(0, path.turns, torch.stack([power, torch.ones_like(power)], dim=1))
        latents = torch.stack([z.square().mean(dim=1).sum(), z.new_tensor(len(z))])
        turns, latents = sum_over_ranks(torch.cat([turns, latents[None]])).split([steps + 1, 1])
        # Queries of turn t + 1 are the rescaled residuals of turn t: s_t times their size is the
        # residual's own size.
        size = (turns[1:, 0] / turns[1:, 1]).sqrt() / (latents[0, 0] / latents[0, 1]).sqrt()
        target = (self.scales * size).clamp(min=1e-4)
        seen = turns[1:, 1] > 0
        blend = momentum * self.scales + (1 - momentum) * target
        self.scales.copy_(torch.where(seen, blend, self.scales))
