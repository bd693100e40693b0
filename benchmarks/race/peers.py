"""The peers in the race: quantizers with a fixed number of turns, and a rate to be set afterwards.

Axis letters: D channels, K codes, T turns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taming.modules.sequence.notations import RasterSequence
from taming.modules.vqvae.base import QuantizerOutput
from taming.modules.vqvae.entropy import EntropyTables
from taming.modules.vqvae.loopy import LoopyVectorQuantizer
from taming.modules.vqvae.zoo import LibraryQuantizer

# The library's defaults (decay 0.8, rotation trick, dead codes kept) cost 1 dB or more.
OPTIONS = {
    "decay": 0.95,
    "kmeans_init": True,
    "rotation_trick": False,
    "threshold_ema_dead_code": 1,  # switches revival on; `ResidualVQ` sets the threshold
}
REVIVE_BELOW = 0.125  # fraction of the uniform share; codes do not settle if it is larger


class ResidualVQ(LibraryQuantizer):
    """Residual quantization with a fixed number of turns (Lee et al. 2022, arXiv:2203.01941).

    Args:
        n_e: K, number of codes of each turn.
        e_dim: D, channels of a latent.
        turns: T, turns of every site.
        options: Further keyword arguments of ``vector_quantize_pytorch.ResidualVQ``; one trained
            with ``quantize_dropout`` may be cut by `shorten`.

    Attributes:
        turns: Turns taken in evaluation, at most T.
    """

    def __init__(self, n_e: int, e_dim: int, turns: int, **options: Any) -> None:
        super().__init__("ResidualVQ", n_e, e_dim, num_quantizers=turns, **{**OPTIONS, **options})
        self.turns = turns

    def shorten(self, turns: int) -> None:
        """Take only the first ``turns`` turns in evaluation."""
        self.turns, self.sequence = turns, RasterSequence(self.n_e, turns)

    def widen(self, beam: int) -> None:
        """Search with a beam in evaluation: keep the ``beam`` partial paths nearest to a latent."""
        inner: Any = self.inner
        inner.eval_beam_size = beam
        # The library scores a path by the sum of its residuals over all turns, but only the last
        # residual is an error: each turn must outweigh those before it.
        weights = inner.get_buffer("beam_score_weights")
        weights.copy_(100.0 ** torch.arange(1 - len(weights), 1))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents z (B, D, h, w); indices (B, h, w, turns), -1 where dropped."""
        inner: Any = self.inner
        layers, turns = inner.layers, inner.num_quantizers
        votes = REVIVE_BELOW * z.numel() / self.e_dim / self.n_e
        for layer in layers:
            layer._codebook.threshold_ema_dead_code = votes
            layer._codebook.reset_cluster_size = votes
        if not self.training:
            inner.layers, inner.num_quantizers = layers[: self.turns], self.turns
        output = super().forward(z)
        inner.layers, inner.num_quantizers = layers, turns
        return output


class FixedTables(EntropyTables):
    """Tables by which every site takes all turns: to end before costs infinitely many bits."""

    def end_bits(self) -> Tensor:
        """Bits of ending at each turn and of going on, (T, 2) float32, without any choice."""
        ends = torch.tensor([torch.inf, 0.0], device=self.codes.device).repeat(self.max_loops, 1)
        ends[-1] = ends[-1].flip(0)
        return ends


class FixedRate(LoopyVectorQuantizer):
    """The loop with all its turns at every site, its codes chosen by rate (Chou et al. 1989).

    One turn is entropy-constrained vector quantization. Its rate loss is the one of the loop.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        max_loops: T, turns of every site.
        options: Further arguments of `LoopyVectorQuantizer`, a ``rate`` among them.
    """

    def __init__(self, n_e: int, e_dim: int, max_loops: int, **options: Any) -> None:
        super().__init__(n_e, e_dim, max_loops=max_loops, **options)
        self.sequence = RasterSequence(n_e, max_loops)  # type: ignore[assignment]
        self.entropy = FixedTables(n_e, max_loops)
