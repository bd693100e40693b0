"""Peers in the race: quantizers of vector-quantize-pytorch with this project's interface.

Axis letters: B images, D channels, h w grid, N latents, K codes, T turns.
"""

from __future__ import annotations

from typing import Any

import torch
import vector_quantize_pytorch as vqp
from einops import rearrange
from torch import Tensor

from taming.modules.sequence.notations import RasterSequence, UnarySequence
from taming.modules.vqvae.base import (
    GridShape,
    Quantizer,
    QuantizerInfo,
    QuantizerOutput,
    channels_second,
    code_perplexity,
    straight_through,
)

# The library's defaults (decay 0.8, rotation trick, dead codes kept) cost 1 dB or more.
OPTIONS = {
    "decay": 0.95,
    "kmeans_init": True,
    "rotation_trick": False,
    "threshold_ema_dead_code": 1,  # switches revival on; `ResidualVQ` sets the threshold
}
REVIVE_BELOW = 0.125  # fraction of the uniform share; codes do not settle if it is larger


class ResidualVQ(Quantizer):
    """Residual quantization with a fixed number of turns (Lee et al. 2022, arXiv:2203.01941).

    Args:
        n_e: K, number of codes of each turn.
        e_dim: D, channels of a latent.
        turns: T, turns of every site.
        shared_codebook: Use one codebook for all turns.
        quantize_dropout: Train all numbers of turns from 1 to T, so that `shorten` may cut sites.
        options: Further keyword arguments of ``vector_quantize_pytorch.ResidualVQ``.

    Attributes:
        codebooks: Number of codebooks.
        turns: Turns taken in evaluation, at most T.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        turns: int,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(n_e, e_dim)
        self.codebooks = 1 if shared_codebook else turns
        self.inner = vqp.ResidualVQ(
            dim=e_dim,
            codebook_size=n_e,
            num_quantizers=turns,
            shared_codebook=shared_codebook,
            quantize_dropout=quantize_dropout,
            **{**OPTIONS, **options},
        )
        self.shorten(turns)

    def shorten(self, turns: int) -> None:
        """Take only the first ``turns`` turns in evaluation; tokens need no end of a site."""
        self.turns = turns
        self.sequence = (
            RasterSequence(self.n_e) if turns == 1 else UnarySequence(self.n_e, turns, False)
        )

    def widen(self, beam: int) -> None:
        """Search with a beam in evaluation: keep the ``beam`` partial paths nearest to a latent."""
        self.inner.eval_beam_size = beam
        # The library scores a path by the sum of its residuals over all turns, but only the last
        # residual is an error: each turn must outweigh those before it.
        weights = self.inner.get_buffer("beam_score_weights")
        weights.copy_(100.0 ** torch.arange(1 - len(weights), 1))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents z (B, D, h, w); indices (B, h, w, turns), -1 where dropped."""
        batch, _, h, w = z.shape
        rows = rearrange(z.float(), "b d h w -> b (h w) d")
        layers: Any = self.inner.layers
        votes = REVIVE_BELOW * rows.shape[:2].numel() / self.n_e
        for layer in layers:
            layer._codebook.threshold_ema_dead_code = votes
            layer._codebook.reset_cluster_size = votes
        if not self.training:
            self.inner.layers = layers[: self.turns]
        with torch.autocast(z.device.type, enabled=False):
            z_q, indices, losses = self.inner(rows)
        self.inner.layers = layers
        if self.training:
            # The library's gradient with respect to z is too large by the number of turns.
            z_q = straight_through(rows, z_q.detach())
        z_q = channels_second(z_q.reshape(batch, h, w, self.e_dim))
        used = (indices >= 0).flatten(0, -2).any(dim=0).sum()
        info = QuantizerInfo(
            code_perplexity(indices[indices >= 0], self.n_e),
            None,
            indices.reshape(batch, h, w, -1),
        )
        return QuantizerOutput(z_q, losses.sum() / used, info)

    def get_codebook_entry(self, indices: Tensor, shape: GridShape | None = None) -> Tensor:
        """Look up indices (B, h, w, T): z_q (B, D, h, w)."""
        batch, h, w, _ = indices.shape
        z_q = self.inner.get_output_from_indices(indices.flatten(1, 2))
        return channels_second(z_q.reshape(batch, h, w, self.e_dim))


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505), without a codebook.

    Args:
        levels: Number of values of each channel; K is their product.
        e_dim: D, channels of a latent, projected to ``len(levels)`` and back.
    """

    def __init__(self, levels: list[int], e_dim: int) -> None:
        inner = vqp.FSQ(levels, dim=e_dim)
        super().__init__(int(inner.codebook_size), e_dim)
        self.inner = inner
        self.sequence = RasterSequence(self.n_e)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents z (B, D, h, w); indices (B, h, w, 1)."""
        z_q, indices = self.inner(z.float())
        indices = indices[..., None].long()
        info = QuantizerInfo(code_perplexity(indices, self.n_e), None, indices)
        return QuantizerOutput(z_q, z.new_zeros(()), info)

    def get_codebook_entry(self, indices: Tensor, shape: GridShape | None = None) -> Tensor:
        """Look up indices (B, h, w, 1): z_q (B, D, h, w)."""
        return self.inner.indices_to_codes(indices[..., 0])
