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
    """Where the loop of each latent may end.

    Attributes:
        codes: (N, T, T) int64; ``codes[:, t]`` are the slots written if the loop ends at turn t.
        distances: (N, T) float32, |z - z_q| if the loop ends at this turn; inf at turns after the
            one at which it was told to end.
    """

    codes: Tensor
    distances: Tensor

    def end_at(self, lengths: Tensor) -> Tensor:
        """Codes (N, T) of loops that end after ``lengths`` turns, (N,) int64 in [1, T]."""
        return self.codes[torch.arange(len(lengths), device=lengths.device), lengths - 1]


class Searches(NamedTuple):
    """The searches by which codes were found: one per latent and turn for `Residual`.

    Attributes:
        sites: (M,) int64 in [0, N), the latent of each search.
        turns: (M,) int64 in [0, T), the turn of each search.
        queries: (M, D) float32, the vector that was searched.
        found: (M,) int64 in [0, K), the code written.
        approximations: (M, D) float32, z_q if the loop ended there.
    """

    sites: Tensor
    turns: Tensor
    queries: Tensor
    found: Tensor
    approximations: Tensor


class Transform(nn.Module, ABC):
    """One turn of the loop and its inverse.

    Args:
        depth_embedding: (T, D) of learned vectors b_n, started at zero and added to z_q by the
            number of turns n, which tells the decoder the count; None for none.

    Attributes:
        dummies: True if a site reads ``D,D,A'`` (dummies, then its one code); False if every turn
            writes a code (``A1,A2,A3``).
    """

    dummies: bool

    def __init__(self, depth_embedding: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.depth = None
        if depth_embedding is not None:
            self.depth = nn.Parameter(torch.zeros(*depth_embedding))

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
    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the searches by which latents z (N, D) were given their codes (N, T)."""

    @abstractmethod
    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into the vectors (N, D) that came nearest to the latents."""

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into z_q (N, D), with the depth embedding if there is one."""
        z_q = self.compose(codes, codebook)
        return z_q if self.depth is None else z_q + self.depth[(codes >= 0).sum(dim=1) - 1]

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError for sizes D and T that it was not built for."""
        if self.depth is not None and self.depth.shape != (max_loops, e_dim):
            raise ValueError(
                f"depth_embedding {tuple(self.depth.shape)} must be (max_loops, e_dim) = "
                f"{(max_loops, e_dim)}"
            )

    def adapt(self, z: Tensor, searches: Searches, momentum: float) -> None:
        """Update running statistics from a training batch; nothing to do by default.

        Args:
            z: (N, D) latents of the batch.
            searches: The searches made for them.
            momentum: Weight of the old value, in [0, 1].
        """


class Attract(Transform):
    """Pull the latent a step toward its nearest code: r <- r + step (e_k - r), writing D.

    Moving toward e_k never leaves its Voronoi cell, so k is the same in every turn, the distance
    is d (1 - step)^t after t of them, and the number of turns is known after one search: the loop
    writes n = ceil(log(tau / d) / log(1 - step)) dummies. A site decodes to e_k; only with a depth
    embedding does the count tell the decoder something.

    Args:
        step: Fraction of the way to the code covered in a turn, in (0, 1].
        depth_embedding: See `Transform`.

    Raises:
        ValueError: ``step`` is out of range.
    """

    dummies = True

    def __init__(self, step: float = 0.5, depth_embedding: tuple[int, int] | None = None) -> None:
        super().__init__(depth_embedding)
        if not 0 < step <= 1:
            raise ValueError(f"step must be in (0, 1], got {step}")
        self.step = step

    @torch.no_grad()
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; one search, cost independent of T (see `Transform`)."""
        found, first = nearest_codes(z, codebook)
        slot = torch.arange(max_loops, device=z.device)
        going, ended = slot < slot[:, None], slot > slot[:, None]
        codes = found[:, None, None].expand(-1, max_loops, max_loops)
        codes = codes.masked_fill(going, len(codebook)).masked_fill(ended, ABSENT)
        return Path(codes, first[:, None] * (1 - self.step) ** slot)

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the one search of each latent (see `Transform`)."""
        found = self._answer(codes)
        sites = torch.arange(len(z), device=z.device)
        return Searches(sites, torch.zeros_like(sites), z, found, codebook[found])

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into e_k of shape (N, D) (see `Transform`)."""
        return codebook[self._answer(codes)]

    @staticmethod
    def _answer(codes: Tensor) -> Tensor:
        """Take the one code (N,) out of codes (N, T)."""
        dummies = (codes >= 0).sum(dim=1, keepdim=True) - 1
        return codes.gather(1, dummies).squeeze(1)


class Residual(Transform):
    """Subtract the nearest code and rescale what is left: r <- (r - e_k) / s_t, writing k.

    The running scale s_t brings residuals back to the size of the latents, so one codebook serves
    every turn and all codes compete again (Lee et al. 2022, arXiv:2203.01941, share a codebook
    without the scale). A site decodes to sum_t S_t e_{k_t} with S_t = s_0 ... s_(t-1). Distances
    are S_t |r - e_k|, that is |z - z_q|: the threshold bounds the error of every site that ends by
    itself. The greedy path does not depend on the threshold, which only cuts it.

    Args:
        max_loops: T; T - 1 scales are kept.
        depth_embedding: See `Transform`.
        beam: Partial paths kept for a latent in each turn. 1 takes the nearest code, and a shorter
            path is then the beginning of a longer one; more finds better paths, at that many times
            the cost of the search.

    Raises:
        ValueError: ``beam`` is out of range.
    """

    dummies = False

    def __init__(
        self, max_loops: int, depth_embedding: tuple[int, int] | None = None, beam: int = 1
    ) -> None:
        super().__init__(depth_embedding)
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        self.beam = beam
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(max_loops - 1))

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError if it was built for another number of turns T (see `Transform`)."""
        if len(self.scales) != max_loops - 1:
            raise ValueError(
                f"Residual has max_loops={len(self.scales) + 1}, but its quantizer {max_loops}"
            )
        super().check(e_dim, max_loops)

    def _cumulative(self) -> Tensor:
        """S_t of shape (T,)."""
        return torch.cat([self.scales.new_ones(1), self.scales.cumprod(dim=0)])

    @torch.no_grad()
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; only those still in it are searched (see `Transform`)."""
        codes = torch.full((len(z), max_loops, max_loops), ABSENT, device=z.device)
        distances = torch.full((len(z), max_loops), math.inf, device=z.device)
        sites, residual = torch.arange(len(z), device=z.device), z[:, None]
        written = torch.empty(len(z), 1, 0, dtype=torch.int64, device=z.device)
        for turn, scale in enumerate(self._cumulative()):
            residual, written, distance = self._extend(residual, written, codebook)
            codes[sites, turn, : turn + 1] = written[:, 0]
            distances[sites, turn] = scale * distance[:, 0]
            on = distances[sites, turn] > threshold[sites]
            if turn == max_loops - 1 or not on.any():
                break
            sites, written = sites[on], written[on]
            residual = residual[on] / self.scales[turn]
        return Path(codes, distances)

    def _extend(
        self, residual: Tensor, written: Tensor, codebook: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the best next codes of partial paths; P are kept of a latent, at most ``beam``.

        Args:
            residual: (N, P, D).
            written: (N, P, t) int64.
            codebook: (K, D).

        Returns:
            Residuals (N, P, D), codes written (N, P, t + 1) and distances (N, P), nearest first.
        """
        latents, paths, _ = residual.shape
        each = min(self.beam, len(codebook))
        found, distance = nearest_codes(residual.flatten(0, 1), codebook, k=each)
        kept = min(self.beam, paths * each)
        distance, best = distance.view(latents, -1).topk(kept, largest=False)
        code = found.view(latents, -1).gather(1, best)
        parent = (best // each)[..., None]
        residual = residual.take_along_dim(parent, dim=1) - codebook[code]
        written = torch.cat([written.take_along_dim(parent, dim=1), code[..., None]], dim=2)
        return residual, written, distance

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the searches of each latent, one turn after the other (see `Transform`)."""
        sites, residual, sums = torch.arange(len(z), device=z.device), z, torch.zeros_like(z)
        searches = []
        for turn, scale in enumerate(self._cumulative()):
            on = codes[sites, turn] >= 0
            sites, residual, sums = sites[on], residual[on], sums[on]
            found = codes[sites, turn]
            sums = sums + scale * codebook[found]
            searches.append((sites, torch.full_like(sites, turn), residual, found, sums))
            if turn < len(self.scales):
                residual = (residual - codebook[found]) / self.scales[turn]
        return Searches(*(torch.cat(column) for column in zip(*searches, strict=True)))

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into the weighted sums of shape (N, D) (see `Transform`)."""
        z_q = codebook.new_zeros(len(codes), codebook.shape[1])
        for code, scale in zip(codes.unbind(1), self._cumulative(), strict=True):
            # Zero is added where the site has ended, which leaves its sum as it is, bit for bit.
            z_q = z_q + scale * codebook[code.clamp(min=0)] * (code >= 0)[:, None]
        return z_q

    @torch.no_grad()
    def adapt(self, z: Tensor, searches: Searches, momentum: float) -> None:
        """Move each s_t toward RMS(residual) / RMS(latents) over all ranks (see `Transform`).

        The RMS is taken over the sites that went on after turn t, since only they are rescaled.
        """
        steps = len(self.scales)
        power = searches.queries.square().mean(dim=1)
        turns = torch.zeros(steps + 1, 2, device=z.device)
        turns.index_add_(0, searches.turns, torch.stack([power, torch.ones_like(power)], dim=1))
        latents = torch.stack([z.square().mean(dim=1).sum(), z.new_tensor(len(z))])
        turns, latents = sum_over_ranks(torch.cat([turns, latents[None]])).split([steps + 1, 1])
        # Queries of turn t + 1 are the rescaled residuals of turn t: s_t times their size is the
        # residual's own size.
        size = (turns[1:, 0] / turns[1:, 1]).sqrt() / (latents[0, 0] / latents[0, 1]).sqrt()
        target = (self.scales * size).clamp(min=1e-4)
        seen = turns[1:, 1] > 0
        blend = momentum * self.scales + (1 - momentum) * target
        self.scales.copy_(torch.where(seen, blend, self.scales))
