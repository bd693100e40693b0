"""The original's quantizers: one code per latent.

`VectorQuantizer2` and `VectorQuantizer` learn the codebook by gradient, `EMAVectorQuantizer` by
moving averages; `GumbelQuantize` samples codes from scores. `LoopyVectorQuantizer` is re-exported.

Axis letters: B images, C input channels, D channels of a code, h w grid, N latents, K codes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.distributed import sum_over_ranks
from taming.modules.vqvae.base import (
    QuantizerInfo,
    QuantizerOutput,
    SingleCodeQuantizer,
    as_rows,
    channels_second,
    code_perplexity,
    straight_through,
    vq_loss,
)
from taming.modules.vqvae.checks import check_finite_latents
from taming.modules.vqvae.codebook import check_precision, update_means
from taming.modules.vqvae.loopy import LoopyVectorQuantizer as LoopyVectorQuantizer
from taming.modules.vqvae.nearest import nearest_codes


class EmbeddingEMA(nn.Module):
    """Codes that are moving averages of the latents nearest to them (arXiv:1711.00937, A.1).

    Args:
        num_tokens: K, number of codes.
        codebook_dim: D, channels of a code.
        decay: Weight of the old averages in (0, 1).
        eps: Smallest vote count by which a code's sum is divided.
    """

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self.decay, self.eps = decay, eps
        start = torch.randn(num_tokens, codebook_dim)
        self.weight = nn.Parameter(start, requires_grad=False)
        # One vote each for the initial position. With none, as in the original, the first step
        # divides by almost zero and throws the codes far away.
        self.register_buffer("cluster_size", torch.ones(num_tokens))
        self.register_buffer("embed_avg", start.clone())

    @torch.no_grad()
    def learn(self, rows: Tensor, codes: Tensor) -> None:
        """Update from latents (N, D) float32 and the codes (N,) nearest to them, on all ranks."""
        check_precision(self.weight, rows)
        votes = sum_over_ranks(torch.bincount(codes, minlength=len(self.weight)).float())
        running = (self.weight, self.cluster_size, self.embed_avg)
        update_means(running, votes, rows, codes, self.decay, self.eps)

    def forward(self, embed_id: Tensor) -> Tensor:
        """Look codes up: (...,) int64 -> (..., D)."""
        return F.embedding(embed_id, self.weight)


class NearestQuantizer(SingleCodeQuantizer):
    """Base class of quantizers that map each latent to its nearest code.

    Attributes:
        embedding: Holds ``weight``, the codes (K, D).
        sane_index_shape: True for indices (B, h, w) rather than flat ones.
    """

    not_in_identity = ("remap", "beta", "sane_index_shape", "legacy")
    embedding: nn.Embedding | EmbeddingEMA
    sane_index_shape = False
    _perplexity = True
    _flat_shape: tuple[int, ...] = (-1,)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D)."""
        return self.embedding.weight

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents z (B, D, h, w); each class states the shape of its indices."""
        if z.ndim != 4:
            raise ValueError(f"expected latents (B, {self.e_dim}, h, w), got {tuple(z.shape)}")
        self._check(z)
        codes = nearest_codes(z, self.codebook)  # (N,)
        entries = self.embedding(codes.view(z.shape[0], *z.shape[2:]))  # (B, h, w, D)
        entries = channels_second(entries)  # (B, D, h, w)
        loss = self._loss(z.float(), entries.float())
        if self.training:
            self._learn(z.detach(), codes)
        return QuantizerOutput(straight_through(z, entries.detach()), loss, self._info(codes, z))

    def loop_tables(self) -> dict[str, Tensor]:
        """Return the codebook, as that of the only turn."""
        if self.remap is not None:
            raise ValueError("a quantizer with remap numbers its codes anew, which tables do not")
        return {"codebooks": self.codebook[None]}

    @abstractmethod
    def _loss(self, z: Tensor, entries: Tensor) -> Tensor:
        """Compute the loss of latents and their codes, both (B, D, h, w) float32."""

    def _learn(self, z: Tensor, codes: Tensor) -> None:
        """Update codes that do not learn by gradient; by default, nothing."""

    def _info(self, codes: Tensor, z: Tensor) -> QuantizerInfo:
        """Describe the codes (N,) of latents z (B, D, h, w)."""
        perplexity = code_perplexity(codes, self.n_e) if self._perplexity else None
        indices = codes if self.remap is None else self.remap_to_used(codes)
        shape = (z.shape[0], *z.shape[2:]) if self.sane_index_shape else self._flat_shape
        return QuantizerInfo(perplexity, None, indices.reshape(shape))


class VectorQuantizer2(NearestQuantizer):
    """Nearest-code quantizer with a codebook trained by gradient (arXiv:1711.00937).

    Indices are (N,); (N, 1) under ``remap``; (B, h, w) with ``sane_index_shape``.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the commitment loss (see `vq_loss` for ``legacy``).
        remap: Path of an ``.npy`` file of used codes; indices then number only those.
        unknown_index: Index of an unused code: ``"random"``, ``"extra"`` or a number.
        sane_index_shape: Return indices as (B, h, w) rather than flat.
        legacy: Put beta on the codebook term, as the original's checkpoints were trained.

    Example:
        >>> quantizer = VectorQuantizer2(n_e=16, e_dim=4, beta=0.25, sane_index_shape=True)
        >>> z_q, loss, (_, _, indices) = quantizer(torch.randn(2, 4, 8, 8))
        >>> indices.shape
        torch.Size([2, 8, 8])
        >>> torch.equal(quantizer.get_codebook_entry(indices, (2, 8, 8, 4)), z_q)
        True
    """

    _perplexity = False

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
        self.beta, self.legacy, self.sane_index_shape = beta, legacy, sane_index_shape
        if remap is not None:
            self._flat_shape = (-1, 1)
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def _loss(self, z: Tensor, entries: Tensor) -> Tensor:
        return vq_loss(z, entries, self.beta, self.legacy)


class VectorQuantizer(VectorQuantizer2):
    """The original's first quantizer: also returns the perplexity and one-hot codes.

    Indices are (N, 1). ``encodings`` are one-hot, (N, K) of z's type: with many codes they fill
    the memory, which the other quantizers avoid.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the codebook loss, as under ``legacy`` in `vq_loss`.

    Example:
        >>> quantizer = VectorQuantizer(n_e=16, e_dim=4, beta=0.25)
        >>> z_q, loss, (perplexity, one_hot, indices) = quantizer(torch.randn(2, 4, 8, 8))
        >>> one_hot.shape, indices.shape
        (torch.Size([128, 16]), torch.Size([128, 1]))
    """

    _perplexity = True
    _flat_shape = (-1, 1)

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim, beta)

    def _info(self, codes: Tensor, z: Tensor) -> QuantizerInfo:
        one_hot = z.new_zeros(len(codes), self.n_e).scatter_(1, codes[:, None], 1)  # (N, K)
        return super()._info(codes, z)._replace(encodings=one_hot)


class EMAVectorQuantizer(NearestQuantizer):
    """Nearest-code quantizer whose codes are moving averages of their latents.

    Indices are (N,), or (B, h, w) with ``sane_index_shape``.

    Args:
        n_embed: K, number of codes.
        embedding_dim: D, channels of a latent.
        beta: Weight of the commitment loss, which is all of the loss.
        decay: Weight of the old averages in (0, 1).
        eps: Smallest vote count by which a code's sum is divided.
        remap: Path of an ``.npy`` file of used codes; indices then number only those.
        unknown_index: Index of an unused code: ``"random"``, ``"extra"`` or a number.
        sane_index_shape: Return indices as (B, h, w) rather than flat.

    Example:
        >>> quantizer = EMAVectorQuantizer(n_embed=16, embedding_dim=4, beta=0.25, decay=0.9)
        >>> before = quantizer.codebook.clone()
        >>> z_q, loss, (perplexity, _, indices) = quantizer.train()(torch.randn(2, 4, 8, 8))
        >>> indices.shape, torch.equal(quantizer.codebook, before)
        (torch.Size([128]), False)
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
        self.beta, self.sane_index_shape = beta, sane_index_shape
        self.embedding: EmbeddingEMA = EmbeddingEMA(n_embed, embedding_dim, decay, eps)

    def _loss(self, z: Tensor, entries: Tensor) -> Tensor:
        return self.beta * F.mse_loss(entries, z)

    def _learn(self, z: Tensor, codes: Tensor) -> None:
        self.embedding.learn(as_rows(z), codes)


