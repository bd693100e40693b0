"""Convolutional encoder and decoder of the VQGAN (Esser et al. 2021, arXiv:2012.09841).

The architecture is the U-Net of DDPM (Ho et al. 2020, arXiv:2006.11239) without its time embedding
and skip connections, cut in half: residual blocks at each resolution, attention at some of them.
Submodules have the names of taming-transformers, so that its checkpoints load.

Axis letters: B images, C channels, H W image or feature map, h w latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.blocks import (
    AttnBlock,
    Downsample,
    DownStage,
    Middle,
    ResnetBlock,
    Upsample,
    UpStage,
    group_norm,
    level_widths,
    warn_of_unreached,
)
from taming.modules.diffusionmodules.unet import Model, SimpleDecoder, UpsampleDecoder, VUNet
from taming.modules.tiling import in_tiles

# The original had all of its networks in this module.
__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "Model",
    "ResnetBlock",
    "SimpleDecoder",
    "UpsampleDecoder",
    "Upsample",
    "VUNet",
]


class Encoder(nn.Module):
    """Image to latent grid, 2 ** (len(ch_mult) - 1) times smaller in each direction.

    Encoder and Decoder take the same arguments: one ``ddconfig`` builds both.

    Args:
        ch: Channels at the first convolution; a multiple of ``num_groups``.
        out_ch: Channels of the decoder's output; not used here.
        ch_mult: Channels of each level as multiples of ``ch``, highest resolution first.
        num_res_blocks: Residual blocks per level.
        attn_resolutions: Heights of the levels with attention, for an image of ``resolution``; a
            height that no level has is logged.
        dropout: Probability of zeroing an activation inside the blocks.
        resamp_with_conv: Learn the down- and upsampling.
        in_channels: Channels of the image.
        resolution: Height of a training image; others are accepted.
        z_channels: Channels of the latent grid.
        double_z: Return twice as many (mean and log variance of a variational model). True as in
            taming-transformers; a VQ model needs False.
        give_pre_end: Not used here.
        num_groups: Groups of the norms. A group of one channel (``ch`` 32) loses its mean, and with
            it the colour of a flat image: use fewer groups in small models.
        gradient_checkpointing: Keep only the inputs of blocks in training and compute the rest
            again on the way back: about half the memory, a third more time, the same gradients.

    Attributes:
        factor: Side in pixels of a site.
        tile: Side in pixels of the tiles of large pictures, where no gradients are computed; None
            for none (see `taming.modules.tiling`).

    Raises:
        ValueError: A width is not a multiple of ``num_groups``.
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
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        num_groups: int = 32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = level_widths(ch, ch_mult, num_groups)
        self.resolution = resolution
        self.num_resolutions = len(widths)
        self.factor = 2 ** (self.num_resolutions - 1)
        self.tile: int | None = None
        resolutions = [resolution // 2**i for i in range(len(widths))]
        warn_of_unreached(attn_resolutions, resolutions)

        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, after) in enumerate(pairwise([ch, *widths])):
            last = i == len(widths) - 1
            downsample = nn.Identity() if last else Downsample(after, resamp_with_conv)
            blocks = [*pairwise([before] + [after] * num_res_blocks)]
            attention = resolutions[i] in attn_resolutions
            self.down.append(DownStage(downsample, blocks, attention, dropout, num_groups))
        self.mid = Middle(widths[-1], dropout, num_groups)
        parts: list[Any] = [*self.down, self.mid]
        for part in parts:
            part.gradient_checkpointing = gradient_checkpointing
        self.norm_out = group_norm(widths[-1], num_groups)
        self.conv_out = nn.Conv2d(
            widths[-1], 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encode images.

        Args:
            x: (B, in_channels, H, W), H and W multiples of ``factor``.

        Returns:
            (B, z_channels, H / factor, W / factor), or twice the channels with ``double_z``.

        Raises:
            ValueError: x has other axes or channels, or H or W is 0 or no multiple of ``factor``.
        """
        channels = self.conv_in.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"expected images (B, {channels}, H, W) for in_channels {channels}, got "
                f"{tuple(x.shape)}"
            )
        height, width = x.shape[-2:]
        if not height * width or height % self.factor or width % self.factor:
            raise ValueError(
                f"image is {height} x {width} pixels, but this encoder halves it "
                f"{len(self.down) - 1} times: both must be positive multiples of {self.factor}"
            )
        if self.tile is None or torch.is_grad_enabled():
            return self.run(x)
        return in_tiles(self.run, x, self.tile // self.factor, unit=self.factor, to=1)

    def run(self, x: Tensor) -> Tensor:
        """Encode images as a whole."""
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent grid to image: the encoder's mirror, with one more block per level.

    Takes the arguments of `Encoder`, of which ``in_channels`` and ``double_z`` are not used.

    Args:
        give_pre_end: Return the features before the last normalisation and convolution.

    Raises:
        ValueError: A width is not a multiple of ``num_groups``.
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
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        num_groups: int = 32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = level_widths(ch, ch_mult, num_groups)
        self.num_resolutions = len(widths)
        self.factor = 2 ** (self.num_resolutions - 1)
        self.tile: int | None = None
        self.give_pre_end = give_pre_end

        self.conv_in = nn.Conv2d(z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1], dropout, num_groups)
        self.up = nn.ModuleList()
        for i, (after, before) in enumerate(pairwise([*widths, widths[-1]])):
            upsample = Upsample(after, resamp_with_conv) if i else nn.Identity()
            blocks = [*pairwise([before] + [after] * (num_res_blocks + 1))]
            attention = resolution // 2**i in attn_resolutions
            self.up.append(UpStage(upsample, blocks, attention, dropout, num_groups))
        parts: list[Any] = [*self.up, self.mid]
        for part in parts:
            part.gradient_checkpointing = gradient_checkpointing
        self.norm_out = group_norm(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents.

        Args:
            z: (B, z_channels, h, w).

        Returns:
            (B, out_ch, factor h, factor w), unbounded; with ``give_pre_end`` the features before.
        """
        if self.tile is None or torch.is_grad_enabled():
            return self.run(z)
        return in_tiles(self.run, z, self.tile // self.factor, unit=1, to=self.factor)

    def run(self, z: Tensor) -> Tensor:
        """Decode latents as a whole."""
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        if self.give_pre_end:
            return h
        return self.conv_out(F.silu(self.norm_out(h)))


def check_ddconfig(ddconfig: Mapping[str, Any]) -> None:
    """Refuse sizes of encoder and decoder that do not make a VQ model.

    Raises:
        ValueError: A size is missing or does not fit.
    """
    if ddconfig.get("double_z", True):
        raise ValueError("ddconfig of a VQ model needs double_z: false")
    if lacking := [n for n in ("in_channels", "out_ch", "z_channels") if n not in ddconfig]:
        raise ValueError(f"ddconfig lacks {', '.join(lacking)}")
    channels, out_ch = ddconfig["in_channels"], ddconfig["out_ch"]
    if channels != out_ch:
        raise ValueError(
            f"ddconfig has in_channels {channels}, but out_ch {out_ch}: the decoder must return "
            "as many channels as the encoder takes"
        )
