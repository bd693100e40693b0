"""Logits of the next token: sharpened, cut off and masked.

Axis letters: V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def filter_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Sharpen a distribution and cut off its tail, by values that `SamplingParams` has checked.

    Args:
        logits: (..., V).
        temperature: Divides the logits; above 0.
        top_k: Keep only the k likeliest tokens; more than V keeps all.
        top_p: Keep the fewest likeliest tokens that together reach this probability, in (0, 1]
            (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
        min_p: Keep the tokens with at least this share, in [0, 1], of the probability of the
            likeliest (Nguyen et al. 2024, arXiv:2407.01082).

    Returns:
        (..., V), -inf where cut off; the likeliest token always stays.

    Example:
        >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
        >>> filter_logits(logits, top_k=2).softmax(-1)
        tensor([0.6250, 0.3750, 0.0000])
        >>> filter_logits(logits, top_p=0.5).softmax(-1)
        tensor([1., 0., 0.])
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token is cut off if the likelier ones reach top_p without it.
        cut = ordered.cumsum(dim=-1) - ordered >= top_p
        logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
    if min_p is not None:
        probability = logits.softmax(dim=-1)
        least = min_p * probability.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probability < least, -torch.inf)
    return logits


def mask_logits(logits: Tensor, allowed: Tensor) -> Tensor:
    """Set logits (..., V) to -inf where ``allowed`` (..., V or fewer) is False or has ended."""
    if allowed.shape[-1] < logits.shape[-1]:
        allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]), value=False)
    return logits.masked_fill(~allowed, -torch.inf)
