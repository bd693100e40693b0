"""A codebook that starts from data, revives unused codes and can learn by moving averages.

Axis letters: K codes, D channels, M searched vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.distributed import from_first_rank, rows_of_all_ranks, sum_over_ranks
from taming.modules.vqvae.nearest import nearest_codes

USAGE_DECAY = 0.98  # weight of the old value in the running share of use


def k_means(vectors: Tensor, centers: Tensor, iterations: int = 10) -> Tensor:
    """Run Lloyd's algorithm and return centers (K, D); one without vectors stays where it is.

    Args:
        vectors: (M, D) float32.
        centers: (K, D) float32, the initial centers; not changed.
        iterations: Rounds of assignment and averaging.
    """
    for _ in range(iterations):
        found = nearest_codes(vectors, centers)
        counts = torch.bincount(found, minlength=len(centers))[:, None]
        sums = torch.zeros_like(centers).index_add_(0, found, vectors)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return centers


Running = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def update_means(
    running: Running, votes: Tensor, vectors: Tensor, found: Tensor, decay: float, eps: float = 1e-5
) -> None:
    """Update the running mean of the vectors mapped to each code, over all ranks.

    Args:
        running: Running means (K, D), votes (K,) and sums (K, D), all changed in place; means only
            where the votes are above ``eps``.
        votes: (K,) vectors mapped to each code now, on all ranks.
        vectors: (M, D) float32, vectors of this rank.
        found: (M,) int64, their codes.
        decay: Weight of the old values in (0, 1).
        eps: Smallest vote count by which a sum is divided.
    """
    means, counts, sums = running
    totals = torch.zeros_like(sums).index_add_(0, found, vectors)
    counts.lerp_(votes, 1 - decay)
    sums.lerp_(sum_over_ranks(totals), 1 - decay)
    known = (counts > eps)[:, None]
    means.copy_(torch.where(known, sums / counts.clamp(min=eps)[:, None], means))


def check_precision(codebook: Tensor, vectors: Tensor) -> None:
    """Raise a ValueError if a codebook is of another dtype than the vectors it learns from."""
    if codebook.dtype != vectors.dtype:
        raise ValueError(
            f"the codebook is {codebook.dtype}, but latents are searched and averaged as "
            f"{vectors.dtype}: train with --precision 32-true, bf16-mixed or 16-mixed, which keep "
            "it in float32"
        )


class Codebook(nn.Module):
    """K vectors, learned by gradient or by exponential moving averages of vectors mapped to them.

    The moving-average update is that of van den Oord et al. 2017 (arXiv:1711.00937, appendix A.1)
    with sums over all ranks. Random choices are seeded by the number of the step, so a resumed run
    makes those of an uninterrupted one, and all ranks make the same.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a code.
        ema_decay: Weight of the old averages in (0, 1); None trains ``weight`` by gradient.
        revive_below: A code whose running share of use falls under this fraction of the uniform
            share 1/K is replaced by a vector of the current batch; 0 never revives.

    Example:
        >>> codebook, z = Codebook(n_e=4, e_dim=2, ema_decay=0.9), torch.randn(100, 2)
        >>> codebook.initialize(z, fresh=True)
        >>> found = nearest_codes(z, codebook.weight)
        >>> codebook.learn(z, found, torch.ones(100))
        >>> codebook(found).shape, int(codebook.steps)
        (torch.Size([100, 2]), 1)
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        ema_decay: float | None = None,
        revive_below: float = 0.05,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {ema_decay}")
        if not 0 <= revive_below < 1:
            raise ValueError(f"revive_below must be in [0, 1), got {revive_below}")
        self.ema_decay, self.revive_below = ema_decay, revive_below
        start = torch.empty(n_e, e_dim).uniform_(-1 / n_e, 1 / n_e)
        self.weight = nn.Parameter(start, requires_grad=ema_decay is None)
        self.steps: Tensor
        self.usage: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage", torch.full((n_e,), 1 / n_e))
        if ema_decay is not None:
            # One vote each for the initial position, so that no sum is divided by zero.
            self.counts: Tensor
            self.sums: Tensor
            self.register_buffer("counts", torch.ones(n_e))
            self.register_buffer("sums", start.clone())

    @torch.no_grad()
    def initialize(self, vectors: Tensor, fresh: bool) -> None:
        """Place the codes by k-means over the vectors of all ranks.

        Args:
            vectors: (M, D) float32.
            fresh: Start from randomly chosen vectors rather than from the present codes.
        """
        # All ranks must gather equally many; sixteen vectors per code settle its mean.
        fewest = rows_of_all_ranks(torch.tensor([len(vectors)], device=vectors.device)).min()
        amount = min(int(fewest), 16 * len(self.weight))
        pool = rows_of_all_ranks(self._sample(vectors, amount))
        centers = self._sample(pool, len(self.weight)) if fresh else self.weight
        # Sums on GPUs are not deterministic, and every rank must have the same codes.
        means = from_first_rank(k_means(pool, centers))
        self._place(torch.arange(len(means), device=means.device), means)

    @torch.no_grad()
    def learn(self, targets: Tensor, found: Tensor, weights: Tensor) -> None:
        """Update usage and moving averages from one training step, and revive dead codes.

        Args:
            targets: (M, D) float32, positions to which the codes found should move.
            found: (M,) int64, codes found.
            weights: (M,) float32, weight of each target in the averages.
        """
        check_precision(self.weight, targets)
        found_and_weights = torch.stack([torch.ones_like(weights), weights], dim=1)
        totals = weights.new_zeros(len(self.weight), 2).index_add_(0, found, found_and_weights)
        counts, votes = sum_over_ranks(totals).unbind(1)  # (K,) each, in one all-reduce
        self.usage.lerp_(counts / counts.sum(), 1 - USAGE_DECAY)
        if self.ema_decay is not None:
            running = (self.weight, self.counts, self.sums)
            update_means(running, votes, targets * weights[:, None], found, self.ema_decay)
        self._revive(targets)
        self.steps += 1

    def _revive(self, targets: Tensor) -> None:
        """Move codes that have fallen out of use to randomly chosen targets (M, D)."""
        dead = (self.usage < self.revive_below / len(self.weight)).nonzero().squeeze(1)
        if len(dead) > 0:
            pool = rows_of_all_ranks(self._sample(targets, len(dead)))
            self._place(dead, self._sample(pool, len(dead)))

    def _place(self, codes: Tensor, vectors: Tensor) -> None:
        """Put codes (M,) at vectors (M, D) float32 and reset their usage to the uniform share."""
        check_precision(self.weight, vectors)
        # Through .data: the step's backward pass does not need the old values.
        self.weight.data[codes] = vectors
        self.usage[codes] = 1 / len(self.weight)
        if self.ema_decay is not None:
            self.counts[codes] = 1.0
            self.sums[codes] = vectors

    def _sample(self, vectors: Tensor, amount: int) -> Tensor:
        """Choose rows of vectors (M, D) at random, repeating them only if M < amount."""
        generator = torch.Generator().manual_seed(int(self.steps))
        order = torch.randperm(len(vectors), generator=generator)  # (M,)
        repeats = -(-amount // len(vectors))  # rounded up
        return vectors[order.repeat(repeats)[:amount].to(vectors.device)]  # (amount, D)

    def forward(self, indices: Tensor) -> Tensor:
        """Look codes up: (...,) int64 -> (..., D)."""
        return F.embedding(indices, self.weight)
