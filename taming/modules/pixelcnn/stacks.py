"""The two stacks of a gated PixelCNN, whole images or a site at a time.

From van den Oord et al. 2016 (arXiv:1606.05328, section 2). The vertical stack sees the rows above
a site, the horizontal stack the sites to its left and, through the vertical one, those above:
together all earlier sites and no others. Instead of masked kernels, the inputs are shifted by one
row or column, and every convolution only looks back.

Axis letters: B images, C channels, h w grid, n rows or columns that a convolution looks back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Each layer's inputs in the last n rows (or columns), which the next rows (or columns) need.
Past = list[Tensor]


def gate(x: Tensor) -> Tensor:
    """Gate one half of the channels by the other: (B, 2C, h, w) -> (B, C, h, w), equation 2."""
    signal, opening = x.chunk(2, dim=1)
    return torch.tanh(signal) * torch.sigmoid(opening)


def shift_down(x: Tensor) -> Tensor:
    """Shift (B, C, h, w) down by one row, and fill with zeros."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    """Shift (B, C, h, w) right by one column, and fill with zeros."""
    return F.pad(x, (1, 0))[..., :-1]


class Conv(nn.Conv2d):
    """A convolution without padding; a matrix product, which takes less, of one place at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, h, w)."""
        if x.shape[2:] != self.kernel_size:
            return super().forward(x)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2), with residual connections in both.

    Args:
        channels: C.
        kernel_size: Sites that the vertical stack sees side by side; odd.
        dropout: Dropout of the gates' outputs, in [0, 1).
    """

    def __init__(self, channels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        back = kernel_size // 2
        double = 2 * channels
        self.vertical = nn.Conv2d(channels, double, (back + 1, kernel_size), padding=(0, back))
        self.horizontal = Conv(channels, double, (1, back + 1))
        self.to_horizontal = nn.Conv2d(double, double, 1)
        self.condition = nn.Linear(channels, 2 * double)
        self.vertical_out = nn.Conv2d(channels, channels, 1)
        self.horizontal_out = Conv(channels, channels, 1)
        self.skip = Conv(channels, channels, 1)
        self.drop = nn.Dropout(dropout)

    def down(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the vertical stack, given the rows and the n before them, (B, C, n + rows, w).

        Returns (B, C, rows, w), and the input to the horizontal stack, (B, 2C, rows, w).
        """
        rows = x.shape[2] - self.vertical.kernel_size[0] + 1
        to_vertical, to_horizontal = self.condition(condition)[..., None, None].chunk(2, dim=1)
        seen = self.vertical(x)
        passed = self.drop(gate(seen + to_vertical))
        x = x[:, :, -rows:] + self.vertical_out(passed)
        return x, self.to_horizontal(seen) + to_horizontal

    def right(self, x: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the horizontal stack, given the columns and the n before them.

        These are (B, C, rows, n + columns); ``above`` is the second output of `down`. Returns
        (B, C, rows, columns) twice: for the next layer, and for the output.
        """
        passed = self.drop(gate(self.horizontal(x) + above))
        return x[..., -above.shape[3] :] + self.horizontal_out(passed), self.skip(passed)


class GatedStacks(nn.Module):
    """Vertical and horizontal stack: features of each site from the sites before it.

    Args:
        channels: C.
        layers: Layers of each stack.
        kernel_size: Odd, at least 3: n = kernel_size // 2.
        dropout: Dropout of the gates' outputs, in [0, 1).

    Raises:
        ValueError: ``kernel_size`` is even or too small, or ``layers`` is 0.
    """

    def __init__(
        self, channels: int, layers: int, kernel_size: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.channels = channels
        self.back = kernel_size // 2
        self.layers: list[GatedLayer] = nn.ModuleList(  # type: ignore[assignment]
            GatedLayer(channels, kernel_size, dropout) for _ in range(layers)
        )

    def no_past(self, like: Tensor, height: int, width: int) -> Past:
        """Return zeros (B, C, height, width) per layer: the past of the first row or column."""
        return [like.new_zeros(len(like), self.channels, height, width) for _ in self.layers]

    def down(self, x: Tensor, condition: Tensor, past: Past) -> list[Tensor]:
        """Run the vertical stack over further rows.

        Args:
            x: (B, C, rows, w), the embedded row above each row.
            condition: (B, C).
            past: (B, C, n, w) per layer; replaced by the past of the rows after these.

        Returns:
            (B, 2C, rows, w) per layer, for `right`.
        """
        outputs = []
        for number, layer in enumerate(self.layers):
            seen = torch.cat([past[number], x], dim=2)
            past[number] = seen[:, :, -self.back :]
            x, above = layer.down(seen, condition)
            outputs.append(above)
        return outputs

    def right(self, x: Tensor, above: list[Tensor], past: Past) -> Tensor:
        """Run the horizontal stack over further columns.

        Args:
            x: (B, C, rows, columns), the embedded site to the left of each site.
            above: (B, 2C, rows, columns) per layer, from `down`.
            past: (B, C, rows, n) per layer; replaced by the past of the columns after these.

        Returns:
            (B, C, rows, columns).
        """
        skips = []
        for number, (layer, part) in enumerate(zip(self.layers, above, strict=True)):
            seen = torch.cat([past[number], x], dim=3)
            past[number] = seen[..., -self.back :]
            x, skip = layer.right(seen, part)
            skips.append(skip)
        return F.silu(torch.stack(skips).sum(dim=0))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map embedded sites (B, C, h, w) to features of the sites before each in raster order."""
        h, w = x.shape[2:]
        above = self.down(shift_down(x), condition, self.no_past(x, self.back, w))
        return self.right(shift_right(x), above, self.no_past(x, h, self.back))
