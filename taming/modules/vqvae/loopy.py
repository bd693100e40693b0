"""Quantizers: latents -> codebook entries, with what training and decoding need.

Every quantizer takes z (B, D, h, w) and returns ``z_q, loss, (perplexity, encodings, indices)``;
``get_codebook_entry(indices)`` gives z_q back.

Axis letters: B images, D channels, h w grid, N latents, K codes, T turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.distributed import sum_over_ranks
from taming.modules.sequence.notations import UnarySequence
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
from taming.modules.vqvae.loop import Path, Searches, Transform, check_codes
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.rate import (
    draw_budgets,
    fewest_codes,
    lengths_within,
    per_image,
    threshold_for,
)
from taming.util import instantiate_from_config


class LoopyVectorQuantizer(Quantizer):
    """Quantizer that goes round a loop until a code is near enough: a sequence for each latent.

    For a latent z, threshold tau and at most T turns, with r = z at first: let e_k be the code
    nearest to r. If it is within tau, or this is turn T, write k and end the loop. Otherwise write
    what the transform says (the dummy D = K, or k), transform r, and go round again. A latent's
    path does not depend on tau, which only says where to stop.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the commitment loss.
        threshold: tau, Euclidean distance in the space of z at which a loop ends; may be inf. No
            checkpoint changes it.
        max_loops: T, most turns of a latent.
        transform_config: ``{target, params}`` of a `Transform`.
        target_length: Mean turns per latent in [1, T]: instead of a fixed ``threshold``, tau is
            then steered to it while training and kept in the checkpoint.
        length_range: Train one quantizer for all rates: each image of a training batch draws its
            mean turns uniformly between these bounds in [1, T] and gets the threshold that gives
            them. None trains with the quantizer's own threshold.
        legacy: See `vq_loss`, of a codebook that learns by gradient.
        ema_decay: Learn the codebook by moving averages of this decay; None by gradient.
        start_batches: Number of first training batches from which k-means places the codes.
        revive_below: Codes used less than this fraction of the uniform share are moved to
            vectors that are searched now; 0 never.

    Raises:
        ValueError: An argument is out of range, or not exactly one of ``threshold`` and
            ``target_length`` is given.
    """

    variable_rate = True

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        threshold: float | None = None,
        max_loops: int = 4,
        transform_config: Mapping[str, Any] | None = None,
        target_length: float | None = None,
        length_range: tuple[float, float] | None = None,
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
        drawn = list(length_range or (1.0, 1.0))
        if len(drawn) != 2 or not 1 <= drawn[0] <= drawn[1] <= max_loops:
            raise ValueError(f"length_range must be two bounds in [1, {max_loops}], got {drawn}")
        if transform_config is None:
            residual = "taming.modules.vqvae.transforms.Residual"
            transform_config = {"target": residual, "params": {"max_loops": max_loops}}
        self.beta = beta
        self.legacy = legacy
        self.max_loops = max_loops
        self.target_length = target_length
        self.length_range = length_range
        self.start_batches = start_batches
        self.embedding = Codebook(n_e, e_dim, ema_decay, revive_below)
        self.transform: Transform = instantiate_from_config(transform_config)
        self.transform.check(e_dim, max_loops)
        self.sequence = UnarySequence(n_e, max_loops, dummies=self.transform.dummies)
        self.threshold: Tensor
        self.latent_std: Tensor
        start = torch.tensor(float(1 if threshold is None else threshold))
        self.register_buffer("threshold", start)
        self.register_buffer("latent_std", torch.ones(()))

    def forward(
        self,
        z: Tensor,
        threshold: float | Tensor | None = None,
        max_codes: int | Tensor | None = None,
    ) -> QuantizerOutput:
        """Quantize latents, each with as many turns as it needs.

        Args:
            z: (B, D, h, w) or (N, D); not changed.
            threshold: tau, one for all or one per image (B,); None takes the quantizer's own, or
                while training what ``length_range`` says.
            max_codes: Instead: most slots written for an image, one for all or one per image;
                each image gets the smallest threshold that keeps it.

        Returns:
            z_q like z, float32; loss; info with a `LoopTrace` (fields (B, h, w) or (N,)) and
            indices (B, h, w, T) or (N, T).

        Raises:
            ValueError: Both a threshold and a number of tokens are given, a threshold is negative
                or no number, or there are fewer tokens than sites.
        """
        flat = self._rows(z)
        rows = flat.detach()
        if self.training and self.embedding.steps < self.start_batches:
            self._start_from_data(rows, len(z))
        path, tau = self._follow(rows, len(z), threshold, max_codes)
        lengths = lengths_within(path.distances, tau)
        codes = path.end_at(lengths)
        z_q = straight_through(flat, self.transform.decode(codes, self.embedding.weight.detach()))
        searches = self.transform.retrace(rows, codes, self.embedding.weight)
        loss = self._loss(flat, searches)
        last = path.distances.gather(1, lengths[:, None] - 1).squeeze(1)
        trace = LoopTrace(lengths, last, last <= tau)
        if self.training:
            self._learn(rows, searches)
            if threshold is None:
                self._steer(path.distances)
        info = QuantizerInfo(
            code_perplexity(searches.found, self.n_e),
            LoopTrace(*(self._grid(field, z) for field in trace)),
            self._grid(codes, z),
        )
        z_q = self._grid(z_q, z)
        return QuantizerOutput(z_q if z.ndim == 2 else channels_second(z_q), loss, info)

    @torch.no_grad()
    def whole_path(self, z: Tensor) -> Path:
        """Follow latents (B, D, h, w) or (N, D) through all turns, wherever they may end then."""
        rows = self._rows(z).detach()
        return self._walk(rows, rows.new_zeros(len(rows)))

    @torch.no_grad()
    def fewest_codes(
        self, z: Tensor, quality: Callable[[Tensor], Tensor], target: Tensor
    ) -> Tensor:
        """Find the smallest ``max_codes`` (B,) at which each image reaches a quality.

        The path is followed once, then cut for each number of codes that is tried.
        """
        path = self.whole_path(z)

        def quality_of(codes: Tensor) -> Tensor:
            lengths = lengths_within(path.distances, self.thresholds(path, codes))
            return quality(self._grid(path.end_at(lengths), z))

        return fewest_codes(quality_of, target, z[0, 0].numel(), self.max_loops)

    def traces(self, output: QuantizerOutput) -> dict[str, LoopTrace]:
        """Return the trace of the loop under the name ""."""
        assert isinstance(output.info.encodings, LoopTrace)
        return {"": output.info.encodings}

    @staticmethod
    def thresholds(path: Path, tokens: Tensor) -> Tensor:
        """Thresholds (N,) at which the images of a path write no more than ``tokens`` (B,)."""
        distances = path.distances.unflatten(0, (len(tokens), -1))
        return threshold_for(distances, tokens).repeat_interleave(distances.shape[1])

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
        grid = indices.shape[:-1] if shape is None else shape[:3]
        if indices.numel() != math.prod(grid) * self.max_loops:
            raise ValueError(f"codes {tuple(indices.shape)} are not {self.max_loops} for each site")
        codes = indices.reshape(-1, self.max_loops)
        check_codes(codes, self.n_e, self.transform.dummies)
        z_q = self.transform.decode(codes, self.embedding.weight)
        z_q = z_q.reshape(*grid, self.e_dim)
        return z_q if len(grid) == 1 else channels_second(z_q)

    def followed(self) -> dict[str, Tensor]:
        """Threshold relative to the latents' spread; nothing of an infinite one."""
        relative = self.threshold / self.latent_std
        return {} if relative.isinf() else {"relative_threshold": relative}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load (see `nn.Module`), except that a threshold fixed by the configuration stays."""
        if self.target_length is None:
            state_dict[f"{prefix}threshold"] = self.threshold
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _follow(
        self,
        rows: Tensor,
        images: int,
        threshold: float | Tensor | None,
        max_codes: int | Tensor | None,
    ) -> tuple[Path, Tensor]:
        """Walk latents (N, D) as far as they may have to go; the path and tau (N,) of each."""
        if threshold is not None and max_codes is not None:
            raise ValueError("give a threshold or max_codes, not both")
        sites = len(rows) // images
        if threshold is None and max_codes is None and self.training and self.length_range:
            max_codes = draw_budgets(images, sites, self.length_range, rows.device)
        if max_codes is None:
            tau = torch.as_tensor(self.threshold if threshold is None else threshold)
            if threshold is not None and not (tau >= 0).all():
                raise ValueError(f"threshold must be a distance of at least 0, got {threshold}")
            tau = per_image("threshold", tau.to(rows), images).repeat_interleave(sites)
            return self._walk(rows, tau), tau
        path = self.whole_path(rows)
        tokens = per_image("max_codes", torch.as_tensor(max_codes, device=rows.device), images)
        return path, self.thresholds(path, tokens)

    def _walk(self, rows: Tensor, tau: Tensor) -> Path:
        """Follow latents (N, D) until they are within tau (N,)."""
        return self.transform.search(rows, self.embedding.weight.detach(), tau, self.max_loops)

    def _loss(self, z: Tensor, searches: Searches) -> Tensor:
        """Codebook and commitment loss, averaged over all turns of the sites in the loop."""
        latents = z[searches.sites]
        commitment = F.mse_loss(searches.approximations.detach(), latents)
        if self.embedding.ema_decay is not None:
            return self.beta * commitment
        codebook_term = F.mse_loss(searches.approximations, latents.detach())
        return vq_loss(codebook_term, commitment, self.beta, self.legacy)

    @torch.no_grad()
    def _start_from_data(self, rows: Tensor, images: int) -> None:
        """Place codes by k-means over the latents, then the threshold and the transform's turns."""
        first = self.embedding.steps == 0
        self.embedding.start_from(rows, fresh=bool(first))
        if first and self.target_length is not None:
            self.threshold.copy_(self._mean(nearest_codes(rows, self.embedding.weight).distances))
        for _ in range(self.max_loops - 1):
            path, tau = self._follow(rows, images, None, None)
            codes = path.end_at(lengths_within(path.distances, tau))
            searches = self.transform.retrace(rows, codes, self.embedding.weight.detach())
            self.transform.start(rows, searches, self.embedding.weight.detach())

    @torch.no_grad()
    def _learn(self, rows: Tensor, searches: Searches) -> None:
        """Update what is neither trained by gradient nor steered."""
        spread = (rows - self._mean(rows)).square().sum(dim=1)
        momentum = 0.0 if self.embedding.steps == 0 else 0.99
        self.latent_std.lerp_(self._mean(spread).sqrt(), 1 - momentum)
        self.transform.learn(rows, searches, self.embedding.weight.detach())
        self.embedding.learn(searches.targets, searches.found, searches.weights)

    @torch.no_grad()
    def _steer(self, distances: Tensor) -> None:
        """Move the threshold toward the one that gives the mean turns wanted."""
        if self.target_length is not None:
            lengths = lengths_within(distances, self.threshold.expand(len(distances)))
            # 5% a step for each turn too many settles in tens of steps and does not overshoot.
            excess = self._mean(lengths.float()) - self.target_length
            moved = self.threshold * torch.exp(0.05 * excess.clamp(-1, 1))
            # No factor leads away from 0, where all latents of a batch are the same.
            self.threshold.copy_(torch.maximum(moved, 1e-3 * self.latent_std))

    @staticmethod
    def _mean(values: Tensor) -> Tensor:
        """Mean of values (N, ...) over the latents of all ranks."""
        count = values.new_full((1,), len(values))
        *total, count = sum_over_ranks(torch.cat([values.sum(dim=0).flatten(), count]))
        return torch.stack(total).reshape(values.shape[1:]) / count

    @staticmethod
    def _grid(rows: Tensor, z: Tensor) -> Tensor:
        """Give rows (N, ...) the grid of z: (B, h, w, ...), or leave them for z (N, D)."""
        return rows if z.ndim == 2 else rows.reshape(len(z), *z.shape[2:], *rows.shape[1:])
