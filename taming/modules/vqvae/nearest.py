"""Nearest-code search: the hot kernel of vector quantization, called by every quantizer.

The nearest code e of a vector x has the least score |e|^2 / 2 - x.e, since |x - e|^2 is twice
that plus |x|^2. Both are taken relative to the mean of the codebook, so that vectors and codes far
from the origin lose no digits. Scores are computed in float32 whatever autocast asks for.

Axis letters: N vectors, B images, h w grid, D channels, K codes, R vectors of a chunk, C codes of a
chunk, G groups of codes, M codes of a group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taming.util import NonFiniteError

# Scores held at once. On a GPU (64 MiB) enough to keep it busy; the full N x K matrix, which
# reaches gigabytes for a batch of f=8 grids, never exists.
MAX_SCORES = 1 << 24

# Most codes of a chunk on a CPU, and scores of a chunk: 1 MiB of them stays in the cache. Where
# vectors have many channels, the product takes longer than the pass over the scores, and wants
# larger chunks. Of six sizes tried, these were within a tenth of the best for every codebook.
_CODES, _SCORES, _SCORES_OF_MANY, _MANY = 2048, 1 << 18, 1 << 20, 64


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor, k: int | None = None) -> Tensor:
    """Find the nearest code, or the k nearest codes, of each vector by Euclidean distance.

    On a GPU, ``TAMING_TRITON=1`` in the environment searches by a kernel that writes no scores.

    Args:
        vectors: (N, D), or (B, D, h, w) with N = B h w, any float type.
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
    codebook = codebook.float()
    mean = codebook.mean(dim=0).nan_to_num(0.0, 0.0, 0.0)  # a code of NaN must not hide in others
    device, one = vectors.device.type, k in (None, 1) and not torch.compiler.is_compiling()
    with torch.autocast(device, enabled=False):
        if one and device == "cpu":
            found = _search_in_cache(vectors, codebook, mean)
        elif one and device == "cuda" and os.environ.get("TAMING_TRITON") == "1":
            # Not by default: no one has measured yet that it is faster than torch.
            from taming.modules.vqvae.nearest_triton import search_on_gpu

            found = search_on_gpu(vectors, codebook - mean, mean)
        else:
            return _search_whole_chunks(vectors, codebook - mean, mean, k)
    return found if k is None else found[:, None]


@torch.no_grad()
def cheapest_codes(
    vectors: Tensor, codebook: Tensor, bits: Tensor, weight: Tensor, k: int | None = None
) -> Tensor:
    """Find the codes of least |x - e|^2 + weight * bits, as `nearest_codes` finds the nearest.

    Codes get two more coordinates, (b, sqrt(1 - b^2)) with b in proportion to their bits, and
    vectors get (q, 0). All codes are equally long there, so the distance differs by -2 q b alone.

    Args:
        vectors: (N, D) float32.
        codebook: (K, D) float32.
        bits: (K,) float32, at least 0.
        weight: (N,) float32, at least 0.
        k: As for `nearest_codes`.

    Returns:
        (N,) int64 in [0, K); with k, (N, k), cheapest first.
    """
    most = bits.max().clamp(min=1e-20)
    centred = codebook - codebook.mean(dim=0)
    size = centred.square().sum(dim=1).mean().sqrt()  # as large as they are: no digits are lost
    size = torch.where(size > 0, size, 1.0)
    share = bits / most  # (K,) in [0, 1]
    further = size * torch.stack([share, (1 - share.square()).clamp(min=0).sqrt()], dim=1)
    query = -weight * most / (2 * size)
    query = torch.stack([query, torch.zeros_like(query)], dim=1)
    return nearest_codes(
        torch.cat([vectors.float(), query], dim=1), torch.cat([codebook, further], dim=1), k
    )


def distance_to(vectors: Tensor, codes: Tensor) -> Tensor:
    """Compute Euclidean distances from differences, which loses no digits to cancellation.

    Args:
        vectors: (..., D), any float type.
        codes: (..., D), codebook vectors, broadcast against the vectors.

    Returns:
        (...,) float32.
    """
    return torch.linalg.vector_norm(vectors.float() - codes.float(), dim=-1)


