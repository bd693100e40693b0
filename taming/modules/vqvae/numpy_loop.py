"""The loop in NumPy: latents of an exported encoder to codes of an exported decoder.

This file needs nothing but NumPy; ``scripts/export.py`` saves a copy as ``loop.py`` beside the
graphs and ``loop.npz``::

    import numpy as np, onnxruntime
    from loop import encode
    encoder, decoder = map(onnxruntime.InferenceSession, ("encoder.onnx", "decoder.onnx"))
    (z,) = encoder.run(None, {"images": images})  # (B, C, H, W) float32 in [-1, 1]
    codes = encode(z, np.load("loop.npz"), max_codes=2000)
    (again,) = decoder.run(None, {"codes": codes})

Axis letters: B images, D channels, h w grid, N = B h w latents, K codes, T turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_SCORES = 1 << 22  # of latents with codes, held at once


def encode(
    z: Array,
    tables: Mapping[str, Array],
    threshold: float | None = None,
    max_codes: int | None = None,
    rate: float | None = None,
) -> Array:
    """Find the codes of latents, at one of three rates or the tokenizer's own.

    Args:
        z: (B, D, h, w) latents.
        tables: Of ``loop.npz``: ``codebooks`` (T, K, D), as each turn sees them, or (1, K, D) where
            all see one. Of a loop also its own ``threshold`` or ``rate``; ``max_loops``, T; for a
            rate ``code_bits`` (T, K), ``end_bits`` (T, 2) and ``latent_std``; and, where a turn
            pulls a latent toward its code, the ``step``.
        threshold: Distance at which a loop ends.
        max_codes: Instead: most codes of an image, at least one for each site.
        rate: Instead: lambda >= 0; codes and ends are those of least
            ``|z - z_q|^2 / latent_std^2 + lambda bits``.

    Returns:
        (B, h, w, T) int64: 0..K-1 for a code, K for the dummy D, -1 after the end of a loop.

    Raises:
        ValueError: Several rates are given, one that the tokenizer has not, or one that cannot be
            met.

    Example:
        >>> tables = {"codebooks": np.array([[[0.0], [4.0]], [[-1.0], [1.0]]])}
        >>> tables |= {"threshold": np.array(0.5), "max_loops": np.array(2)}
        >>> encode(np.array([[[[0.25, 5.0]]]]), tables).tolist()
        [[[[0, -1], [1, 1]]]]
    """
    batch, channels, h, w = z.shape
    rows = np.moveaxis(z, 1, 3).reshape(-1, channels).astype(np.float64)  # (N, D)
    given = {"threshold": threshold, "max_codes": max_codes, "rate": rate}
    rates = {name: float(value) for name, value in given.items() if value is not None}
    if len(rates) > 1:
        raise ValueError(f"give one rate, got {' and '.join(rates)}")
    if "max_loops" not in tables:
        if rates:
            raise ValueError(f"this tokenizer has a fixed rate: omit {''.join(rates)}")
        return _paths(rows, tables)[0].reshape(batch, h, w, 1)
    own = "rate" if "rate" in tables else "threshold"
    name, value = next(iter(rates.items()), (own, float(tables.get(own, 0))))
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value:g}")
    if name == "rate":
        codes, ends = _cheapest(rows, tables, value)
    else:
        codes, distances = _paths(rows, tables)  # (N, T)
        if name == "max_codes":
            tau = _threshold_for(distances.reshape(batch, h * w, codes.shape[1]), int(value))
        else:
            tau = np.full(batch, value)
        within: Array = distances <= tau.repeat(h * w)[:, None]
        within[:, -1] = True  # the last turn ends every loop
        ends = within.argmax(axis=1)
    turns = codes.shape[1]
    left = ends[:, None] - np.arange(turns)  # turns to go
    if "step" in tables:
        codes = np.where(left > 0, tables["codebooks"].shape[1], codes)
    return np.where(left < 0, -1, codes).reshape(batch, h, w, turns)


def _cheapest(rows: Array, tables: Mapping[str, Array], rate: float) -> tuple[Array, Array]:
    """Return codes (N, T) and the last turn (N,) of least cost, by the bits of the tables."""
    if "code_bits" not in tables:
        raise ValueError("rate has no meaning: more turns bring a site of this tokenizer no nearer")
    weight = rate * float(tables["latent_std"]) ** 2  # squared distance that is worth a bit
    code_bits = tables["code_bits"].astype(np.float64)
    codes, distances = _paths(rows, tables, weight * code_bits)
    end, going_on = tables["end_bits"].astype(np.float64).T  # (T,)
    lengths = end + np.concatenate([[0.0], going_on[:-1].cumsum()])
    bits = code_bits[np.arange(codes.shape[1]), codes].cumsum(axis=1) + lengths  # (N, T)
    return codes, (distances**2 + weight * bits).argmin(axis=1)


def _paths(
    rows: Array, tables: Mapping[str, Array], prices: Array | None = None
) -> tuple[Array, Array]:
    """Return codes (N, T) int64 and distances (N, T) of loops that take every turn.

    Prices (T, K) are added to the squared distances of codes.
    """
    codebooks = tables["codebooks"].astype(np.float64)
    if "step" in tables:  # the code stays the same, and the distance shrinks by a factor
        codes = _nearest(rows, codebooks[0])[:, None].repeat(int(tables["max_loops"]), axis=1)
        first = np.linalg.norm(rows - codebooks[0][codes[:, 0]], axis=1)
        return codes, first[:, None] * (1 - float(tables["step"])) ** np.arange(codes.shape[1])
    found, distances = [], []
    for turn, codebook in enumerate(codebooks):
        found.append(_nearest(rows, codebook, 0.0 if prices is None else prices[turn]))
        rows = rows - codebook[found[-1]]
        distances.append(np.linalg.norm(rows, axis=1))
    return np.stack(found, axis=1), np.stack(distances, axis=1)


def _nearest(rows: Array, codebook: Array, prices: Array | float = 0.0) -> Array:
    """Return the code (N,) int64 of least squared distance and price of each row (N, D)."""
    half = ((codebook**2).sum(axis=1) + prices) / 2
    size = max(1, _SCORES // len(codebook))
    parts = (rows[start : start + size] for start in range(0, max(len(rows), 1), size))
    return np.concatenate([(half - part @ codebook.T).argmin(axis=1) for part in parts])


def _threshold_for(distances: Array, max_codes: int) -> Array:
    """Return the smallest threshold (B,) that keeps images (B, h w, T) to a number of codes."""
    batch, sites, turns = distances.shape
    if max_codes < sites:
        raise ValueError(f"an image of {sites} sites needs at least {sites} codes, got {max_codes}")
    # A site goes past a turn as long as the smallest distance so far is above the threshold.
    minima = np.minimum.accumulate(distances, axis=2)[..., :-1]
    minima = minima.reshape(batch, sites * (turns - 1))
    ordered = np.concatenate([-np.sort(-minima, axis=1), np.zeros((batch, 1))], axis=1)
    return ordered[:, min(max_codes - sites, minima.shape[1])]
