"""Tokens that were computed once, by ``scripts/encode.py``, in place of images.

Axis letters: B images, L tokens, h w grid, T turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.vqvae.cascade import Cascade
from taming.modules.vqvae.grammar import TokenSequence
from taming.modules.vqvae.transforms import Attract
from taming.util import DataError

# Parts of a tokenizer that have no say in which codes an image gets.
_AFTER = ("loss", "decoder", "post_quant_conv", "colorize")


def fingerprint(tokenizer: nn.Module, sequence: TokenSequence) -> str:
    """Return a number, in hexadecimal, that only tokenizers share which write the same tokens.

    Args:
        tokenizer: A `VQModel`.
        sequence: How it writes tokens.
    """
    digest = hashlib.sha256(f"{type(sequence).__name__} {sorted(vars(sequence).items())}".encode())
    if wide := [m.beam for m in tokenizer.modules() if isinstance(m, Cascade) and m.beam > 1]:
        digest.update(f"beam {wide}".encode())
    if steps := [m.step for m in tokenizer.modules() if isinstance(m, Attract)]:
        digest.update(f"step {steps}".encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if name.split(".")[0] not in _AFTER:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_cached(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is from a `taming.data.tokens.TokenCache`."""
    return "fingerprint" in batch


def cached_codes(
    batch: Mapping[str, Any], sequence: TokenSequence, own_fingerprint: str
) -> tuple[Tensor, int]:
    """Take the codes of images out of a batch of cached tokens.

    Args:
        batch: Has ``tokens`` (B, L), ``grid`` (B, 2), ``pixels`` (B,) and ``fingerprint``.
        sequence: How the tokenizer writes tokens.
        own_fingerprint: Its fingerprint.

    Returns:
        (B, h, w, T) int64, and the number of pixels of an image.

    Raises:
        DataError: Another tokenizer wrote the tokens.
    """
    for found in set(batch["fingerprint"]) - {own_fingerprint}:
        raise DataError(
            f"the token cache was written by another tokenizer (fingerprint {found[:12]}) than "
            f"that of first_stage_config ({own_fingerprint[:12]}): name the one that wrote it, or "
            "write the cache anew with scripts/encode.py"
        )
    h, w = batch["grid"][0].tolist()
    return sequence.decode(batch["tokens"], (h, w)), int(batch["pixels"][0])
