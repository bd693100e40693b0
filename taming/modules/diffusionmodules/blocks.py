"""Parts of the convolutional networks, from DDPM (arXiv:2006.11239): blocks, and stages of them.

Axis letters: B images, C channels, E channels of the time embedding, H W feature map, h w the
smallest one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taming.modules.tiling import Survey

logger = logging.getLogger(__name__)


class GroupNorm(nn.GroupNorm):
    """Group norm that takes the statistics of a tile from the `Survey` of its picture."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        survey = Survey.active()
        if survey is None:
            # Not F.group_norm, which refuses a single site of one image even in evaluation mode.
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        mean, variance = survey.moments(self, x, self.num_groups)  # (groups,)
        repeats = self.num_channels // self.num_groups
        scale = self.weight * (variance + self.eps).rsqrt().repeat_interleave(repeats)
        shift = self.bias - mean.repeat_interleave(repeats) * scale
        scale, shift = (t[:, None, None].to(x.dtype) for t in (scale, shift))
        return torch.addcmul(shift, x, scale)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Return the group norm used throughout, with eps 1e-6."""
    return GroupNorm(groups, channels, eps=1e-6)


class Downsample(nn.Module):
    """Halve height and width.

    Args:
        channels: C of input and output.
        with_conv: Learn a strided 3x3 convolution, padded right and below only; otherwise average.
    """

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2)."""
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Double height and width by repeating pixels.

    Args:
        channels: C of input and output.
        with_conv: Follow with a 3x3 convolution.
    """

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2 H, 2 W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class ResnetBlock(nn.Module):
    """Two rounds of norm, SiLU and 3x3 convolution, added to the input.

    Args:
        in_channels: C of the input.
        out_channels: C of the output; a 1x1 convolution adapts the shortcut where they differ.
        dropout: Probability of zeroing an activation before the second convolution.
        groups: Groups of the norms.
        time_channels: E; 0 for a block without a time embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        groups: int = 32,
        time_channels: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if time_channels:
            self.temb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.adapts = in_channels != out_channels
        if self.adapts:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W), and a time embedding (B, E), to (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.temb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if self.adapts else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input.

    Args:
        channels: C of input and output.
        groups: Groups of the norm.
    """

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        # Contiguous: with channels apart, torch's CPU kernel builds the whole attention matrix.
        q = rearrange(q, "b c h w -> b 1 (h w) c").contiguous()
        if survey := Survey.active():
            k, v = (t.expand(len(x), -1, -1, -1) for t in survey.keys(self, k, v))
        else:
            k, v = (rearrange(t, "b c h w -> b 1 (h w) c").contiguous() for t in (k, v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Blocks(nn.Module):
    """Base of what is made of blocks.

    Attributes:
        gradient_checkpointing: In training, keep only the inputs of each block and compute the rest
            again on the way back (arXiv:1604.06174): the same gradients in less memory.
    """

    gradient_checkpointing = False

    def through(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Apply a block."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Stage(Blocks):
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
            h = self.through(attention, self.through(block, h))
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


class Middle(Blocks):
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
        h = self.through(self.attn_1, self.through(self.block_1, h, time))
        return self.through(self.block_2, h, time)


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
