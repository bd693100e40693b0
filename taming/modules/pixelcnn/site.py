"""One site of codes as a few symbols, one after the other: its length, then its codes.

Axis letters: T turns, K codes, M symbols of a site, C channels, V values of a symbol.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.checks import ABSENT


class SiteSymbols:
    """Codes (..., T) <-> symbols (..., M): length - 1, then each code; -1 for absent codes.

    A site of ``D,D,A'`` has two symbols, since its dummies follow from its length; one of
    ``A1,A2,A3`` has up to T + 1. Where every site has T codes, these are the symbols.

    Args:
        n_e: K, number of codes.
        max_loops: T.
        dummies: True for codes of the form ``D,D,A'``, False for ``A1,A2,A3``.
        fixed_length: True if every site has T codes.

    Attributes:
        sizes: V of each of the M symbols.
    """

    def __init__(self, n_e: int, max_loops: int, dummies: bool, fixed_length: bool = False) -> None:
        self.n_e = n_e
        self.max_loops = max_loops
        self.dummies = dummies
        self.fixed_length = fixed_length or max_loops == 1
        codes = [n_e] * (1 if dummies else max_loops)
        self.sizes = codes if self.fixed_length else [max_loops, *codes]

    def of_codes(self, codes: Tensor) -> Tensor:
        """Encode valid codes (..., T) int64 as symbols (..., M)."""
        if self.fixed_length:
            return codes
        last = (codes >= 0).sum(dim=-1, keepdim=True) - 1
        return torch.cat([last, codes.gather(-1, last) if self.dummies else codes], dim=-1)

    def to_codes(self, symbols: Tensor) -> Tensor:
        """Decode symbols (..., M) to codes (..., T); symbols after a site's end are ignored."""
        if self.fixed_length:
            return symbols
        last, codes = symbols[..., :1], symbols[..., 1:]
        turn = torch.arange(self.max_loops, device=symbols.device)
        if self.dummies:
            codes = torch.where(turn < last, self.n_e, codes)
        return torch.where(turn <= last, codes, ABSENT)


class SymbolEmbedding(nn.Module):
    """Sum of learned vectors for the symbols of a site, of ``sizes`` V; absent ones add zero."""

    offsets: Tensor

    def __init__(self, sizes: list[int], channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1 + sum(sizes), channels, padding_idx=0)
        starts = [1 + sum(sizes[:place]) for place in range(len(sizes))]
        self.register_buffer("offsets", torch.tensor(starts), persistent=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """Embed the first symbols of sites, (..., up to M) int64, as (..., C)."""
        rows = symbols + self.offsets[: symbols.shape[-1]]
        return self.table(torch.where(symbols >= 0, rows, 0)).sum(dim=-2)


class SiteHead(nn.Module):
    """Prediction of a site's symbols, of ``sizes`` V, one after the other."""

    def __init__(self, sizes: list[int], channels: int) -> None:
        super().__init__()
        self.embed = SymbolEmbedding(sizes, channels)
        self.place = nn.Embedding(len(sizes), channels)
        self.mix = nn.Linear(channels, 2 * channels)
        self.out = nn.ModuleList(nn.Linear(2 * channels, size) for size in sizes)

    def forward(self, site: Tensor, before: Tensor) -> Tensor:
        """Predict the symbol after the first m (..., m) of a site: logits (..., V).

        The features (..., C) are those of the sites before.
        """
        place = before.shape[-1]
        context = site + self.embed(before) + self.place.weight[place]
        return self.out[place](F.silu(self.mix(context)))
