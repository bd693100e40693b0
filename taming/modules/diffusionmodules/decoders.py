"""Small decoders of the original, without attention.

Axis letters: B images, C channels, H W feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import ResnetBlock, Upsample, group_norm


class SimpleDecoder(nn.Module):
    """Three residual blocks, then upsampling by 2.

    Args:
        in_channels: C of the input; a multiple of 32.
        out_channels: C of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = [in_channels, 2 * in_channels, 4 * in_channels, 2 * in_channels]
        self.model = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1),
            *(ResnetBlock(before, after) for before, after in pairwise(widths)),
            nn.Conv2d(2 * in_channels, in_channels, 1),
            Upsample(in_channels),
        )
        self.norm_out = group_norm(in_channels, 32)
        self.conv_out = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, 2 H, 2 W)."""
        return self.conv_out(F.silu(self.norm_out(self.model(x))))


class UpsampleDecoder(nn.Module):
    """Residual blocks at each resolution, with upsampling by 2 in between.

    Args:
        in_channels: C of the input; a multiple of 32.
        out_channels: C of the output.
        ch: Unit of the widths; a multiple of 32.
        num_res_blocks: Number of residual blocks per level, less one.
        resolution: Height of a training image; others are accepted.
        ch_mult: Channels of each level as multiples of ``ch``, lowest resolution first.
        dropout: Probability of zeroing an activation inside the blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ch: int,
        num_res_blocks: int,
        resolution: int,
        ch_mult: Sequence[int] = (2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        widths = [ch * factor for factor in ch_mult]
        self.res_blocks = nn.ModuleList()
        for before, after in pairwise([in_channels, *widths]):
            steps = pairwise([before] + [after] * (num_res_blocks + 1))
            self.res_blocks.append(nn.Sequential(*(ResnetBlock(*step, dropout) for step in steps)))
        self.upsample_blocks = nn.ModuleList(Upsample(width) for width in widths[:-1])
        self.norm_out = group_norm(widths[-1], 32)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H f, W f), f = 2^(levels - 1)."""
        h = self.res_blocks[0](x)
        for upsample, blocks in zip(self.upsample_blocks, self.res_blocks[1:], strict=True):
            h = blocks(upsample(h))
        return self.conv_out(F.silu(self.norm_out(h)))