def _search_whole_chunks(vectors: Tensor, codebook: Tensor, mean: Tensor, k: int | None) -> Tensor:
    """Search as `nearest_codes` does, in all scores of some vectors at once."""
    half = codebook.square().sum(dim=1) / 2  # (K,)
    rows = vectors if vectors.ndim == 2 else vectors.movedim(1, 3).flatten(0, 2)  # (N, D)
    found = []
    for chunk in rows.split(max(1, MAX_SCORES // len(codebook))):
        scores = torch.addmm(half, chunk.float() - mean, codebook.T, alpha=-1)  # (R, K)
        if k in (None, 1):  # several times faster than topk
            found.append(scores.argmin(dim=1, keepdim=k is not None))
        else:
            found.append(scores.topk(k or 1, largest=False).indices)
    return torch.cat(found)


def _search_in_cache(vectors: Tensor, codebook: Tensor, mean: Tensor) -> Tensor:
    """Search for one code on a CPU, chunk by chunk of both vectors and codes.

    torch finds the place of a least score ten times as slowly as its value (``amin``). So ``amin``
    reduces all scores to one per group, and the place of the least is looked up only among the
    groups and within the best of them.

    Args:
        vectors: (N, D) or (B, D, h, w).
        codebook: (K, D) float32.
        mean: (D,) of the codebook, to subtract from both.

    Returns:
        (N,) int64.
    """
    many = len(mean) >= _MANY
    size = min(len(codebook), _CODES)
    group = 1 << (size.bit_length() - 1) // 2  # M, about the square root: lookups are as long
    table = _scoring_table(codebook, mean, group)
    chunks = table.split(-(-size // group) * group)
    at_once = max(1, (_SCORES_OF_MANY if many else _SCORES) // len(chunks[0]))
    buffer = mean.new_empty(len(chunks[0]) * min(at_once, vectors.numel() // len(mean)))
    search = _search_each_chunk if many else _search_all_groups
    parts = [
        search(chunks, table.unflatten(0, (-1, group)), columns, buffer)
        for columns in _centred_columns(vectors, mean, at_once)
    ]
    values, found = map(torch.cat, zip(*parts, strict=True))
    if values.isnan().any():
        raise NonFiniteError("the search meets a vector or a code that is not a number")
    return found


def _search_all_groups(
    chunks: Sequence[Tensor], groups: Tensor, columns: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the best group of all, then score its codes again: fastest for few channels.

    Args:
        chunks: (C, D + 1) float32 each, of a `_scoring_table`.
        groups: (K' / M, M, D + 1), the same table.
        columns: (D + 1, R) float32, of `_centred_columns`.
        buffer: For C R scores.

    Returns:
        The least scores (R,) and their codes (R,) int64, the lowest of equals.
    """
    least = columns.new_empty(len(groups), columns.shape[1])  # of each group
    of_chunks = least.split(len(chunks[0]) // groups.shape[1])
    for chunk, part in zip(chunks, of_chunks, strict=True):
        torch.amin(_score(chunk, groups, columns, buffer), dim=1, out=part)
    value, best = least.min(dim=0)
    again = torch.bmm(groups[best], columns.T[:, :, None]).squeeze(2)  # (R, M)
    return value, again.min(dim=1).indices.add_(best, alpha=groups.shape[1])


def _search_each_chunk(
    chunks: Sequence[Tensor], groups: Tensor, columns: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Do the same, looking the place up in the scores of each chunk: fastest for many channels."""
    least = columns.new_empty(len(chunks), columns.shape[1])
    places = torch.empty(least.shape, dtype=torch.int64)  # in each chunk
    for chunk, value, place in zip(chunks, least, places, strict=True):
        scores = _score(chunk, groups, columns, buffer)
        torch.min(scores.amin(dim=1), dim=0, out=(value, place))  # the best group
        block = scores.gather(0, place.expand(1, groups.shape[1], -1))[0]  # (M, R)
        place.mul_(groups.shape[1]).add_(block.min(dim=0).indices)
    value, number = least.min(dim=0)
    return value, places.gather(0, number[None])[0].add_(number, alpha=len(chunks[0]))


def _score(chunk: Tensor, groups: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    """Score the codes of a chunk into the buffer: (G, M, R)."""
    scores = buffer[: len(chunk) * columns.shape[1]].view(len(chunk), columns.shape[1])
    return torch.mm(chunk, columns, out=scores).unflatten(0, (-1, groups.shape[1]))


def _scoring_table(codebook: Tensor, mean: Tensor, group: int) -> Tensor:
    """Build rows [-e, |e|^2 / 2] of the codes (K, D): (K', D + 1) float32, in whole groups.

    A row times [x, 1] is a score. Codes that fill up the last group score infinity.
    """
    codes, channels = codebook.shape
    table = codebook.new_empty(-(-codes // group) * group, channels + 1)
    table[codes:, :-1], table[codes:, -1] = 0, torch.inf
    torch.sub(mean, codebook, out=table[:codes, :-1])
    torch.linalg.vector_norm(table[:codes, :-1], dim=1, out=table[:codes, -1]).square_().div_(2)
    return table


def _centred_columns(vectors: Tensor, mean: Tensor, most: int) -> Iterator[Tensor]:
    """Yield the vectors less the mean (D,) as columns [x, 1]: (D + 1, R) float32, R <= most.

    All lie in one buffer, in the vectors' own order: reordering costs more than subtracting.
    """
    channels = len(mean)
    if vectors.ndim == 2:
        rows = mean.new_ones(min(most, len(vectors)), channels + 1)
        for part in vectors.split(most):
            torch.sub(part, mean, out=rows[: len(part), :-1])
            yield rows[: len(part)].T
        return
    maps = vectors.flatten(2).transpose(0, 1)  # (D, B, h w)
    buffer = mean.new_empty(min(most, maps[0].numel()) * (channels + 1))
    for images in maps.split(max(1, most // max(1, maps.shape[2])), dim=1):
        for part in images.split(most, dim=2):
            columns = buffer[: (channels + 1) * part[0].numel()].view(channels + 1, *part.shape[1:])
            columns[-1] = 1
            torch.sub(part, mean[:, None, None], out=columns[:-1])
            yield columns.flatten(1)
