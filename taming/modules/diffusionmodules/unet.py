"""Further networks of the original: the U-Net of DDPM (arXiv:2006.11239), one with a latent
variable, and small decoders.

No model here uses them; they are kept for code that imports them from the original.

Axis letters: B images, C channels, E channels of the time embedding, H W image or feature map, h w
the smallest feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import (
    Downsample,
    Middle,
    ResnetBlock,
    Stage,
    Upsample,
    group_norm,
    level_widths,
    warn_of_unreached,
)


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Embed steps (B,) as sines and cosines of falling frequency (arXiv:1706.03762): (B, C)."""
    half = embedding_dim // 2
    exponents = torch.arange(half, device=timesteps.device) / (half - 1)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponents)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, embedding_dim % 2))


class TimeEmbedding(nn.Module):
    """Two linear layers over `get_timestep_embedding`."""

    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.dense = nn.ModuleList(
            [nn.Linear(channels, time_channels), nn.Linear(time_channels, time_channels)]
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed steps (B,) as (B, E)."""
        return self.dense[1](F.silu(self.dense[0](get_timestep_embedding(t, self.channels))))


class DownLevel(Stage):
    """Stage of the way down; ``downsample`` is the identity in the last."""

    downsample: nn.Module

    def forward(self, h: Tensor, time: Tensor | None) -> list[Tensor]:
        """Map (B, C, H, W) to the features after each block, and after downsampling."""
        features = [h]
        for block, attention in self.steps():
            features.append(attention(block(features[-1], time)))
        if not isinstance(self.downsample, nn.Identity):
            features.append(self.downsample(features[-1]))
        return features[1:]


class UpLevel(Stage):
    """Stage of the way up; ``upsample`` is the identity in the last."""

    upsample: nn.Module

    def forward(self, h: Tensor, features: list[Tensor], time: Tensor | None) -> Tensor:
        """Map (B, C, H, W) to the next stage's input; pops features of the way down."""
        for block, attention in self.steps():
            h = attention(block(torch.cat([h, features.pop()], dim=1), time))
        return self.upsample(h)


class Model(nn.Module):
    """The U-Net of DDPM: the way down, and the way up with skip connections.

    Args:
        ch: Channels at the first convolution; a multiple of 32.
        out_ch: Channels of the output.
        ch_mult: Channels of each level as multiples of ``ch``, highest resolution first.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        attn_resolutions: Heights of the levels with attention, for an image of ``resolution``.
        dropout: Probability of zeroing an activation inside the blocks.
        resamp_with_conv: Learn the down- and upsampling.
        in_channels: Channels of the input.
        resolution: Height of a training image.
        use_timestep: Embed a time step.
        extra_channels: Channels concatenated to the smallest feature map.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        use_timestep: bool = True,
        extra_channels: int = 0,
    ) -> None:
        super().__init__()
        widths = level_widths(ch, ch_mult, 32)
        resolutions = [resolution // 2**i for i in range(len(widths))]
        warn_of_unreached(attn_resolutions, resolutions)
        # As in the original, blocks have weights for the time even without time steps.
        time_channels = 4 * ch
        self.temb = TimeEmbedding(ch, time_channels) if use_timestep else None
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        below = [*widths[1:], widths[-1]]
        for i, (before, after) in enumerate(pairwise([ch, *widths])):
            attention, same = resolutions[i] in attn_resolutions, [after] * num_res_blocks
            down = DownLevel([*pairwise([before, *same])], attention, dropout, 32, time_channels)
            # On the way up, a stage's last block takes the input of the stage on the way down.
            inputs = zip([below[i], *same], [*same, before], strict=True)
            pairs = [(h + skip, after) for h, skip in inputs]
            up = UpLevel(pairs, attention, dropout, 32, time_channels)
            last = i == len(widths) - 1
            down.downsample = nn.Identity() if last else Downsample(after, resamp_with_conv)
            up.upsample = Upsample(after, resamp_with_conv) if i else nn.Identity()
            self.down.append(down)
            self.up.append(up)
        self.mid = Middle(widths[-1], dropout, 32, time_channels, widths[-1] + extra_channels)
        self.norm_out = group_norm(widths[0], 32)
        self.conv_out = nn.Conv2d(widths[0], out_ch, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W), at steps (B,), to (B, out_ch, H, W)."""
        return self.run(x, t)

    def run(self, x: Tensor, t: Tensor | None, latent: Tensor | None = None) -> Tensor:
        """Run the network, with ``latent`` (B, extra_channels, h, w) at the smallest feature map.

        Raises:
            ValueError: Steps are missing or unexpected.
        """
        if (self.temb is None) != (t is None):
            raise ValueError(
                f"use_timestep is {self.temb is not None}, but t is "
                f"{'missing' if t is None else 'given'}"
            )
        time = None if self.temb is None else self.temb(t)  # (B, E)
        features = [self.conv_in(x)]
        for stage in self.down:
            features += stage(features[-1], time)
        h = features[-1] if latent is None else torch.cat([features[-1], latent], dim=1)
        h = self.mid(h, time)  # (B, C, h, w)
        for stage in reversed(self.up):
            h = stage(h, features, time)
        return self.conv_out(F.silu(self.norm_out(h)))


class VUNet(Model):
    """A U-Net over a condition, with a latent variable at the smallest feature map.

    Takes the arguments of `Model`, of which ``in_channels`` is not used, and:

    Args:
        c_channels: Channels of the condition.
        z_channels: Channels of the latent variable.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        in_channels: int,
        c_channels: int,
        z_channels: int,
        use_timestep: bool = False,
        **sizes: Any,
    ) -> None:
        smallest = ch * ch_mult[-1]
        super().__init__(
            ch=ch,
            ch_mult=ch_mult,
            in_channels=c_channels,
            use_timestep=use_timestep,
            extra_channels=smallest,
            **sizes,
        )
        self.z_in = nn.Conv2d(z_channels, smallest, kernel_size=1)

    def forward(self, x: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Map conditions (B, c_channels, H, W) and z (B, z_channels, h, w) to (B, out_ch, H, W)."""
        return self.run(x, t, self.z_in(z))


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
