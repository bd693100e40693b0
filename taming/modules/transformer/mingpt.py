"""The original's module: its names in one place, and its k-means of colours.

Axis letters: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.sequence.notations import RasterSequence
from taming.modules.transformer.backbone import init_weights
from taming.modules.transformer.blocks import (
    Block,
    CausalSelfAttention,
    GPT1Config,
    GPTConfig,
    KVCache,
    SiteEmbedding,
)
from taming.modules.transformer.generate import SamplingParams, generate
from taming.modules.transformer.gpt import GPT
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
        shape: (C, H, W) of the images that ``reverse`` returns by default.
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
        """Return True if the colours were learned."""
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
        return nearest_codes(pixels, self.C).view(len(x), -1)


__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "CodeGPT",
    "DummyGPT",
    "GPT1Config",
    "GPTConfig",
    "KMeans",
    "KVCache",
    "SiteEmbedding",
    "sample",
    "sample_with_past",
]


class CodeGPT(GPT):
    """A `GPT` whose inputs are vectors (B, L, in_channels), such as codes, rather than tokens.

    Args:
        vocab_size: V, number of tokens to predict.
        block_size: Longest sequence.
        in_channels: Channels of an input vector.
        **sizes: Further fields of `GPTConfig`.
    """

    def __init__(self, vocab_size: int, block_size: int, in_channels: int, **sizes: Any) -> None:
        super().__init__(vocab_size, block_size, tied_head=False, **sizes)
        self.tok_emb = nn.Linear(in_channels, self.config.n_embd)
        init_weights(self.tok_emb)


class DummyGPT(nn.Module):
    """Stand-in for a transformer, to try out what surrounds it.

    Args:
        add_value: Added to each token.
    """

    def __init__(self, add_value: int = 1) -> None:
        super().__init__()
        self.add_value = add_value

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        """Map tokens (B, L) to ``idx + add_value`` and no loss."""
        return idx + self.add_value, None


def sample_with_past(
    x: Tensor,
    model: GPT,
    steps: int,
    temperature: float = 1.0,
    sample_logits: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample the tokens (B, steps) after given ones (B, L), at least one, as `generate`.

    The ``callback`` gets the number of each token, from 0.

    Raises:
        ValueError: The model needs the places of tokens, which these do not have.
    """
    if model.uses_sites:
        raise ValueError(
            "sample and sample_with_past have no places of tokens, which a model with site_shape "
            "or rotary needs; use taming.modules.transformer.generate.generate"
        )
    return generate(
        model,
        x,
        RasterSequence(model.config.vocab_size),
        (1, steps),
        SamplingParams(temperature, top_k, top_p, greedy=not sample_logits),
        callback=None if callback is None else lambda state: callback(state.sampled - 1),
    )


def sample(
    model: GPT,
    x: Tensor,
    steps: int,
    temperature: float = 1.0,
    sample: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Continue given tokens (B, L) by so many steps, as `sample_with_past`: (B, L + steps)."""
    return torch.cat([x, sample_with_past(x, model, steps, temperature, sample, top_k)], dim=1)
