"""Colours of pixels as tokens, by k-means (Chen et al. 2020, Generative Pretraining from Pixels).

Axis letters: B images, C channels, H W image, N pixels, K clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.vqvae.codebook import k_means
from taming.modules.vqvae.nearest import nearest_codes


class KMeans(nn.Module):
    """Maps each pixel to the nearest of K colours, and back.

    Args:
        ncluster: K.
        nc: C, channels of a pixel.
        niter: Rounds of k-means.

    Attributes:
        C: (K, C), the colours.
        shape: (C, H, W) of the images that ``reverse`` makes where it is not told a shape.
    """

    C: Tensor
    initialized: Tensor

    def __init__(self, ncluster: int = 512, nc: int = 3, niter: int = 10) -> None:
        super().__init__()
        self.ncluster = ncluster
        self.nc = nc
        self.niter = niter
        self.shape = (3, 32, 32)
        self.register_buffer("C", torch.zeros(ncluster, nc))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def is_initialized(self) -> bool:
        """Whether the colours were learned."""
        return bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Learn the colours from pixels (N, C).

        Raises:
            ValueError: The pixels have other channels, or there are fewer than colours.
        """
        if x.ndim != 2 or x.shape[1] != self.nc or len(x) < self.ncluster:
            raise ValueError(
                f"expected at least {self.ncluster} pixels of {self.nc} channels, "
                f"got {tuple(x.shape)}"
            )
        start = x[torch.randperm(len(x), device=x.device)[: self.ncluster]]
        self.C.copy_(k_means(x.float(), start.float(), self.niter))
        self.initialized.fill_(1)

    def forward(
        self, x: Tensor, reverse: bool = False, shape: tuple[int, int, int] | None = None
    ) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, H W) int64, or back.

        Args:
            x: Images; tokens with ``reverse``.
            reverse: Map tokens to images.
            shape: (C, H, W) of these images; None for the attribute ``shape``.

        Returns:
            Tokens, or images.
        """
        if reverse:
            return F.embedding(x, self.C).mT.reshape(len(x), *(shape or self.shape))
        pixels = rearrange(x, "b c h w -> (b h w) c")
        return nearest_codes(pixels, self.C).indices.view(len(x), -1)
