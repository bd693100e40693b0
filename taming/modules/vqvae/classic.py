"""The original's quantizers that take the nearest code, learned by gradient or by averages.

Axis letters: B images, D channels, h w grid, N latents, K codes.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.base import (
    QuantizerInfo,
    QuantizerOutput,
    channels_second,
    code_perplexity,
    straight_through,
    vq_loss,
)
from taming.modules.vqvae.codebook import check_precision, update_means
from taming.modules.vqvae.distributed import sum_over_ranks
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.plain import PlainQuantizer


class EmbeddingEMA(nn.Module):
    """Codes that are moving averages of the latents nearest to them (arXiv:1711.00937, A.1).

    Args:
        num_tokens: K, number of codes.
        codebook_dim: D, channels of a code.
        decay: Weight of the old averages.
        eps: Fewest votes by which a code's sum is divided.
    """

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.decay = decay
        self.eps = eps
        start = torch.randn(num_tokens, codebook_dim)
        self.weight = nn.Parameter(start, requires_grad=False)
        # One vote each for where they stand: starting from none, as the original did, the first
        # step divides by next to nothing and throws the codes far away.
        self.register_buffer("cluster_size", torch.ones(num_tokens))
        self.register_buffer("embed_avg", start.clone())

    @torch.no_grad()
    def learn(self, rows: Tensor, codes: Tensor) -> None:
        """Take in latents (N, D) float32 and the codes (N,) they were mapped to, on all ranks."""
        check_precision(self.weight, rows)
        votes = sum_over_ranks(torch.bincount(codes, minlength=len(self.weight)).float())
        means = (self.weight, self.cluster_size, self.embed_avg)
        update_means(*means, votes, rows, codes, self.decay, self.eps)

    def forward(self, embed_id: Tensor) -> Tensor:
        """Look codes up: (...,) int64 -> (..., D)."""
        return F.embedding(embed_id, self.weight)


class NearestQuantizer(PlainQuantizer):
    """A quantizer that gives each latent the nearest code; subclasses say how codes are learned."""

    embedding: nn.Embedding | EmbeddingEMA

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D)."""
        return self.embedding.weight

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents.

        Args:
            z: (B, D, h, w).

        Returns:
            z_q like z; loss; info, whose indices are described at each class.

        Raises:
            ValueError: z has another shape.
        """
        if z.ndim != 4:
            raise ValueError(f"expected latents (B, {self.e_dim}, h, w), got {tuple(z.shape)}")
        rows = self._rows(z)
        codes = nearest_codes(rows, self.codebook).indices
        entries = self.embedding(codes)
        loss = self._loss(rows, entries)
        if self.training:
            self._learn(rows.detach(), codes)
        z_q = channels_second(entries.detach().view(len(z), *z.shape[2:], self.e_dim))
        return QuantizerOutput(straight_through(z, z_q), loss, self._info(codes, z))

    @abstractmethod
    def _loss(self, rows: Tensor, entries: Tensor) -> Tensor:
        """Compute the loss of latents (N, D) and their codes (N, D)."""

    @abstractmethod
    def _info(self, codes: Tensor, z: Tensor) -> QuantizerInfo:
        """Say what is known of the codes (N,) of latents z (B, D, h, w)."""

    def _learn(self, rows: Tensor, codes: Tensor) -> None:
        """Update what is not learned by gradient; by default, nothing."""


def gradient_loss(rows: Tensor, entries: Tensor, beta: float, legacy: bool) -> Tensor:
    """Return `vq_loss` of latents (N, D) and the codes (N, D) nearest to them."""
    codebook_term = F.mse_loss(entries, rows.detach())
    return vq_loss(codebook_term, F.mse_loss(entries.detach(), rows), beta, legacy)


def gradient_codebook(n_e: int, e_dim: int) -> nn.Embedding:
    """Return codes (K, D) uniform in [-1/K, 1/K], to be learned by gradient."""
    embedding = nn.Embedding(n_e, e_dim)
    nn.init.uniform_(embedding.weight, -1 / n_e, 1 / n_e)
    return embedding


class VectorQuantizer(NearestQuantizer):
    """The original's first quantizer: `VectorQuantizer2` that also returns who took which code.

    Indices are (N, 1). ``encodings`` is one-hot, (N, K) float32: with many codes it fills the
    memory, which the other quantizers avoid.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the codebook loss, as under ``legacy`` in `vq_loss`.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim)
        self.beta = beta
        self.embedding = gradient_codebook(n_e, e_dim)

    def _loss(self, rows: Tensor, entries: Tensor) -> Tensor:
        return gradient_loss(rows, entries, self.beta, legacy=True)

    def _info(self, codes: Tensor, z: Tensor) -> QuantizerInfo:
        encodings = F.one_hot(codes, self.n_e).to(z.dtype)
        return QuantizerInfo(code_perplexity(codes, self.n_e), encodings, codes[:, None])


class VectorQuantizer2(NearestQuantizer):
    """Nearest-code quantizer with a codebook trained by gradient (arXiv:1711.00937).

    Indices are (N,); (N, 1) under ``remap``; (B, h, w) with ``sane_index_shape``.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the commitment loss (see `vq_loss` for ``legacy``).
        remap: See `PlainQuantizer`.
        unknown_index: See `PlainQuantizer`.
        sane_index_shape: Return indices as (B, h, w) rather than flat.
        legacy: Put beta on the codebook term, as the original's checkpoints were trained.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, remap, unknown_index)
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = gradient_codebook(n_e, e_dim)

    def _loss(self, rows: Tensor, entries: Tensor) -> Tensor:
        return gradient_loss(rows, entries, self.beta, self.legacy)

    def _info(self, codes: Tensor, z: Tensor) -> QuantizerInfo:
        if self.remap is not None:
            codes = self.remap_to_used(codes)[:, None]
        if self.sane_index_shape:
            codes = codes.reshape(len(z), *z.shape[2:])
        return QuantizerInfo(None, None, codes)


class EMAVectorQuantizer(NearestQuantizer):
    """Nearest-code quantizer whose codes are moving averages of their latents.

    Indices are (N,), or (B, h, w) with ``sane_index_shape``.

    Args:
        n_embed: K, number of codes.
        embedding_dim: D, channels of a latent.
        beta: Weight of the commitment loss, which is all of the loss.
        decay: See `EmbeddingEMA`.
        eps: See `EmbeddingEMA`.
        remap: See `PlainQuantizer`.
        unknown_index: See `PlainQuantizer`.
        sane_index_shape: Return indices as (B, h, w) rather than flat.
    """

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index)
        self.beta = beta
        self.sane_index_shape = sane_index_shape
        self.embedding: EmbeddingEMA = EmbeddingEMA(n_embed, embedding_dim, decay, eps)

    def _loss(self, rows: Tensor, entries: Tensor) -> Tensor:
        return self.beta * F.mse_loss(entries, rows)

    def _learn(self, rows: Tensor, codes: Tensor) -> None:
        self.embedding.learn(rows, codes)

    def _info(self, codes: Tensor, z: Tensor) -> QuantizerInfo:
        perplexity = code_perplexity(codes, self.n_e)
        if self.remap is not None:
            codes = self.remap_to_used(codes)
        if self.sane_index_shape:
            codes = codes.reshape(len(z), *z.shape[2:])
        return QuantizerInfo(perplexity, None, codes)
