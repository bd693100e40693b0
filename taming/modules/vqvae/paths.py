"""What the loop of `taming.modules.vqvae.loop` finds: paths, and the searches along them.

Axis letters: N latents, D channels, K codes, T turns, M searches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from taming.modules.vqvae.checks import ABSENT


class Path(NamedTuple):
    """Possible ends of the loop of each latent.

    Attributes:
        codes: (N, T, T) int64; ``codes[:, n]`` are the codes found if the loop ends at turn n. Or
            (N, 1, T) if the end changes no code before it.
        distances: (N, T) float32, compared with the threshold at each turn: from the transformed
            latent to its nearest code. In a `Cascade` this is |z - z_q|, before any depth
            embedding. inf at turns after the one at which the search ended.
        dummy: Code that is written in every turn before the end; None for the code found.
    """

    codes: Tensor
    distances: Tensor
    dummy: int | None = None

    def end_at(self, lengths: Tensor) -> Tensor:
        """Codes (N, T) of loops that end after ``lengths`` turns, (N,) int64 in [1, T]."""
        if self.codes.shape[1] == 1:
            codes = self.codes[:, 0]
        else:
            codes = self.codes[torch.arange(len(lengths), device=lengths.device), lengths - 1]
        left = lengths[:, None] - torch.arange(1, codes.shape[1] + 1, device=codes.device)
        if self.dummy is not None:
            codes = codes.masked_fill(left > 0, self.dummy)
        return codes.masked_fill(left < 0, ABSENT)  # (N, T)


class Searches(NamedTuple):
    """The searches by which codes were found: one per latent and turn for a `Cascade`.

    Attributes:
        sites: (M,) int64 in [0, N), the latent of each search.
        turns: (M,) int64 in [0, T), the turn of each search.
        queries: (M, D) float32, the vector that was searched, in the space of z.
        found: (M,) int64 in [0, K), the code found.
        approximations: (M, D) float32, z_q if the loop ended there. Their gradient goes to the
            code found last, since the loop is greedy.
        targets: (M, D) float32, the position in the codebook to which the code should move.
        weights: (M,) float32, squared length that z_q moves per unit of that code's movement.
    """

    sites: Tensor
    turns: Tensor
    queries: Tensor
    found: Tensor
    approximations: Tensor
    targets: Tensor
    weights: Tensor
