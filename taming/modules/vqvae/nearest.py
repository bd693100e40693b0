"""Nearest-code search: the hot kernel of vector quantization, called by every quantizer.

Axis letters: N vectors, D channels, K codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Scores held at once (64 MiB of float32): large enough to keep a GPU busy, small enough that the
# full N x K matrix, which reaches gigabytes for a batch of f=8 grids, never exists.
MAX_SCORES = 1 << 24


class Nearest(NamedTuple):
    """Result of a search.

    Attributes:
        indices: (N,) int64 in [0, K), the nearest code of each vector; with k, (N, k), nearest
            first.
        distances: Like indices, float32, Euclidean distance to that code.
    """

    indices: Tensor
    distances: Tensor


@torch.no_grad()
def nearest_codes(
    vectors: Tensor, codebook: Tensor, k: int | None = None, max_scores: int = MAX_SCORES
) -> Nearest:
    """Find the nearest code, or the k nearest codes, of each vector by Euclidean distance.

    |x - e|^2 = |x|^2 - 2 x.e + |e|^2, where |x|^2 does not change the order; the distance to the
    winner is then computed directly, which loses no digits to cancellation.

    Args:
        vectors: (N, D), any float type; compared in float32 even under autocast.
        codebook: (K, D), any float type.
        k: Number of codes to find, at most K; None finds one and adds no axis for it.
        max_scores: Upper bound on the scores held in memory at once.

    Returns:
        Indices and distances; ties go to the lowest index.

    Example:
        >>> nearest_codes(torch.tensor([[0.9], [3.0]]), torch.tensor([[0.0], [1.0], [4.0]])).indices
        tensor([1, 2])
    """
    vectors, codebook = vectors.float(), codebook.float()
    rows = max(1, max_scores // codebook.shape[0])
    with torch.autocast(vectors.device.type, enabled=False):
        norms = codebook.square().sum(dim=1)
        found = []
        for chunk in vectors.split(rows):
            scores = torch.addmm(norms, chunk, codebook.T, alpha=-2)  # (rows, K)
            if k is None or k == 1:  # several times faster than topk
                found.append(scores.argmin(dim=1, keepdim=k is not None))
            else:
                found.append(scores.topk(k, largest=False).indices)
        indices = torch.cat(found)
        origin = vectors if k is None else vectors[:, None]  # (N, 1, D) against (N, k, D)
        distances = torch.linalg.vector_norm(origin - codebook[indices], dim=-1)
    return Nearest(indices, distances)
