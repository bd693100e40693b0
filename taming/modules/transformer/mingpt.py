"""The transformer's names as the original had them: all in one module.

Axis letters: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from taming.modules.transformer.blocks import (
    Block,
    CausalSelfAttention,
    GPT1Config,
    GPTConfig,
    SiteEmbedding,
)
from taming.modules.transformer.cache import KVCache
from taming.modules.transformer.clusters import KMeans
from taming.modules.transformer.gpt import GPT, CodeGPT
from taming.modules.transformer.sampling import Drawing, sample_tokens
from taming.modules.vqvae.sequence import RasterSequence

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


class DummyGPT(nn.Module):
    """Stands in for a transformer where everything around it is to be tried.

    Args:
        add_value: What it adds to each token.
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
    """Draw the tokens that come after given ones.

    Args:
        x: (B, L) int64, at least one token.
        model: The transformer, in eval mode.
        steps: Tokens to draw.
        temperature: See `filter_logits`, as ``top_k`` and ``top_p``.
        sample_logits: Draw; False takes the likeliest token.
        top_k: Draw among the likeliest k.
        top_p: Draw among the likeliest that together have this probability.
        callback: Called with the number of each token, from 0.

    Returns:
        (B, steps) int64, without those given.

    Raises:
        ValueError: The model looks at places, which these tokens do not have.
    """
    if model.uses_sites:
        raise ValueError(
            "sample and sample_with_past know no places, which a model with site_shape or rotary "
            "looks at; use taming.modules.transformer.sampling.sample_tokens"
        )
    return sample_tokens(
        model,
        x,
        RasterSequence(model.config.vocab_size),
        (1, steps),
        Drawing(temperature, top_k, top_p, greedy=not sample_logits),
        callback=None if callback is None else lambda drawn: callback(drawn - 1),
    )


def sample(
    model: GPT,
    x: Tensor,
    steps: int,
    temperature: float = 1.0,
    sample: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Continue given tokens; see `sample_with_past`.

    Returns:
        (B, L + steps) int64, with those given.
    """
    drawn = sample_with_past(x, model, steps, temperature, sample, top_k)
    return torch.cat([x, drawn], dim=1)
