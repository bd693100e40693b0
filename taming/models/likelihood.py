"""What a prior reports: how many bits its images' tokens cost, their lengths included.

Axis letters: B images.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor

from taming.util import NonFiniteError


def log_likelihood(
    model: pl.LightningModule, split: str, nats: Tensor, lengths: Tensor, pixels: int
) -> Tensor:
    """Log the likelihood of a batch per token, per image and per pixel.

    Args:
        model: The prior; it logs ``<split>/loss`` in nats per token, ``bits_per_token``,
            ``bits_per_image``, ``bits_per_pixel`` and ``tokens_per_image``.
        split: "train" or "val".
        nats: (B,) -log p of each image's tokens.
        lengths: (B,) int64, tokens of each image.
        pixels: H W of one image.

    Returns:
        The loss: mean -log p of a token in nats.

    Raises:
        NonFiniteError: It is not finite.
    """
    images, tokens = len(nats), int(lengths.sum())
    loss, bits = nats.sum() / tokens, nats.detach().sum() / math.log(2)
    if not torch.isfinite(loss):
        raise NonFiniteError(f"{split}/loss is not finite at step {model.global_step}")
    for name, value, weight in (
        ("loss", loss, tokens),
        ("bits_per_token", bits / tokens, tokens),
        ("bits_per_image", bits / images, images),
        ("bits_per_pixel", bits / (images * pixels), images),
        ("tokens_per_image", tokens / images, images),
    ):
        model.log(
            f"{split}/{name}",
            value,
            prog_bar=name == "loss",
            batch_size=weight,
            on_epoch=True,
            sync_dist=split == "val",
        )
    return loss
