"""The original's quantizers that take the nearest code, learned by gradient or by averages.

Axis letters: B images, D channels, h w grid, N latents, K codes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.distributed import sum_over_ranks
from taming.modules.sequence.notations import RasterSequence
from taming.modules.vqvae.base import (
    Quantizer,
    QuantizerInfo,
    QuantizerOutput,
    channels_second,
    code_perplexity,
    straight_through,
    vq_loss,
)
from taming.modules.vqvae.codebook import check_precision, update_means
from taming.modules.vqvae.loopy import LoopyVectorQuantizer
from taming.modules.vqvae.nearest import nearest_codes
from taming.util import NonFiniteError

__all__ = [
    "EMAVectorQuantizer",
    "EmbeddingEMA",
    "GumbelQuantize",
    "LoopyVectorQuantizer",
    "VectorQuantizer",
    "VectorQuantizer2",
]


class PlainQuantizer(Quantizer):
    """A quantizer with one code per latent.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        remap: Path of an ``.npy`` file of used codes: indices then count only those.
        unknown_index: What an unused code becomes under ``remap``: ``"random"``, ``"extra"`` (one
            more index) or an index.

    Attributes:
        re_embed: Number of different indices.

    Raises:
        ValueError: ``unknown_index`` is none of these, or ``remap`` names codes that do not exist.
    """

    used: Tensor

    def __init__(
        self, n_e: int, e_dim: int, remap: str | None = None, unknown_index: str | int = "random"
    ) -> None:
        super().__init__(n_e, e_dim)
        if isinstance(unknown_index, str) and unknown_index not in ("random", "extra"):
            raise ValueError(
                f"unknown_index must be 'random', 'extra' or an index, got {unknown_index!r}"
            )
        self.remap = remap
        self.re_embed = n_e
        self.unknown_index = unknown_index
        if remap is not None:
            used = torch.from_numpy(np.load(remap)).long()
            if len(used) == 0 or used.min() < 0 or used.max() >= n_e:
                raise ValueError(f"remap: {remap} must name codes 0..{n_e - 1}, and at least one")
            if isinstance(unknown_index, int) and not 0 <= unknown_index < len(used):
                raise ValueError(
                    f"unknown_index {unknown_index} is none of the {len(used)} used codes' numbers"
                )
            self.register_buffer("used", used)
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)
        self.sequence = RasterSequence(self.re_embed)

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The codes (K, D)."""

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Count codes among the used ones; unused ones become ``unknown_index``. Any shape."""
        table = self.used.new_full((self.n_e,), -1)
        table[self.used] = torch.arange(len(self.used), device=table.device)
        new = table[indices]
        if self.unknown_index == "random":
            other = torch.randint_like(new, self.re_embed)
        else:
            other = torch.full_like(new, int(self.unknown_index))
        return torch.where(new < 0, other, new)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Turn indices among the used codes back into codes; the extra index becomes the first."""
        return self.used[torch.where(indices >= len(self.used), 0, indices)]

    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Look indices up.

        Args:
            indices: int64, any shape of as many indices as latents.
            shape: (B, h, w, D) of the wanted grid; None gives (N, D).

        Returns:
            z_q (B, D, h, w), or (N, D) without a shape.

        Raises:
            ValueError: There is no such index.
        """
        codes = indices.reshape(-1)
        if len(wrong := codes[(codes < 0) | (codes >= self.re_embed)]):
            raise ValueError(f"index {int(wrong[0])} is none of 0..{self.re_embed - 1}")
        if self.remap is not None:
            codes = self.unmap_to_all(codes)
        z_q = F.embedding(codes, self.codebook)
        return z_q if shape is None else channels_second(z_q.view(shape))


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


class GumbelQuantize(PlainQuantizer):
    """Scores every code, then draws one by the Gumbel-softmax trick; in eval mode, the best one.

    Args:
        num_hiddens: C, channels of the input.
        embedding_dim: D, channels of a code.
        n_embed: K, number of codes.
        straight_through: Draw single codes in training; otherwise mixtures of them.
        kl_weight: Weight of the divergence of the scores from the uniform distribution.
        temp_init: Temperature of the draw, above 0, until somebody sets ``temperature``.
        use_vqinterface: Return the indices inside a `QuantizerInfo`; otherwise by themselves.
        remap: See `PlainQuantizer`; the codes that are not used are then never drawn.
        unknown_index: See `PlainQuantizer`.
        legacy: Draw in eval mode too, as the original did.

    Attributes:
        temperature: Of the draw. It is not part of the state: `GumbelVQ` derives it from the step.
    """

    learns_alone = False

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
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.temperature = temp_init
        self.use_vqinterface = use_vqinterface
        self.legacy = legacy
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
            temp: Temperature of this draw; None for ``temperature``.
            return_logits: Return the scores (B, K, h, w) too, as a fourth value.

        Returns:
            z_q (B, D, h, w); loss; info with indices (B, h, w), a `QuantizerOutput`. All float32.
        """
        if not torch.isfinite(z).all():
            raise NonFiniteError("the latents that reach the quantizer are not finite")
        with torch.autocast(z.device.type, enabled=False):
            logits = self._score(z.float())
            z_q, indices = self._choose(logits, self.temperature if temp is None else temp)
        log_q = logits.log_softmax(dim=1)
        divergence = (log_q.exp() * (log_q + math.log(self.n_e))).sum(dim=1).mean()
        loss = self.kl_weight * divergence
        if not self.use_vqinterface:
            return z_q, loss, indices
        output = QuantizerOutput(z_q, loss, QuantizerInfo(None, None, indices))
        return (*output, logits) if return_logits else output

    def _score(self, z: Tensor) -> Tensor:
        """Score latents (B, C, h, w): (B, K, h, w), under ``remap`` of the used codes only."""
        logits = self.proj(z)
        return logits if self.remap is None else logits[:, self.used]

    def _choose(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Draw, or pick, codes: z_q (B, D, h, w) and indices (B, h, w)."""
        codes = self.codebook if self.remap is None else self.codebook[self.used]
        if not self.training and not self.legacy:
            indices = logits.argmax(dim=1)
            return channels_second(F.embedding(indices, codes)), indices
        hard = self.straight_through or not self.training
        choice = F.gumbel_softmax(logits, temperature, hard=hard, dim=1)
        return torch.einsum("bkhw,kd->bdhw", choice, codes), choice.argmax(dim=1)
