"""Codes and tables for the codec, the same on every machine and in every release of torch."""

from types import SimpleNamespace

import torch
from torch import Tensor

from taming.modules.vqvae.loopy import LoopyVectorQuantizer


def integers(count: int, most: int, seed: int = 0) -> Tensor:
    """Integers (N,) in 0..most-1 by a linear congruential generator (Knuth's MMIX)."""
    values, state = [], seed
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append((state >> 33) % most)
    return torch.tensor(values, dtype=torch.int64)


def valid_codes(
    grid: tuple[int, int], turns: int, n_e: int, dummies: bool = False, seed: int = 0
) -> Tensor:
    """Codes (h, w, T) that a loop produces, rather the first ones, of all lengths."""
    sites = grid[0] * grid[1]
    lengths = integers(sites, turns, seed) + 1
    found = integers(sites * turns, n_e * n_e, seed + 1).double().sqrt().long().view(sites, turns)
    codes = (n_e - 1 - found).clamp(min=0)
    turn = torch.arange(turns)
    if dummies:
        codes = codes.masked_fill(turn < lengths[:, None] - 1, n_e)
    return codes.masked_fill(turn >= lengths[:, None], -1).view(*grid, turns)


def cut(codes: Tensor, turns: int) -> Tensor:
    """Codes (h, w, T) without what follows so many turns."""
    return codes.masked_fill(torch.arange(codes.shape[-1]) >= turns, -1)


def fill_tables(quantizer: LoopyVectorQuantizer) -> None:
    """Give a quantizer the shares of `tables`."""
    own = quantizer.entropy
    found = tables(own.max_loops, own.n_e)
    own.load_state_dict({"codes": found.codes, "going_on": found.going_on})


def tables(turns: int, n_e: int, learned: bool = True) -> SimpleNamespace:
    """A stand-in of the quantizer's entropy tables: uneven shares, some of them zero."""
    counts = integers(turns * n_e, 1000, 5).view(turns, n_e) ** 3
    counts[:, n_e // 2] = 0
    shares = (counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)).float()
    going_on = (integers(turns, 999, 7) + 1).float() / 1000
    going_on[-1] = 0
    return SimpleNamespace(codes=shares, going_on=going_on, learned=learned)
