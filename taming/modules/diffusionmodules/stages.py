"""Stages of the convolutional networks: residual blocks and attention at one resolution.

Axis letters: B images, C channels, E channels of the time embedding, H W feature map, h w the
smallest one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import AttnBlock, ResnetBlock

logger = logging.getLogger(__name__)


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention if there is any.

    Args:
        widths: (before, after) channels of each block.
        attention: Put attention after each block.
        dropout: Probability of zeroing an activation inside the blocks.
        groups: Groups of the norms.
        time_channels: E; 0 for blocks without a time embedding.
    """

    def __init__(
        self,
        widths: list[tuple[int, int]],
        attention: bool,
        dropout: float,
        groups: int = 32,
        time_channels: int = 0,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(*width, dropout, groups, time_channels) for width in widths
        )
        self.attn = nn.ModuleList(AttnBlock(after, groups) for _, after in widths * attention)

    def steps(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield each block with its attention, or the identity."""
        return zip_longest(self.block, self.attn, fillvalue=nn.Identity())

    def run_blocks(self, h: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        for block, attention in self.steps():
            h = attention(block(h))
        return h


class DownStage(Stage):
    """Stage of the encoder: blocks, then a module that halves the map (or the identity)."""

    def __init__(self, downsample: nn.Module, *plan: Any) -> None:
        super().__init__(*plan)
        self.downsample = downsample

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / 2, W / 2); the last stage keeps H, W."""
        return self.downsample(self.run_blocks(h))


class UpStage(Stage):
    """Stage of the decoder: blocks, then a module that doubles the map (or the identity)."""

    def __init__(self, upsample: nn.Module, *plan: Any) -> None:
        super().__init__(*plan)
        self.upsample = upsample

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', 2 H, 2 W); the last stage keeps H, W."""
        return self.upsample(self.run_blocks(h))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution, where attention is always affordable.

    Args:
        channels: C of the output.
        dropout: Probability of zeroing an activation inside the blocks.
        groups: Groups of the norms.
        time_channels: E; 0 for blocks without a time embedding.
        in_channels: C of the input; None for ``channels``.
    """

    def __init__(
        self,
        channels: int,
        dropout: float,
        groups: int = 32,
        time_channels: int = 0,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        before = channels if in_channels is None else in_channels
        self.block_1 = ResnetBlock(before, channels, dropout, groups, time_channels)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups, time_channels)

    def forward(self, h: Tensor, time: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, h, w), and a time embedding (B, E), to (B, channels, h, w)."""
        return self.block_2(self.attn_1(self.block_1(h, time)), time)


def level_widths(ch: int, ch_mult: Sequence[int], groups: int) -> list[int]:
    """Return the channels of each level, highest resolution first.

    Raises:
        ValueError: There is no level, or a width is not a multiple of the norms' groups.
    """
    widths = [ch * factor for factor in ch_mult]
    if not widths or any(width < 1 or width % groups for width in [ch, *widths]):
        raise ValueError(
            f"ch={ch} and ch times each entry of ch_mult={list(ch_mult)} must be positive "
            f"multiples of num_groups={groups}"
        )
    return widths


def warn_of_unreached(attn_resolutions: Sequence[int], reached: Sequence[int]) -> None:
    """Log the attention resolutions that no level has: their attention is silently absent."""
    if missed := sorted(set(attn_resolutions) - set(reached)):
        logger.warning(
            "attn_resolutions %s add no attention: the levels have the resolutions %s",
            missed,
            list(reached),
        )
