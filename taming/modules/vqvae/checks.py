"""Checks of latents and codes: of their form always, of values where these may be looked at.

Where they may not (see `checks_values`), what is wrong is marked, and its z_q becomes NaN.

Axis letters: B images, D channels, h w grid, N latents, K codes, T turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from taming.modules.util import INTEGERS, checks_values
from taming.util import NonFiniteError

ABSENT = -1


def check_finite_latents(z: Tensor) -> None:
    """Refuse latents that are not finite; where that is not seen, z_q and loss are not finite."""
    # A finite sum, eight times as fast to find, proves every summand finite.
    if checks_values(z) and not z.sum().isfinite() and not z.isfinite().all():
        raise NonFiniteError("the latents that reach the quantizer are not finite")


def mark_outside(codes: Tensor, count: int) -> Tensor:
    """Refuse codes outside 0..count-1; where values are not looked at, only mark them, as bool."""
    wrong = (codes < 0) | (codes >= count)
    if checks_values(wrong) and wrong.any():
        raise ValueError(f"index {int(codes[wrong][0])} is out of range 0..{count - 1}")
    return wrong


def rows_of_codes(
    indices: Tensor, turns: int | None, shape: Sequence[int] | None, e_dim: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Check the form of codes and lay them out as rows.

    Args:
        indices: Integers.
        turns: T, the last axis of the indices; None for one code to a latent.
        shape: (B, h, w, D) that they fill in whatever shape; None for their own.
        e_dim: D.

    Returns:
        Codes (N, T) int64, and the axes of the latents: (B, h, w), or those of the indices, which
        with T are (B, h, w) or (N,).

    Raises:
        ValueError: They are not integers, do not fill the shape, or have other axes.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in INTEGERS:
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"codes must be a tensor of int64 or smaller integers, got {kind}")
    axes = tuple(indices.shape)
    grid = axes if turns is None else axes[:-1]
    if shape is not None:
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        whole = all(isinstance(size, Integral | torch.SymInt) and size >= 0 for size in sizes)
        if not whole or len(sizes) != 4 or sizes[3] != e_dim:
            raise ValueError(f"the shape must be (B, h, w, {e_dim}), got {shape}")
        grid = sizes[:3]
    each, sites = turns or 1, math.prod(grid)
    if indices.numel() != sites * each or (each > 1 < len(axes) and axes[-1] != each):
        filled = "" if shape is None else f" for a grid of {grid}"
        raise ValueError(
            f"expected {each} code{'s'[: each > 1]} for each site, got the shape {axes}{filled}"
        )
    if turns is not None and len(grid) not in (1, 3):
        raise ValueError(f"codes must be (B, h, w, T) or (N, T), got the shape {axes}")
    return indices.long().reshape(sites, each), grid


def mark_impossible(codes: Tensor, n_e: int, dummies: bool) -> Tensor:
    """Mark the sites of codes (N, T) that no loop produces: (N,) bool.

    Args:
        codes: (N, T) int64.
        n_e: K.
        dummies: True for the form ``D,D,A'``, False for ``A1,A2,A3``.

    Raises:
        ValueError: There is one, and values may be looked at (see `checks_values`).
    """
    last = (codes >= 0).sum(dim=1, keepdim=True) - 1  # (N, 1)
    turn = torch.arange(codes.shape[1], device=codes.device)  # (T,)
    is_code = (codes >= 0) & (codes < n_e)
    body = (codes == n_e) if dummies else is_code
    # By logic rather than `where`, which onnxruntime does not have for truth values.
    right = ((turn < last) & body) | ((turn == last) & is_code)
    right = right | ((turn > last) & (codes == ABSENT))  # (N, T)
    wrong = ~right.all(dim=1) | (last.squeeze(1) < 0)  # (N,)
    if checks_values(wrong) and wrong.any():
        site = int(wrong.nonzero()[0])
        form = "D,D,A'" if dummies else "A1,A2,A3"
        raise ValueError(
            f"site {site} has the codes {codes[site].tolist()}, which are not of the form {form} "
            f"with codes 0..{n_e - 1}, D = {n_e} and -1 after the end"
        )
    return wrong
