"""The loop as its quantizer sees it: paths of latents, the searches on them, and what a turn does.

Slots of codes hold 0..K-1 for a codebook vector, K for the dummy D ("transformed, went round
again") and -1 after the end of the loop.

Axis letters: N latents, D channels, K codes, T turns, M searches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

ABSENT = -1


class Path(NamedTuple):
    """Where the loop of each latent may end.

    Attributes:
        codes: (N, T, T) int64; ``codes[:, t]`` are the slots written if the loop ends at turn t.
        distances: (N, T) float32, what is compared with the threshold at each turn: from where the
            latent has come to the nearest code. In a `Cascade` this is |z - z_q|, before any depth
            embedding. inf at turns after the one at which it was told to end.
    """

    codes: Tensor
    distances: Tensor

    def end_at(self, lengths: Tensor) -> Tensor:
        """Codes (N, T) of loops that end after ``lengths`` turns, (N,) int64 in [1, T]."""
        return self.codes[torch.arange(len(lengths), device=lengths.device), lengths - 1]


def check_codes(codes: Tensor, n_e: int, dummies: bool) -> None:
    """Refuse codes (N, T) with a site that has no code or goes on after its end.

    Args:
        codes: (N, T) int64.
        n_e: K.
        dummies: See `Transform`.

    Raises:
        ValueError: They are not codes that a loop writes.
    """
    last = (codes >= 0).sum(dim=1, keepdim=True) - 1
    slot = torch.arange(codes.shape[1], device=codes.device)
    is_code = (codes >= 0) & (codes < n_e)
    body = (codes == n_e) if dummies else is_code
    right = torch.where(slot < last, body, torch.where(slot == last, is_code, codes == ABSENT))
    wrong = ~right.all(dim=1) | (last.squeeze(1) < 0)
    if wrong.any():
        site = int(wrong.nonzero()[0])
        form = "D,D,A'" if dummies else "A1,A2,A3"
        raise ValueError(
            f"site {site} reads {codes[site].tolist()}, which is no sequence of the form "
            f"{form} with codes 0..{n_e - 1}, D = {n_e} and -1 after the end"
        )


class Searches(NamedTuple):
    """The searches by which codes were found: one per latent and turn for `Residual`.

    Attributes:
        sites: (M,) int64 in [0, N), the latent of each search.
        turns: (M,) int64 in [0, T), the turn of each search.
        queries: (M, D) float32, the vector that was searched, in the space of z.
        found: (M,) int64 in [0, K), the code written.
        approximations: (M, D) float32, z_q if the loop ended there. Their gradient goes to the
            code written last, since the loop is greedy.
        targets: (M, D) float32, to where in the codebook the query pulls the code.
        weights: (M,) float32, how far z_q moves with that code, squared.
    """

    sites: Tensor
    turns: Tensor
    queries: Tensor
    found: Tensor
    approximations: Tensor
    targets: Tensor
    weights: Tensor


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

    def start(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Set what the transform learns from a first batch; nothing to do by default.

        Args:
            z: (N, D) latents of the batch.
            searches: The searches made for them.
            codebook: (K, D).
        """

    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Update what the transform learns from a training batch (see `start`)."""
