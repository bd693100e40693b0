"""Nearest-code search on a GPU: one kernel that never writes a score to memory.

Each program of the grid holds some vectors, passes over all codes, and keeps the least score of
each vector and its place in registers. Products are in float32 ("ieee", without tensor cores).

The results are tested in Triton's interpreter; the speed was never measured on a GPU.

Axis letters: N vectors, B images, h w grid, D channels, K codes.
"""

# Triton reads the annotations of a kernel itself.
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K, BLOCK_D = tl.constexpr(64), tl.constexpr(64), tl.constexpr(32)


@triton.jit
def _nearest(
    vectors,
    mean,
    codebook,
    half,
    found,
    count,
    codes,
    channels,
    sites,
    image_stride,
    site_stride,
    channel_stride,
):
    """Search for the codes of BLOCK_N vectors; vector n is site n % sites of image n // sites."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    starts = rows // sites * image_stride + rows % sites * site_stride
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    place = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, codes, BLOCK_K):
        code = first + tl.arange(0, BLOCK_K)
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for begin in range(0, channels, BLOCK_D):
            channel = begin + tl.arange(0, BLOCK_D)
            inside = channel < channels
            x = tl.load(
                vectors + starts[:, None] + channel[None, :].to(tl.int64) * channel_stride,
                mask=(rows < count)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            x -= tl.load(mean + channel, mask=inside, other=0.0)[None, :]
            e = tl.load(
                codebook + code[None, :].to(tl.int64) * channels + channel[:, None],
                mask=(code < codes)[None, :] & inside[:, None],
                other=0.0,
            )
            products = tl.dot(x, e, products, input_precision="ieee")
        scores = tl.load(half + code, mask=code < codes, other=float("inf"))[None, :] - products
        # A code that is not a number is found, as by torch's argmin: it must not hide.
        scores = tl.where(scores == scores, scores, float("-inf"))
        least, index = tl.min(
            scores, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        place = tl.where(least < best, first + index, place)
        best = tl.minimum(least, best)
    tl.store(found + rows, place.to(tl.int64), mask=rows < count)


# An operator of its own, so that tensors without values, as in a trace, get its shape.
@torch.library.custom_op("taming::nearest_codes", mutates_args=())
def search_on_gpu(vectors: Tensor, codebook: Tensor, mean: Tensor) -> Tensor:
    """Search for one code of each vector.

    Args:
        vectors: (N, D) or (B, D, h, w), any float type.
        codebook: (K, D) float32, the mean subtracted.
        mean: (D,) float32, to subtract from the vectors.

    Returns:
        (N,) int64, the lowest index of equals.
    """
    maps = vectors.T[None] if vectors.ndim == 2 else vectors.flatten(2)  # (B, D, sites)
    images, channels, sites = maps.shape
    codebook = codebook.contiguous()
    half = codebook.square().sum(dim=1) / 2  # (K,)
    found = torch.empty(images * sites, dtype=torch.int64, device=vectors.device)
    if len(found) == 0:
        return found
    with torch.cuda.device_of(vectors):
        _nearest[(triton.cdiv(len(found), BLOCK_N.value),)](
            maps,
            mean.contiguous(),
            codebook,
            half,
            found,
            len(found),
            len(codebook),
            channels,
            sites,
            maps.stride(0),
            maps.stride(2),
            maps.stride(1),
        )
    return found


@search_on_gpu.register_fake
def _shape(vectors: Tensor, codebook: Tensor, mean: Tensor) -> Tensor:
    return vectors.new_empty(vectors.numel() // vectors.shape[1], dtype=torch.int64)