class GumbelQuantize(SingleCodeQuantizer):
    """Score every code and sample one by the Gumbel-softmax trick; in eval mode, take the best.

    The straight-through estimator is that of Jang et al. 2017 (arXiv:1611.01144, section 2.2).

    Args:
        num_hiddens: C, channels of the input.
        embedding_dim: D, channels of a code.
        n_embed: K, number of codes.
        straight_through: Sample single codes in training; otherwise mixtures of them.
        kl_weight: Weight of the divergence of the scores from the uniform distribution.
        temp_init: Initial ``temperature``, above 0.
        use_vqinterface: Return the indices inside a `QuantizerInfo`; otherwise by themselves.
        remap: Path of an ``.npy`` file of used codes; the others are then never sampled.
        unknown_index: Index of an unused code: ``"random"``, ``"extra"`` or a number.
        legacy: Sample in eval mode too, as the original did.

    Attributes:
        temperature: Not part of the state, since `GumbelVQ` derives it from the step.

    Example:
        >>> quantizer = GumbelQuantize(num_hiddens=8, embedding_dim=4, n_embed=16).eval()
        >>> z_q, loss, (_, _, indices) = quantizer(torch.randn(2, 8, 5, 5))
        >>> z_q.shape, indices.shape
        (torch.Size([2, 4, 5, 5]), torch.Size([2, 5, 5]))
    """

    trains_without_decoder = False
    not_in_identity = ("remap", "straight_through", "kl_weight", "temperature", "use_vqinterface")

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | None = None,
        unknown_index: str | int = "random",
        legacy: bool = False,
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index)
        self.n_embed, self.embedding_dim = n_embed, embedding_dim  # the original's names
        self.straight_through, self.legacy = straight_through, legacy
        self.kl_weight, self.temperature = kl_weight, temp_init
        self.use_vqinterface = use_vqinterface
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D)."""
        return self.embed.weight

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> Any:
        """Quantize latents.

        Args:
            z: (B, C, h, w).
            temp: Temperature of this call; None for ``temperature``.
            return_logits: Return the scores (B, K, h, w) too, as a fourth value.

        Returns:
            z_q (B, D, h, w) of the codebook's dtype; loss, float32; info with indices (B, h, w), a
            `QuantizerOutput`.
        """
        check_finite_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            # (B, K, h, w), under remap of the used codes only; in float32 even in a half model
            weight, bias = (parameter.float() for parameter in self.proj.parameters())
            logits = F.conv2d(z.float(), weight, bias)
            logits = logits if self.remap is None else logits[:, self.used]
            z_q, indices = self._choose(logits, self.temperature if temp is None else temp)
        log_q = logits.log_softmax(dim=1)
        divergence = (log_q.exp() * (log_q + math.log(self.n_e))).sum(dim=1).mean()
        loss = self.kl_weight * divergence
        if not self.use_vqinterface:
            return z_q, loss, indices
        output = QuantizerOutput(z_q, loss, QuantizerInfo(None, None, indices))
        return (*output, logits) if return_logits else output

    def _choose(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Sample, or take the best, codes: z_q (B, D, h, w) and indices (B, h, w)."""
        codes = self.codebook if self.remap is None else self.codebook[self.used]
        if not self.training and not self.legacy:
            indices = logits.argmax(dim=1)
            return channels_second(F.embedding(indices, codes)), indices
        if not temperature > 0:
            raise ValueError(f"the temperature of a GumbelQuantize must be > 0, got {temperature}")
        hard = self.straight_through or not self.training
        choice = F.gumbel_softmax(logits, temperature, hard=hard, dim=1)  # (B, K, h, w)
        z_q = torch.einsum("bkhw,kd->bdhw", choice, codes.float()).to(codes.dtype)
        return z_q, choice.argmax(dim=1)
