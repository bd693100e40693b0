"""Nearest-code search: the hot kernel of vector quantization, called by every quantizer.

The nearest code e of a vector x has the least score |e|^2 / 2 - x.e, since |x - e|^2 is twice
that plus |x|^2. Both are taken relative to the mean of the codebook, so that vectors and codes far
from the origin lose no digits. Scores are computed in float32 whatever autocast asks for.

Axis letters: N vectors, D channels, K codes, R vectors of a chunk, G groups of codes, M codes of a
group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taming.util import NonFiniteError

# Scores held at once. On a GPU (64 MiB) enough to keep it busy; the full N x K matrix, which
# reaches gigabytes for a batch of f=8 grids, never exists.
MAX_SCORES = 1 << 24

# Codes and vectors of a chunk on a CPU, whose scores (4 MiB) stay in its cache, and codes of a
# group. Of 20 sizes tried, these were within a tenth of the best for every codebook.
_CODES, _VECTORS, _GROUP = 1024, 1024, 32


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, k: int | None = None) -> Tensor:
    """Find the nearest code, or the k nearest codes, of each vector by Euclidean distance.

    Args:
        vectors: (N, D), any float type.
        codebook: (K, D), any float type.
        k: Number of codes to find, at most K; None finds one and adds no axis for it.

    Returns:
        (N,) int64 in [0, K); with k, (N, k), nearest first. Of codes with equal scores, the search
        for one finds the lowest index.

    Raises:
        NonFiniteError: On a CPU, a vector or a code is NaN; elsewhere, that code is found.

    Example:
        >>> nearest_codes(torch.tensor([[0.9], [3.0]]), torch.tensor([[0.0], [1.0], [4.0]]))
        tensor([1, 2])
    """
    vectors, codebook = vectors.float(), codebook.float()
    mean = codebook.mean(dim=0).nan_to_num(0.0, 0.0, 0.0)  # a code of NaN must not hide in others
    codebook = codebook - mean
    half = codebook.square().sum(dim=1) / 2  # (K,)
    with torch.autocast(vectors.device.type, enabled=False):
        one = k in (None, 1)
        if one and vectors.device.type == "cpu" and not torch.compiler.is_compiling():
            found = _search_in_cache(vectors, mean, codebook, half)
            return found if k is None else found[:, None]
        found = []
        for chunk in vectors.split(max(1, MAX_SCORES // len(codebook))):
            scores = torch.addmm(half, chunk - mean, codebook.T, alpha=-1)  # (R, K)
            if one:  # several times faster than topk
                found.append(scores.argmin(dim=1, keepdim=k is not None))
            else:
                found.append(scores.topk(k or 1, largest=False).indices)
        return torch.cat(found)


def distance_to(vectors: Tensor, codes: Tensor) -> Tensor:
    """Compute Euclidean distances from differences, which loses no digits to cancellation.

    Args:
        vectors: (..., D), any float type.
        codes: (..., D), codebook vectors, broadcast against the vectors.

    Returns:
        (...,) float32.
    """
    return torch.linalg.vector_norm(vectors.float() - codes.float(), dim=-1)


def _search_in_cache(vectors: Tensor, mean: Tensor, codebook: Tensor, half: Tensor) -> Tensor:
    """Search for one code on a CPU, chunk by chunk of both vectors and codes.

    torch's ``argmin`` takes ten times as long per score as ``amin``. So ``amin`` reduces all scores
    to one per group, and the place of the least is looked up only among the groups and within the
    best of them.

    Args:
        vectors: (N, D) float32.
        mean: (D,) to subtract from them.
        codebook: (K, D) float32, the mean subtracted.
        half: (K,) float32, |e|^2 / 2.

    Returns:
        (N,) int64.
    """
    codes, channels = codebook.shape
    # Score = [-e, |e|^2 / 2] . [x, 1]. Codes that fill up the last group score infinity.
    padded = codebook.new_zeros(-(-codes // _GROUP) * _GROUP, channels + 1)
    padded[codes:, -1] = torch.inf
    padded[:codes, :-1], padded[:codes, -1] = -codebook, half
    chunks = padded.split(_CODES)
    ones = vectors.new_ones(min(_VECTORS, len(vectors)), channels + 1)
    buffer = vectors.new_empty(len(chunks[0]) * len(ones))
    found = torch.empty(len(vectors), dtype=torch.int64)
    for rows, result in zip(vectors.split(_VECTORS), found.split(_VECTORS), strict=True):
        rows = torch.cat([rows - mean, ones[: len(rows), :1]], dim=1)  # (R, D + 1)
        best = rows.new_full((len(rows),), torch.inf)
        place = torch.zeros_like(best)
        for number, chunk in enumerate(chunks):
            scores = buffer[: len(chunk) * len(rows)].view(len(chunk), len(rows))
            torch.mm(chunk, rows.T, out=scores)
            least, index = _least(scores.view(len(chunk) // _GROUP, _GROUP, len(rows)))
            closer = (least < best) | least.isnan()
            place = torch.where(closer, index + number * _CODES, place)
            best = torch.where(closer, least, best)
        if best.isnan().any():
            raise NonFiniteError("the search meets a vector or a code that is not a number")
        result.copy_(place)
    return found


def _least(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Find the least of scores (G, M, R): values (R,) and their lowest places (R,), as floats."""
    groups = scores.amin(dim=1)  # (G, R)
    least = groups.amin(dim=0)  # (R,)
    group = _first(groups == least)
    block = scores.gather(0, group.long().expand(1, scores.shape[1], -1))[0]  # (M, R)
    return least, group * scores.shape[1] + _first(block == least)


def _first(hits: Tensor) -> Tensor:
    """Find the first True of each column of (C, R) as floats (R,); the last row if there is none.

    Floats hold integers up to 2^24 exactly, and torch reduces them fastest.
    """
    rows = torch.arange(len(hits), dtype=torch.float32)[:, None]
    return torch.where(hits, rows, rows[-1]).amin(dim=0)
