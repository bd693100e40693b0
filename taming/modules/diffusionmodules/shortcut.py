"""Linear shortcut from the pixels of a site to its latent, and back.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, f side of a site.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHROMA = 0.06  # variance of the two colour differences, relative to that of the grey of photographs


def cosine_bases(length: int) -> Tensor:
    """Return the orthonormal cosines of the DCT-II (Ahmed et al. 1974), (length, length) float64.

    Row u is the cosine of frequency u / 2 periods.
    """
    place = (torch.arange(length, dtype=torch.float64) + 0.5) * math.pi / length
    bases = torch.cos(torch.arange(length, dtype=torch.float64)[:, None] * place)
    return bases / bases.norm(dim=1, keepdim=True)


def leading_patterns(channels: int, side: int, count: int) -> Tensor:
    """Choose the orthonormal patterns that explain most of the pixels of a site.

    A pattern is a product of two cosines in grey or in a colour difference; photographs have about
    1 / (u^2 + v^2) of their variance in the frequencies u and v.

    Args:
        channels: C; the colours of 3 are taken as RGB.
        side: f.
        count: D, number of patterns, at most C f^2.

    Returns:
        (D, C, f, f) float32.
    """
    waves = cosine_bases(side)  # (f, f)
    frequency = torch.arange(side, dtype=torch.float64)
    variance = 1 / (frequency[:, None].square() + frequency.square() + 0.25)  # (f, f)
    mixes, weights = torch.eye(channels, dtype=torch.float64), torch.ones(channels)
    if channels == 3:
        mixes = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
        mixes, weights = mixes / mixes.norm(dim=1, keepdim=True), torch.tensor([1, CHROMA, CHROMA])
    order = (weights[:, None, None] * variance).flatten().argsort(descending=True, stable=True)
    colour, row, column = torch.unravel_index(order[:count], (channels, side, side))
    patterns = torch.einsum("dc,dy,dx->dcyx", mixes[colour], waves[row], waves[column])
    return patterns.float()


class MirroredSynthesis(nn.ConvTranspose2d):
    """Linear map of 3 x 3 latents to the pixels of the site in their middle.

    Beyond the border, the picture is taken to go on as its mirror image. Its latents follow from
    those at the border by one linear map for each axis, which is learned too.

    Args:
        patterns: (D, C, f, f) orthonormal patterns, each even or odd along both axes, by which the
            maps start: the pixels of a site from its own latent alone.
    """

    def __init__(self, patterns: Tensor) -> None:
        count, channels, side, _ = patterns.shape
        super().__init__(count, channels, 3 * side, side, padding=2 * side, bias=False)
        parity = [(patterns * patterns.flip(axis)).sum(dim=(1, 2, 3)) for axis in (2, 3)]
        self.mirrors = nn.Parameter(torch.stack([sign.round().diag() for sign in parity]))
        with torch.no_grad():
            self.weight.copy_(F.pad(patterns, (side, side, side, side)))

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to images (B, C, H, W)."""
        for axis, mirror in zip((2, 3), self.mirrors, strict=True):
            ends = (z.narrow(axis, 0, 1), z.narrow(axis, z.shape[axis] - 1, 1))
            before, after = (torch.einsum("de,behw->bdhw", mirror, end) for end in ends)
            z = torch.cat([before, z, after], dim=axis)
        return super().forward(z)


class LinearShortcut(nn.Module):
    """Linear map of the pixels of each site to its latent, and one of 3 x 3 latents back.

    Both are learned, and start from the same orthonormal cosines, as in JPEG, with nothing from the
    neighbours, from which the way back learns to smooth the borders of sites. So a model whose
    networks add nothing yet already has the error of a linear transform coder. They learn what a
    linear code misses, and no norm hides the colour of a flat region from the latents. An error of
    the latents has, at the start, the mean square of the error of the pixels that it makes.

    Args:
        channels: C, channels of the images.
        side: f, side in pixels of a site.
        latent_channels: D, at most C f^2.

    Raises:
        ValueError: There are more channels of a latent than numbers in a site.

    Example:
        >>> shortcut, flat = LinearShortcut(3, 8, 16), torch.full((1, 3, 16, 24), 0.5)
        >>> z = shortcut.encode(flat)
        >>> z.shape, torch.allclose(shortcut.decode(z), flat, atol=1e-5)
        (torch.Size([1, 16, 2, 3]), True)
    """

    def __init__(self, channels: int, side: int, latent_channels: int) -> None:
        super().__init__()
        numbers = channels * side * side
        if latent_channels > numbers:
            raise ValueError(
                f"linear_shortcut: embed_dim must be at most {numbers}, the numbers in a site of "
                f"{side} x {side} pixels, got {latent_channels}"
            )
        # Weights have a mean square of 1, so that a step of Adam changes little of them.
        patterns = leading_patterns(channels, side, latent_channels)
        self.gains = math.sqrt(latent_channels) / numbers, 1 / math.sqrt(latent_channels)
        self.pixels_to_latent = nn.Conv2d(channels, latent_channels, side, side, bias=False)
        self.latent_to_pixels = MirroredSynthesis(patterns)
        with torch.no_grad():
            self.pixels_to_latent.weight.copy_(patterns * math.sqrt(numbers))
            self.latent_to_pixels.weight.mul_(math.sqrt(numbers))

    def encode(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to latents (B, D, h, w), in the weights' precision."""
        with torch.autocast(x.device.type, enabled=False):
            return self.gains[0] * self.pixels_to_latent(x.to(self.pixels_to_latent.weight.dtype))

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to images (B, C, H, W), in the weights' precision."""
        with torch.autocast(z.device.type, enabled=False):
            return self.gains[1] * self.latent_to_pixels(z.to(self.latent_to_pixels.weight.dtype))
