"""Gated PixelCNN over the codes of images, for quantizers of one code or of several per site.

From van den Oord et al. 2016 (arXiv:1606.05328). As the colours of a pixel there, the symbols of a
site are predicted in order, each from all earlier sites and the symbols before it in its own.

Axis letters: B images, C channels, h w grid, T turns, M symbols of a site, V values of a symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.pixelcnn.site import ABSENT, SiteHead, SiteSymbols, SymbolEmbedding
from taming.modules.pixelcnn.stacks import GatedStacks


class PixelCNN(nn.Module):
    """Distribution of codes (B, h, w, T), given a class; for any grid.

    Args:
        site: How a site's codes are written as symbols.
        n_classes: Number of classes; 1 if there are none to tell apart.
        stacks: What looks at the sites before each site.
    """

    def __init__(self, site: SiteSymbols, n_classes: int, stacks: GatedStacks) -> None:
        super().__init__()
        self.site = site
        self.classes = nn.Embedding(n_classes, stacks.channels)
        self.embed = SymbolEmbedding(site.sizes, stacks.channels)
        self.stacks = stacks
        self.head = SiteHead(site.sizes, stacks.channels)

    def forward(self, symbols: Tensor, labels: Tensor) -> list[Tensor]:
        """Predict each symbol from those before it.

        Args:
            symbols: (B, h, w, M) int64, -1 for absent ones.
            labels: (B,) int64 classes.

        Returns:
            Logits (B, h, w, V), one for each of the M symbols.
        """
        x = rearrange(self.embed(symbols), "b h w c -> b c h w")
        x = self.stacks(x, self.classes(labels))
        sites = rearrange(x, "b c h w -> b h w c")
        return [self.head(sites, symbols[..., :place]) for place in range(symbols.shape[-1])]

    def nll(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Return -log p (B,) of codes (B, h, w, T) of classes (B,): exact, in nats, float32."""
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
    def write(
        self,
        codes: Tensor,
        labels: Tensor,
        draw: Callable[[Tensor], Tensor],
        known: Tensor | None = None,
    ) -> Iterator[int]:
        """Draw sites in raster order, in place, for about the arithmetic of one `forward` in all.

        The vertical stack goes once over each row and the horizontal one once over each site; both
        keep what they need of the rows and columns before.

        Args:
            codes: (B, h, w, T) int64; what stands in sites that are still to be drawn is not read.
            labels: (B,) int64 classes.
            draw: Turns logits (B, V) into symbols (B,).
            known: (h, w) bool, sites that stay as they are; None for none.

        Yields:
            Number of sites that are written, after each one from the first that is drawn.
        """
        _, h, w, _ = codes.shape
        kept = codes.new_zeros(h, w, dtype=torch.bool) if known is None else known
        start = int(kept.flatten().long().cumprod(0).sum())
        condition, first = self.classes(labels), start // w
        past = self.stacks.no_past(condition, self.stacks.back, w)
        # Each row is drawn from those above it: moved down by one, and the known ones all at once.
        above = F.pad(self._embed(codes[:, :first]), (0, 0, 1, 0))
        for row in range(first, h):
            told = [part[:, :, -1:] for part in self.stacks.down(above, condition, past)]
            for column in self._write_row(codes[:, row], told, draw, kept[row].tolist()):
                if row * w + column >= start:
                    yield row * w + column + 1
            above = self._embed(codes[:, row : row + 1])

    def _write_row(
        self, row: Tensor, above: list[Tensor], draw: Callable[[Tensor], Tensor], kept: list[bool]
    ) -> Iterator[int]:
        """Draw a row of codes (B, w, T) where it is not kept; yields each column."""
        past = self.stacks.no_past(above[0], 1, self.stacks.back)
        left = torch.zeros_like(past[0][..., :1])
        for column in range(row.shape[1]):
            told = [part[..., column : column + 1] for part in above]
            x = self.stacks.right(left, told, past)
            if not kept[column]:
                row[:, column] = self._draw_site(x[:, :, 0, 0], draw)
            yield column
            left = self._embed(row[:, None, column : column + 1])

    def _draw_site(self, x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw a site's codes (B, T) from what the others say, (B, C)."""
        symbols = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for _ in self.site.sizes:
            symbols = torch.cat([symbols, draw(self.head(x, symbols))[:, None]], dim=1)
        return self.site.to_codes(symbols)

    def _embed(self, codes: Tensor) -> Tensor:
        """Embed codes (B, h, w, T) as (B, C, h, w)."""
        return rearrange(self.embed(self.site.of_codes(codes)), "b h w c -> b c h w")
