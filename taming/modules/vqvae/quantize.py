"""Quantizers: latents -> codebook entries, with what training and decoding need.

Every quantizer takes z (B, D, h, w) and returns ``z_q, loss, (perplexity, encodings, indices)``;
``get_codebook_entry(indices)`` gives z_q back.

Axis letters: B images, D channels, h w grid, N latents, K codes, T turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.base import (
    LoopTrace,
    Quantizer,
    QuantizerInfo,
    QuantizerOutput,
    channels_second,
    code_perplexity,
    straight_through,
    vq_loss,
)
from taming.modules.vqvae.codebook import Codebook
from taming.modules.vqvae.distributed import sum_over_ranks
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.sequence import RasterSequence, UnarySequence
from taming.modules.vqvae.transforms import Path, Transform
from taming.util import instantiate_from_config


class VectorQuantizer2(Quantizer):
    """Nearest-code quantizer with a codebook trained by gradient (arXiv:1711.00937).

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the commitment loss (see `vq_loss` for ``legacy``).
        remap: Path of an ``.npy`` file of used codes: indices then count only those.
        unknown_index: What an unused code becomes under ``remap``: ``"random"``, ``"extra"`` (one
            more index) or an index.
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
        super().__init__(n_e, e_dim)
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.remap = remap
        self.re_embed = n_e
        self.unknown_index = unknown_index
        if remap is not None:
            self.used: Tensor
            self.register_buffer("used", torch.from_numpy(np.load(remap)))
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)
        self.sequence = RasterSequence(self.re_embed)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents.

        Args:
            z: (B, D, h, w).

        Returns:
            z_q like z; loss; indices (N,), (N, 1) under ``remap``, (B, h, w) if sane.
        """
        flat = self._rows(z)
        indices = nearest_codes(flat, self.embedding.weight).indices
        entries = self.embedding(indices)
        loss = vq_loss(
            F.mse_loss(entries, flat.detach()),
            F.mse_loss(entries.detach(), flat),
            self.beta,
            self.legacy,
        )
        z_q = channels_second(entries.detach().view(len(z), *z.shape[2:], self.e_dim))
        if self.remap is not None:
            indices = self.remap_to_used(indices)[:, None]
        if self.sane_index_shape:
            indices = indices.reshape(len(z), *z.shape[2:])
        return QuantizerOutput(straight_through(z, z_q), loss, QuantizerInfo(None, None, indices))

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Count codes among the used ones; unused ones become ``unknown_index``. Any shape."""
        table = self.used.new_full((self.n_e,), -1)
        table[self.used] = torch.arange(len(self.used), device=table.device, dtype=table.dtype)
        new = table[indices]
        if self.unknown_index == "random":
            other = torch.randint(self.re_embed, new.shape, device=new.device, dtype=new.dtype)
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
        """
        codes = (
            indices.reshape(-1) if self.remap is None else self.unmap_to_all(indices.reshape(-1))
        )
        z_q = self.embedding(codes)
        return z_q if shape is None else channels_second(z_q.view(shape))


class LoopyVectorQuantizer(Quantizer):
    """Quantizer that goes round a loop until a code is near enough: a sequence for each latent.

    For a latent z, threshold tau and at most T turns, with r = z at first: let e_k be the code
    nearest to r. If it is within tau, or this is turn T, write k and end the loop. Otherwise write
    what the transform says (the dummy D = K, or k), transform r, and go round again.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the commitment loss.
        threshold: tau, Euclidean distance in the space of z at which a loop ends; may be inf.
        max_loops: T, most turns of a latent.
        transform_config: ``{target, params}`` of a `Transform`.
        target_length: Mean turns per latent in [1, T]: instead of a fixed ``threshold``, tau is
            then steered to it while training and kept in the checkpoint.
        threshold_spread: Factor of at least 1: each image of a training batch draws its tau
            log-uniformly between tau / spread and tau * spread, so that all depths are trained.
        legacy: See `vq_loss`.
        ema_decay: Learn the codebook by moving averages of this decay; None by gradient.
        start_batches: Number of first training batches from which k-means places the codes.
        revive_below: Codes used less than this fraction of the uniform share are moved to
            vectors that are searched now; 0 never.

    Raises:
        ValueError: An argument is out of range, or not exactly one of ``threshold`` and
            ``target_length`` is given.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        threshold: float | None = None,
        max_loops: int = 4,
        transform_config: Mapping[str, Any] | None = None,
        target_length: float | None = None,
        threshold_spread: float = 1.0,
        legacy: bool = False,
        ema_decay: float | None = None,
        start_batches: int = 4,
        revive_below: float = 0.05,
    ) -> None:
        super().__init__(n_e, e_dim)
        if max_loops < 1:
            raise ValueError(f"max_loops must be at least 1, got {max_loops}")
        if (threshold is None) == (target_length is None):
            raise ValueError("give exactly one of threshold and target_length")
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be a distance of at least 0, got {threshold}")
        if target_length is not None and not 1 <= target_length <= max_loops:
            raise ValueError(f"target_length must be in [1, {max_loops}], got {target_length}")
        if threshold_spread < 1:
            raise ValueError(f"threshold_spread must be at least 1, got {threshold_spread}")
        if transform_config is None:
            residual = "taming.modules.vqvae.transforms.Residual"
            transform_config = {"target": residual, "params": {"max_loops": max_loops}}
        self.beta = beta
        self.legacy = legacy
        self.max_loops = max_loops
        self.target_length = target_length
        self.threshold_spread = threshold_spread
        self.start_batches = start_batches
        self.embedding = Codebook(n_e, e_dim, ema_decay, revive_below)
        self.transform: Transform = instantiate_from_config(transform_config)
        self.transform.check(e_dim, max_loops)
        self.sequence = UnarySequence(n_e, max_loops, dummies=self.transform.dummies)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(1.0 if threshold is None else threshold))

    def forward(self, z: Tensor, threshold: Tensor | None = None) -> QuantizerOutput:
        """Quantize latents, each with as many turns as it needs.

        Args:
            z: (B, D, h, w) or (N, D); not changed.
            threshold: tau, a scalar or one per image (B,); None takes the quantizer's own, spread
                over the images while training.

        Returns:
            z_q like z, float32; loss; info with a `LoopTrace` (fields (B, h, w) or (N,)) and
            indices (B, h, w, T) or (N, T).
        """
        flat = self._rows(z)
        rows = flat.detach()
        if self.training and self.embedding.steps < self.start_batches:
            self._start_from_data(rows)
        tau = self._threshold_per_row(threshold, len(z), len(rows))
        path = self.transform.walk(rows, self.embedding.weight.detach(), tau, self.max_loops)
        z_q = self.transform.decode(path.codes, self.embedding.weight.detach())
        z_q = straight_through(flat, z_q)
        loss = self._loss(flat, path)
        trace = self._trace(path, tau)
        if self.training:
            self._learn(rows, path, trace.lengths)
        info = QuantizerInfo(
            code_perplexity(path.found, self.n_e),
            LoopTrace(*(self._grid(field, z) for field in trace)),
            self._grid(path.codes, z),
        )
        z_q = self._grid(z_q, z)
        return QuantizerOutput(z_q if z.ndim == 2 else channels_second(z_q), loss, info)

    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Turn codes back into latents: exactly the z_q of `forward` in eval mode.

        Args:
            indices: (B, h, w, T) or (N, T) int64, valid codes.
            shape: (B, h, w, D) if the indices are flat.

        Returns:
            z_q (B, D, h, w), or (N, D) for codes (N, T) without a shape.

        Raises:
            ValueError: The codes are not ones that the loop writes.
        """
        codes = indices.reshape(-1, self.max_loops)
        self._check(codes)
        z_q = self.transform.decode(codes, self.embedding.weight)
        grid = indices.shape[:-1] if shape is None else shape[:3]
        z_q = z_q.reshape(*grid, self.e_dim)
        return z_q if len(grid) == 1 else channels_second(z_q)

    def _check(self, codes: Tensor) -> None:
        """Refuse codes (N, T) with a site that has no code or goes on after its end."""
        last = (codes >= 0).sum(dim=1, keepdim=True) - 1
        slot = torch.arange(self.max_loops, device=codes.device)
        is_code = (codes >= 0) & (codes < self.n_e)
        body = (codes == self.n_e) if self.transform.dummies else is_code
        right = torch.where(slot < last, body, torch.where(slot == last, is_code, codes == -1))
        wrong = ~right.all(dim=1) | (last.squeeze(1) < 0)
        if wrong.any():
            site = int(wrong.nonzero()[0])
            form = "D,D,A'" if self.transform.dummies else "A1,A2,A3"
            raise ValueError(
                f"site {site} reads {codes[site].tolist()}, which is no sequence of the form "
                f"{form} with codes 0..{self.n_e - 1}, D = {self.n_e} and -1 after the end"
            )

    def _threshold_per_row(self, threshold: Tensor | None, batch: int, rows: int) -> Tensor:
        """tau (N,) for each latent, from a scalar or one value per image."""
        tau = self.threshold if threshold is None else threshold.float()
        if threshold is None and self.training and self.threshold_spread > 1:
            exponent = 2 * torch.rand(batch, device=tau.device) - 1
            tau = tau * self.threshold_spread**exponent
        return tau.expand(batch).repeat_interleave(rows // batch)

    def _loss(self, z: Tensor, path: Path) -> Tensor:
        """Codebook and commitment loss, averaged over all turns of the sites in the loop."""
        commitment = F.mse_loss(path.approximations, z[path.sites])
        if self.embedding.ema_decay is not None:
            return self.beta * commitment
        codebook_term = F.mse_loss(self.embedding(path.found), path.queries)
        return vq_loss(codebook_term, commitment, self.beta, self.legacy)

    def _trace(self, path: Path, tau: Tensor) -> LoopTrace:
        """How each loop ended; fields (N,)."""
        lengths = (path.codes >= 0).sum(dim=1)
        distances = path.distances.gather(1, lengths[:, None] - 1).squeeze(1)
        return LoopTrace(lengths, distances, distances <= tau)

    @torch.no_grad()
    def _start_from_data(self, rows: Tensor) -> None:
        """Place codes, scales and threshold by k-means over what every turn of the loop meets."""
        first = self.embedding.steps == 0
        self.embedding.start_from(rows, fresh=bool(first))
        if first and self.target_length is not None:
            self.threshold.copy_(self._mean(nearest_codes(rows, self.embedding.weight).distances))
        for _ in range(self.max_loops - 1):
            tau = self.threshold.expand(len(rows))
            path = self.transform.walk(rows, self.embedding.weight, tau, self.max_loops)
            self.transform.adapt(rows, path, momentum=0.0)
            self.embedding.start_from(path.queries, fresh=False)

    @torch.no_grad()
    def _learn(self, rows: Tensor, path: Path, lengths: Tensor) -> None:
        """Update everything that is not trained by gradient."""
        self.transform.adapt(rows, path, momentum=0.99)
        self.embedding.learn(path.queries, path.found)
        if self.target_length is not None:
            # Too many turns widen the threshold; 5% a step for each turn too many settles in some
            # tens of steps and does not overshoot.
            excess = self._mean(lengths.float()) - self.target_length
            self.threshold.mul_(torch.exp(0.05 * excess.clamp(-1, 1)))

    @staticmethod
    def _mean(values: Tensor) -> Tensor:
        """Mean of values (N,) over all ranks."""
        total, count = sum_over_ranks(torch.stack([values.sum(), values.new_tensor(len(values))]))
        return total / count

    @staticmethod
    def _grid(rows: Tensor, z: Tensor) -> Tensor:
        """Give rows (N, ...) the grid of z: (B, h, w, ...), or leave them for z (N, D)."""
        return rows if z.ndim == 2 else rows.reshape(len(z), *z.shape[2:], *rows.shape[1:])
