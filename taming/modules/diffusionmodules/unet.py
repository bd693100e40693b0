"""U-Nets: the network of DDPM (Ho et al. 2020, arXiv:2006.11239), and one with a latent variable.

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

from taming.modules.diffusionmodules.blocks import Downsample, Upsample, group_norm
from taming.modules.diffusionmodules.stages import (
    Middle,
    Stage,
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


class UNet(nn.Module):
    """Base of both U-Nets: the way down, the way up with skip connections, and the time.

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

    def embed_time(self, t: Tensor | None) -> Tensor | None:
        """Embed steps (B,) as (B, E); None without time steps.

        Raises:
            ValueError: Steps are missing or unexpected.
        """
        if (self.temb is None) != (t is None):
            raise ValueError(
                f"use_timestep is {self.temb is not None}, but t is "
                f"{'missing' if t is None else 'given'}"
            )
        return None if self.temb is None else self.temb(t)

    def contract(self, x: Tensor, time: Tensor | None) -> list[Tensor]:
        """Go down from (B, in_channels, H, W); return all features in order."""
        features = [self.conv_in(x)]
        for level in self.down:
            features += level(features[-1], time)
        return features

    def expand(self, h: Tensor, features: list[Tensor], time: Tensor | None) -> Tensor:
        """Go up from (B, C, h, w) with skip connections; return (B, out_ch, H, W)."""
        for level in reversed(self.up):
            h = level(h, features, time)
        return self.conv_out(F.silu(self.norm_out(h)))


class Model(UNet):
    """The U-Net of DDPM, with the arguments of `UNet`."""

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W), at steps (B,), to (B, out_ch, H, W)."""
        time = self.embed_time(t)
        features = self.contract(x, time)
        h = self.mid(features[-1], time)
        return self.expand(h, features, time)


class VUNet(UNet):
    """A U-Net over a condition, with a latent variable at the smallest feature map.

    Args:
        ch: Channels at the first convolution; a multiple of 32.
        ch_mult: Channels of each level as multiples of ``ch``, highest resolution first.
        in_channels: Not used.
        c_channels: Channels of the condition.
        z_channels: Channels of the latent variable.
        use_timestep: Embed a time step.
        **sizes: Further arguments of `UNet`.
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
        time = self.embed_time(t)
        features = self.contract(x, time)
        h = self.mid(torch.cat([features[-1], self.z_in(z)], dim=1), time)
        return self.expand(h, features, time)
