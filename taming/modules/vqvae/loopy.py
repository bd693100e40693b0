"""The loopy vector quantizer: each latent becomes a sequence of codes, as long as it needs.

The equations of the loop are in `taming.modules.vqvae.loop`.

Axis letters: B images, D channels, h w grid, N = B h w latents, K codes, T turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.distributed import share_of_rank, sum_over_ranks
from taming.modules.sequence.notations import UnarySequence
from taming.modules.util import checks_values
from taming.modules.vqvae import rate
from taming.modules.vqvae.base import (
    GridShape,
    LoopTrace,
    Quality,
    Quantizer,
    QuantizerInfo,
    QuantizerOutput,
    as_rows,
    channels_second,
    code_perplexity,
    straight_through,
    vq_loss,
)
from taming.modules.vqvae.checks import mark_impossible, rows_of_codes
from taming.modules.vqvae.codebook import Codebook
from taming.modules.vqvae.loop import Path, Searches, Transform
from taming.modules.vqvae.nearest import distance_to, nearest_codes
from taming.util import instantiate_with_sizes

if TYPE_CHECKING:
    from taming.modules.vqvae.metrics import LoopMetrics

RESIDUAL = {"target": "taming.modules.vqvae.transforms.Residual"}
Rate = float | Tensor | None  # one number for all images, or one for each (B,)


def build_transform(config: Mapping[str, Any], max_loops: int, e_dim: int) -> Transform:
    """Build a transform from ``{target, params}`` with T and D filled in where not stated."""
    sizes: dict[str, Any] = {"max_loops": max_loops, "e_dim": e_dim}
    params = dict(config.get("params") or {})
    if depth := params.get("depth_embedding"):
        sizes["depth_embedding"] = (max_loops, e_dim)
        params["depth_embedding"] = (max_loops, e_dim) if depth is True else tuple(depth)
    return instantiate_with_sizes({**config, "params": params}, sizes)


class LoopyVectorQuantizer(Quantizer):
    """Quantizer that goes round a loop until a code is near enough: a sequence for each latent.

    Start with r = z. If the code e_k nearest to r is within the threshold tau, or this is turn T,
    write k and end the loop. Otherwise write a code of the transform's choice (the dummy D = K, or
    k), transform r, and go round again.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        beta: Weight of the commitment loss.
        threshold: tau, Euclidean distance in the space of z at which a loop ends; may be inf. A
            checkpoint does not change it.
        max_loops: T, most turns of a latent.
        transform_config: ``{target, params}`` of a `Transform`, by default `Residual`. T and D
            follow from this quantizer; ``depth_embedding: true`` stands for (T, D).
        target_length: Mean length in [1, T]: instead of a fixed ``threshold``, tau is then steered
            to it while training and kept in the checkpoint.
        length_range: Train one quantizer for all rates: the mean length of each image of a training
            batch is sampled uniformly between these bounds in [1, T], and it gets the threshold
            that gives it. None trains with the quantizer's own threshold.
        legacy: Put beta on the codebook term instead, for a codebook that learns by gradient.
        ema_decay: Learn the codebook by moving averages of this decay; None by gradient.
        start_batches: Number of first training batches from which k-means places the codes.
        revive_below: Codes used less than this fraction of the uniform share are moved to
            vectors of the current batch; 0 never moves any.

    Raises:
        ValueError: An argument is out of range, or not exactly one of ``threshold`` and
            ``target_length`` is given.

    Example:
        >>> quantizer = LoopyVectorQuantizer(n_e=16, e_dim=4, threshold=0.5, max_loops=3).eval()
        >>> z_q, loss, (_, trace, codes) = quantizer(torch.randn(2, 4, 8, 8))
        >>> codes.shape, bool((trace.lengths == (codes >= 0).sum(dim=-1)).all())
        (torch.Size([2, 8, 8, 3]), True)
        >>> torch.equal(quantizer.get_codebook_entry(codes), z_q)
        True
        >>> cheap = quantizer(torch.randn(2, 4, 8, 8), max_codes=80)
        >>> bool((cheap.info.encodings.lengths.sum(dim=(1, 2)) <= 80).all())
        True
    """

    variable_rate = True
    not_in_identity = ("beta", "legacy", "target_length", "length_range", "start_batches")

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
            raise ValueError("a loopy quantizer's params need one of threshold and target_length")
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be a distance of at least 0, got {threshold}")
        if target_length is not None and not 1 <= target_length <= max_loops:
            raise ValueError(f"target_length must be in [1, {max_loops}], got {target_length}")
        bounds = list(length_range or (1.0, 1.0))
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= max_loops:
            limits = f"[1, max_loops = {max_loops}]"
            raise ValueError(f"length_range must be two bounds in {limits}, got {bounds}")
        self.beta, self.legacy, self.max_loops = beta, legacy, max_loops
        self.target_length, self.length_range = target_length, length_range
        self.start_batches = start_batches
        self.embedding = Codebook(n_e, e_dim, ema_decay, revive_below)
        self.transform = build_transform(transform_config or RESIDUAL, max_loops, e_dim)
        self.sequence = UnarySequence(n_e, max_loops, dummies=self.transform.dummies)
        self.threshold: Tensor
        self.latent_std: Tensor
        start = torch.tensor(float(1 if threshold is None else threshold))
        self.register_buffer("threshold", start)
        self.register_buffer("latent_std", torch.ones(()))

    def forward(
        self,
        z: Tensor,
        threshold: Rate = None,
        max_codes: Rate = None,
        path: Path | None = None,
    ) -> QuantizerOutput:
        """Quantize latents, each with as many turns as it needs.

        Args:
            z: (B, D, h, w) or (N, D); not changed.
            threshold: tau; None takes the quantizer's own or, while training with a
                ``length_range``, samples a budget per image.
            max_codes: Instead: most codes of an image, at least one per site; each image gets the
                smallest threshold that keeps to it.
            path: The `whole_path` of z, if it is known; with ``max_codes`` only.

        Returns:
            z_q like z, of the codebook's dtype; loss; info with a `LoopTrace` (fields (B, h, w) or
            (N,)) and indices (B, h, w, T) or (N, T).

        Raises:
            ValueError: Both threshold and max_codes are given, a threshold is negative or NaN, or
                max_codes is smaller than the number of sites.
        """
        self._check(z)
        flat = as_rows(z)  # (N, D)
        rows = flat.detach()
        if self.training and self.embedding.steps < self.start_batches:
            self._start_from_data(rows, len(z))
        path, tau = self._find_paths(rows, z.shape[0], threshold, max_codes, path)
        lengths = rate.lengths_within(path.distances, tau)  # (N,): here each site ends
        codes = path.end_at(lengths)  # (N, T)
        z_q = straight_through(flat, self._decode(codes, self.embedding.weight.detach()))
        loss = self._loss_without_gradient(path, lengths)
        if loss is None:
            searches = self.transform.retrace(rows, codes, self.embedding.weight.float())
            loss = self._loss(flat, searches)
            if self.training:
                self._learn(rows, searches)
        if self.training and threshold is None:
            self._steer_threshold(path.distances)
        last = path.distances.gather(1, lengths[:, None] - 1).squeeze(1)  # (N,)
        trace = LoopTrace(*(self._grid(x, z) for x in (lengths, last, last <= tau)))
        info = QuantizerInfo(code_perplexity(codes, self.n_e), trace, self._grid(codes, z))
        z_q = self._grid(z_q.to(self.embedding.weight.dtype), z)
        return QuantizerOutput(z_q if z.ndim == 2 else channels_second(z_q), loss, info)

    def get_codebook_entry(self, indices: Tensor, shape: GridShape | None = None) -> Tensor:
        """Turn codes back into latents: exactly the z_q of `forward` in eval mode.

        Args:
            indices: (B, h, w, T) or (N, T) integers, valid codes.
            shape: (B, h, w, D) if the indices are flat.

        Returns:
            z_q (B, D, h, w), or (N, D) for codes (N, T) without a shape.

        Raises:
            ValueError: The loop cannot produce such codes, or they do not fill the shape. On an
                accelerator and in a graph, a site of impossible codes becomes NaN instead.
        """
        codes, grid = rows_of_codes(indices, self.max_loops, shape, self.e_dim)  # (N, T)
        if len(grid) not in (1, 3):
            got = tuple(indices.shape)
            raise ValueError(f"codes must be (B, h, w, T) or (N, T), got the shape {got}")
        wrong = mark_impossible(codes, self.n_e, self.transform.dummies)
        turn = torch.arange(self.max_loops, device=codes.device)
        codes = torch.where(wrong[:, None], -(turn > 0).long(), codes)  # code 0 alone
        z_q = self._decode(codes, self.embedding.weight)
        z_q = z_q.masked_fill(wrong[:, None], math.nan)
        z_q = z_q.reshape(*grid, self.e_dim)
        return z_q if len(grid) == 1 else channels_second(z_q)

    def loop_tables(self) -> dict[str, Tensor]:
        """Return the threshold, the number of turns, and what the transform's turns see."""
        tables = self.transform.loop_tables(self.embedding.weight.float())
        turns = torch.tensor(self.max_loops)
        return {**tables, "threshold": self.threshold, "max_loops": turns}

    # --- rate ------------------------------------------------------------------------------------

    @torch.no_grad()
    def whole_path(self, z: Tensor) -> Path:
        """Find the path of latents (B, D, h, w) or (N, D) through all turns."""
        self._check(z)
        rows = as_rows(z).detach()
        return self._search(rows, rows.new_zeros(len(rows)))

    def reach(self, z: Tensor, quality: Quality, target: Tensor) -> QuantizerOutput:
        """Quantize latents with the smallest ``max_codes`` with which each image reaches a quality.

        Args:
            z: (B, D, h, w) latents.
            quality: Codes (B, h, w, T) -> quality (B,) of the images decoded from them.
            target: The quality wanted, one for all images or one for each (B,).

        Returns:
            As `forward`; T codes for every site where nothing reaches the target.
        """
        target = rate.expand_per_image("the target quality", target, len(z))
        path = self.whole_path(z)  # searched once, then cut to each budget

        @torch.no_grad()
        def quality_within(max_codes: Tensor) -> Tensor:
            tau = rate.threshold_for(path.distances, max_codes)
            codes = path.end_at(rate.lengths_within(path.distances, tau))
            return quality(self._grid(codes, z))

        sizes = (z[0, 0].numel(), self.max_loops)
        return self(z, max_codes=rate.fewest_codes(quality_within, target, *sizes), path=path)

    def _find_paths(
        self,
        rows: Tensor,
        images: int,
        threshold: Rate = None,
        max_codes: Rate = None,
        path: Path | None = None,
    ) -> tuple[Path, Tensor]:
        """Find the path of latents (N, D), as long as needed, and the tau (N,) that cuts it."""
        if threshold is not None and max_codes is not None:
            raise ValueError("give a threshold or max_codes, not both")
        sites = rows.shape[0] // max(images, 1)
        if threshold is None and max_codes is None and self.training and self.length_range:
            max_codes = rate.sample_budgets(images, sites, self.length_range, rows.device)
        if max_codes is None:
            tau = torch.as_tensor(self.threshold if threshold is None else threshold)
            if threshold is not None and checks_values(tau) and not (tau >= 0).all():
                raise ValueError(f"threshold must be a distance of at least 0, got {threshold}")
            tau = rate.expand_per_image("threshold", tau.to(rows), images).repeat_interleave(sites)
            return self._search(rows, tau), tau
        path = path or self.whole_path(rows)
        budgets = rate.expand_per_image("max_codes", torch.as_tensor(max_codes), images)
        return path, rate.threshold_for(path.distances, budgets)

    def _search(self, rows: Tensor, tau: Tensor) -> Path:
        """Find the path of latents (N, D) until they are within tau (N,)."""
        codebook = self.embedding.weight.detach().float()
        return self.transform.search(rows, codebook, tau, self.max_loops)

    def _decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into z_q (N, D), summed in float32 even in a half model."""
        return self.transform.decode(codes, codebook.float()).to(codebook.dtype)

    # --- learning --------------------------------------------------------------------------------

    def _loss(self, z: Tensor, searches: Searches) -> Tensor:
        """Codebook and commitment loss, averaged over all searches; in training, of all ranks."""
        latents = F.embedding(searches.sites, z)  # (M, D)
        share = share_of_rank(len(latents), latents) if self.training else 1.0
        if self.embedding.ema_decay is not None:
            return self.beta * F.mse_loss(searches.approximations.detach(), latents) * share
        return vq_loss(latents, searches.approximations, self.beta, self.legacy) * share

    def _loss_without_gradient(self, path: Path, lengths: Tensor) -> Tensor | None:
        """Compute the loss from a path that ends at lengths (N,); None where it takes searches."""
        if self.training or torch.is_grad_enabled():
            return None
        square = self.transform.mean_square(path, lengths)
        terms = self.beta + (self.embedding.ema_decay is None)
        return None if square is None else terms * square / self.e_dim

    @torch.no_grad()
    def _start_from_data(self, rows: Tensor, images: int) -> None:
        """Place codes by k-means over the latents, then the threshold and the transform's turns."""
        first = self.embedding.steps == 0
        self.embedding.initialize(rows, fresh=bool(first))
        if first and self.target_length is not None:
            nearest = self.embedding.weight[nearest_codes(rows, self.embedding.weight)]
            self.threshold.copy_(self._mean(distance_to(rows, nearest)))
        for _ in range(self.max_loops - 1):  # a turn's size depends on the turns before it
            path, tau = self._find_paths(rows, images)
            codes = path.end_at(rate.lengths_within(path.distances, tau))
            searches = self.transform.retrace(rows, codes, self.embedding.weight.detach())
            self.transform.initialize(rows, searches, self.embedding.weight.detach())

    @torch.no_grad()
    def _learn(self, rows: Tensor, searches: Searches) -> None:
        """Update the latents' spread, the transform and the codebook by running statistics."""
        spread = (rows - self._mean(rows)).square().sum(dim=1)
        momentum = 0.0 if self.embedding.steps == 0 else 0.99
        self.latent_std.lerp_(self._mean(spread).sqrt(), 1 - momentum)
        self.transform.learn(rows, searches, self.embedding.weight.detach())
        self.embedding.learn(searches.targets, searches.found, searches.weights)

    @torch.no_grad()
    def _steer_threshold(self, distances: Tensor) -> None:
        """Move the threshold toward the one that gives ``target_length``."""
        if self.target_length is not None:
            lengths = rate.lengths_within(distances, self.threshold.expand(len(distances)))
            # 5% a step for each turn too many settles in tens of steps and does not overshoot.
            excess = self._mean(lengths.float()) - self.target_length
            moved = self.threshold * torch.exp(0.05 * excess.clamp(-1, 1))
            # No factor leads away from 0, where all latents of a batch are the same.
            self.threshold.copy_(torch.maximum(moved, 1e-3 * self.latent_std))

    def traces(self, output: Any) -> dict[str, LoopTrace]:
        """Return the trace of an output of `forward` under the name ""."""
        return {"": output.info.encodings}

    def codebook_metrics(self) -> LoopMetrics:
        """Return a new metric that also counts the sites that ran into the last turn."""
        from taming.modules.vqvae.metrics import LoopMetrics  # imports torchmetrics: seconds

        return LoopMetrics(self.n_e, self.max_loops)

    def tracked_scalars(self) -> dict[str, Tensor]:
        """Return the threshold relative to the latents' spread, unless it is infinite."""
        relative = self.threshold / self.latent_std
        return {} if relative.isinf() else {"relative_threshold": relative}

    def identity(self) -> dict[str, object]:
        """Add the transform's identity."""
        return {**super().identity(), "transform": self.transform.identity()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load as `nn.Module` does, but keep a threshold that the configuration fixes."""
        if self.target_length is None:
            state_dict[f"{prefix}threshold"] = self.threshold
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @staticmethod
    def _mean(values: Tensor) -> Tensor:
        """Mean of values (N, ...) over the latents of all ranks."""
        count = values.new_full((1,), len(values))
        *total, count = sum_over_ranks(torch.cat([values.sum(dim=0).flatten(), count]))
        return torch.stack(total).reshape(values.shape[1:]) / count

    @staticmethod
    def _grid(rows: Tensor, z: Tensor) -> Tensor:
        """Give rows (N, ...) the grid of z: (B, h, w, ...), or leave them for z (N, D)."""
        return rows if z.ndim == 2 else rows.reshape(z.shape[0], *z.shape[2:], *rows.shape[1:])
