"""Stages of the convolutional networks: residual blocks at one resolution, perhaps attention.

Axis letters: B batch, C channels, E channels of the time embedding, H W feature map, h w the
smallest one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import AttnBlock, ResnetBlock

logger = logging.getLogger(__name__)


class StagePlan(NamedTuple):
    """What stands at one resolution.

    Attributes:
        in_channels: C of the input.
        out_channels: C after the first block.
        num_blocks: How many residual blocks.
        attention: Whether attention follows each of them.
        dropout: Passed on to the blocks.
        groups: Groups of the norms.
    """

    in_channels: int
    out_channels: int
    num_blocks: int
    attention: bool
    dropout: float
    groups: int


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the plan says so."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__()
        widths = [plan.in_channels] + [plan.out_channels] * plan.num_blocks
        self.block = nn.ModuleList(
            ResnetBlock(before, after, plan.dropout, plan.groups)
            for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList(
            AttnBlock(plan.out_channels, plan.groups)
            for _ in range(plan.num_blocks * plan.attention)
        )

    def run_blocks(self, h: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        for block, attn in zip_longest(self.block, self.attn, fillvalue=nn.Identity()):
            h = attn(block(h))
        return h


class DownStage(Stage):
    """A stage of the encoder: blocks, then a module that halves the map (or the identity)."""

    def __init__(self, plan: StagePlan, downsample: nn.Module) -> None:
        super().__init__(plan)
        self.downsample = downsample

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / 2, W / 2); the last keeps H, W."""
        return self.downsample(self.run_blocks(h))


class UpStage(Stage):
    """A stage of the decoder: blocks, then a module that doubles the map (or the identity)."""

    def __init__(self, plan: StagePlan, upsample: nn.Module) -> None:
        super().__init__(plan)
        self.upsample = upsample

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, 2 H, 2 W); the last keeps H, W."""
        return self.upsample(self.run_blocks(h))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution, where attention is always affordable.

    Args:
        channels: C of the output.
        dropout: See `ResnetBlock`, as ``groups`` and ``time_channels``.
        groups: Groups of the norms.
        time_channels: E.
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
        ValueError: There is no level, or a width does not divide into the groups of the norm.
    """
    widths = [ch * factor for factor in ch_mult]
    if not widths or any(width < 1 or width % groups for width in [ch, *widths]):
        raise ValueError(
            f"ch={ch} and ch times each entry of ch_mult={list(ch_mult)} must be positive "
            f"multiples of num_groups={groups}"
        )
    return widths


def warn_of_unreached(attn_resolutions: Sequence[int], reached: Sequence[int]) -> None:
    """Log which attention resolutions no level has, since their attention is silently absent."""
    if missed := sorted(set(attn_resolutions) - set(reached)):
        logger.warning(
            "attn_resolutions %s add no attention: the levels have the resolutions %s",
            missed,
            list(reached),
        )
