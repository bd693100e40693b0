"""Gated PixelCNN over the codes of images, for quantizers of one code or of several per site.

From van den Oord et al. 2016 (arXiv:1606.05328). As the colours of a pixel there, the symbols of a
site are predicted in order, each from all earlier sites and the symbols before it in its own.

Axis letters: B images, C channels, h w grid, T turns, M symbols of a site, V values of a symbol.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.pixelcnn.site import SiteHead, SiteSymbols, SymbolEmbedding
from taming.modules.pixelcnn.stacks import GatedStacks
from taming.modules.vqvae.checks import ABSENT


class PixelCNN(nn.Module):
    """Distribution of codes (B, h, w, T), given a class; for any grid.

    Args:
        site: The symbols of a site's codes.
        n_classes: Number of classes; 1 for an unconditional model.
        stacks: Gathers the sites before each site.

    Example:
        >>> site = SiteSymbols(n_e=5, max_loops=3, dummies=False)
        >>> net = PixelCNN(site, n_classes=2, stacks=GatedStacks(channels=8, layers=2))
        >>> blank, labels = torch.zeros(4, 2, 2, 3, dtype=torch.int64), torch.tensor([0, 0, 1, 1])
        >>> codes = net.sample(blank, labels, lambda logits: logits.argmax(dim=-1))
        >>> codes.shape, net.nll(codes, labels).shape
        (torch.Size([4, 2, 2, 3]), torch.Size([4]))
    """

    def __init__(self, site: SiteSymbols, n_classes: int, stacks: GatedStacks) -> None:
        super().__init__()
        self.site = site
        self.classes = nn.Embedding(n_classes, stacks.channels)
        self.embed = SymbolEmbedding(site.sizes, stacks.channels)
        self.stacks = stacks
        self.head = SiteHead(site.sizes, stacks.channels)

    def forward(self, symbols: Tensor, labels: Tensor) -> list[Tensor]:
        """Predict each of the symbols (B, h, w, M) from those before it: M logits (B, h, w, V)."""
        x = rearrange(self.embed(symbols), "b h w c -> b c h w")
        x = self.stacks(x, self.classes(labels))
        sites = rearrange(x, "b c h w -> b h w c")
        return [self.head(sites, symbols[..., :place]) for place in range(symbols.shape[-1])]

    def nll(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Return the exact -log p (B,) of codes (B, h, w, T) of classes (B,): nats, float32."""
        symbols = self.site.of_codes(codes)
        parts = [
            F.cross_entropy(
                rearrange(logits, "b h w v -> b v h w").float(),
                target,
                ignore_index=ABSENT,
                reduction="none",
            ).sum(dim=(1, 2))
            for logits, target in zip(self(symbols, labels), symbols.unbind(-1), strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    @torch.no_grad()
    def sample(
        self,
        codes: Tensor,
        labels: Tensor,
        sample_symbol: Callable[[Tensor], Tensor],
        known: Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample sites in raster order, for about the arithmetic of one `forward` in all.

        The vertical stack goes once over each row and the horizontal one once over each site; both
        keep what they need of the rows and columns before.

        Args:
            codes: (B, h, w, T) int64; the codes of unknown sites are ignored.
            labels: (B,) int64 classes.
            sample_symbol: Maps logits (B, V) to symbols (B,).
            known: (h, w) bool, sites that stay as they are; None for none.
            callback: Called after each site from the first unknown one to the last, with the number
                of sites up to it and the codes (B, h, w, T) so far, which are not to be changed.

        Returns:
            (B, h, w, T) int64.
        """
        codes, (h, w) = codes.clone(), codes.shape[1:3]
        kept = codes.new_zeros(h, w, dtype=torch.bool) if known is None else known
        unknown = (~kept).flatten().nonzero()[:, 0].tolist()
        if not unknown:
            return codes
        condition, first, last = self.classes(labels), unknown[0], unknown[-1]
        past = self.stacks.no_past(condition, self.stacks.back, w)
        # Each row follows from those above it: shifted down by one, the known ones all at once.
        above = F.pad(self._embed(codes[:, : first // w]), (0, 0, 1, 0))
        for row in range(first // w, last // w + 1):
            features = [part[:, :, -1:] for part in self.stacks.down(above, condition, past)]
            row_past = self.stacks.no_past(features[0], 1, self.stacks.back)
            left = torch.zeros_like(row_past[0][..., :1])  # (B, C, 1, 1)
            for column in range(min(w, last + 1 - row * w)):
                here = [part[..., column : column + 1] for part in features]
                x = self.stacks.right(left, here, row_past)  # (B, C, 1, 1)
                if not kept[row, column]:
                    codes[:, row, column] = self._sample_site(x[:, :, 0, 0], sample_symbol)
                if callback is not None and row * w + column >= first:
                    callback(row * w + column + 1, codes)
                left = self._embed(codes[:, row : row + 1, column : column + 1])
            above = self._embed(codes[:, row : row + 1])
        return codes

    def _sample_site(self, x: Tensor, sample_symbol: Callable[[Tensor], Tensor]) -> Tensor:
        """Sample a site's codes (B, T) given the features (B, C) of the sites before it."""
        symbols = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for _ in self.site.sizes:
            symbol = sample_symbol(self.head(x, symbols))
            symbols = torch.cat([symbols, symbol[:, None]], dim=1)
        return self.site.to_codes(symbols)

    def _embed(self, codes: Tensor) -> Tensor:
        """Embed codes (B, h, w, T) as (B, C, h, w)."""
        return rearrange(self.embed(self.site.of_codes(codes)), "b h w c -> b c h w")
