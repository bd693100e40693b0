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
from taming.modules.vqvae.entropy import EntropyTables, Price
from taming.modules.vqvae.loop import build_transform
from taming.modules.vqvae.nearest import distance_to, nearest_codes
from taming.modules.vqvae.paths import Path, Searches
from taming.modules.vqvae.rate import (
    check_ranges,
    expand_per_image,
    lengths_within,
    one_rate,
    rates_between,
)
from taming.modules.vqvae.walk import Rate, Walk, Walker, check_rate

if TYPE_CHECKING:
    from taming.modules.vqvae.metrics import LoopMetrics


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
        rate: Instead: lambda >= 0, by which codes and ends are chosen (see `forward`). A checkpoint
            does not change it.
        length_range: Train one quantizer for all rates: the mean length of each image of a training
            batch is sampled uniformly between these bounds in [1, T], and it gets the threshold
            that gives it. None trains with the quantizer's own threshold or rate.
        rate_range: Instead: the lambda of each image of a training batch is sampled between these
            bounds, above 0, uniformly in its logarithm, and its codes are those of ``rate``.
        rate_weight: Weight in the loss of lambda times the bits that each site is expected to write
            (`Price.expected_bits`), for latents whose codes are cheap. It needs a lambda: ``rate``
            or ``rate_range``.
        legacy: Put beta on the codebook term instead, for a codebook that learns by gradient.
        ema_decay: Learn the codebook by moving averages of this decay; None by gradient.
        start_batches: Number of first training batches from which k-means places the codes.
        revive_below: Codes used less than this fraction of the uniform share are moved to
            vectors of the current batch; 0 never moves any.

    Raises:
        ValueError: An argument is out of range, or not exactly one of ``threshold``,
            ``target_length`` and ``rate`` is given.

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
    entropy: EntropyTables
    not_in_identity = (
        *("beta", "legacy", "target_length", "length_range", "rate_range", "start_batches"),
        *("rate", "rate_weight"),
    )

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
        rate_range: tuple[float, float] | None = None,
        rate: float | None = None,
        rate_weight: float = 0.0,
    ) -> None:
        super().__init__(n_e, e_dim)
        if max_loops < 1:
            raise ValueError(f"max_loops must be at least 1, got {max_loops}")
        own = {"threshold": threshold, "target_length": target_length, "rate": rate}
        if sum(value is not None for value in own.values()) != 1:
            raise ValueError(
                f"a loopy quantizer's params need exactly one of {', '.join(own)}, got {own}; "
                "set the others to null"
            )
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be a distance of at least 0, got {threshold}")
        if target_length is not None and not 1 <= target_length <= max_loops:
            raise ValueError(f"target_length must be in [1, {max_loops}], got {target_length}")
        check_ranges(length_range, rate_range, max_loops)
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"rate must be a lambda of at least 0, got {rate}")
        if not rate_weight >= 0 or (rate_weight > 0 and rate is None and rate_range is None):
            raise ValueError(
                f"rate_weight must be at least 0 and needs rate or rate_range, got {rate_weight}"
            )
        self.rate, self.rate_weight = rate, rate_weight
        self.beta, self.legacy, self.max_loops = beta, legacy, max_loops
        self.target_length, self.start_batches = target_length, start_batches
        self.length_range, self.rate_range = length_range, rate_range
        self.embedding = Codebook(n_e, e_dim, ema_decay, revive_below)
        self.transform = build_transform(transform_config, max_loops, e_dim)
        for name, value in {"rate": rate, "rate_range": rate_range}.items():
            if value is not None:
                check_rate(name, self.transform)
        if rate_weight > 0:
            self.transform.project(self.embedding.weight.detach(), 0)  # or it refuses
        self.sequence = UnarySequence(n_e, max_loops, dummies=self.transform.dummies)
        self.entropy = EntropyTables(n_e, max_loops, self.transform.dummies)
        self.threshold: Tensor
        self.latent_std: Tensor
        unset = 1.0 if rate is None else math.inf
        start = torch.tensor(float(unset if threshold is None else threshold))
        self.register_buffer("threshold", start)
        self.register_buffer("latent_std", torch.ones(()))

    def forward(
        self,
        z: Tensor,
        threshold: Rate = None,
        max_codes: Rate = None,
        rate: Rate = None,
        target_bits: Rate = None,
    ) -> QuantizerOutput:
        """Quantize latents, each with as many turns as it needs.

        Args:
            z: (B, D, h, w), or (N, D) of one image; not changed.
            threshold: tau; None takes the quantizer's own, or its own ``rate``, or, while training
                with a ``length_range`` or ``rate_range``, samples a rate per image.
            max_codes: Instead: most codes of an image, at least one per site; each image gets the
                smallest threshold that keeps to it.
            rate: Instead: lambda >= 0; codes and ends are those of least J (see
                `taming.modules.vqvae.walk`). 0 writes the codes of the whole path and ends each
                site where it is nearest; the larger, the fewer bits.
            target_bits: Instead: most bits of an image by the `EntropyTables`; each image gets
                about the smallest lambda that keeps to it.

        Returns:
            z_q like z, of the codebook's dtype; loss; info with a `LoopTrace` (fields (B, h, w) or
            (N,)) and indices (B, h, w, T) or (N, T).

        Raises:
            ValueError: More than one of these is given, one is out of range, or max_codes or
                target_bits is too small for any codes.
        """
        self._check(z)
        rows = as_rows(z).detach()  # (N, D)
        if self.training:
            self._measure_spread(rows)
            if self.embedding.steps < self.start_batches:
                self._start_from_data(rows, _images(z))
        given = {"threshold": threshold, "max_codes": max_codes}
        rates = one_rate(given | {"rate": rate, "target_bits": target_bits})
        if self.training and not rates:
            rates = self.sample_rates(z)
        walk = self._walk(rows, _images(z), rates)
        if self.training and threshold is None:
            self._steer_threshold(walk.path.distances)
        return self._quantize(z, walk)

    def _quantize(self, z: Tensor, walk: Walk) -> QuantizerOutput:
        """Return the output of `forward` for latents whose walk is known."""
        flat = as_rows(z)  # (N, D)
        codes, lengths, last = walk.codes, walk.lengths, walk.distances  # (N, T), (N,), (N,)
        z_q = straight_through(flat, self._decode(codes, self.embedding.weight.detach()))
        loss = self._loss_without_gradient(walk.path, lengths)
        if loss is None:
            searches = self.transform.retrace(flat.detach(), codes, self.embedding.weight.float())
            loss = self._loss(flat, searches)
            if self.rate_weight > 0:
                loss = loss + self.rate_weight * self._rate_loss(flat, searches, walk.price)
            if self.training:
                self._learn(flat.detach(), codes, searches)
        trace = LoopTrace(*(self._grid(x, z) for x in (lengths, last, last <= walk.threshold)))
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
        wrong = mark_impossible(codes, self.n_e, self.transform.dummies)
        turn = torch.arange(self.max_loops, device=codes.device)
        codes = torch.where(wrong[:, None], -(turn > 0).long(), codes)  # code 0 alone
        z_q = self._decode(codes, self.embedding.weight)
        z_q = z_q.masked_fill(wrong[:, None], math.nan)
        z_q = z_q.reshape(*grid, self.e_dim)
        return z_q if len(grid) == 1 else channels_second(z_q)

    def loop_tables(self) -> dict[str, Tensor]:
        """Return its own rate, the bits of codes, and what the transform's turns see."""
        tables = self.transform.loop_tables(self.embedding.weight.float())
        tables["max_loops"] = torch.tensor(self.max_loops)
        if self.rate is None:
            tables["threshold"] = self.threshold
        else:
            tables["rate"] = torch.tensor(self.rate)
        if not self.transform.dummies:
            tables |= {"code_bits": self.entropy.code_bits(), "end_bits": self.entropy.end_bits()}
            tables["latent_std"] = self.latent_std
        return tables

    # --- rate ------------------------------------------------------------------------------------

    def sample_rates(self, z: Tensor) -> dict[str, Tensor]:
        """Sample a rate of each image of latents z, between the bounds that training has."""
        if not (self.length_range or self.rate_range):
            return {}
        images = _images(z)
        share = torch.rand(images, device=z.device, dtype=torch.float32)
        sites = len(as_rows(z)) // images
        return rates_between(share, sites, self.length_range, self.rate_range)

    @torch.no_grad()
    def whole_path(self, z: Tensor) -> Path:
        """Find the path of latents (B, D, h, w) or (N, D) through all turns."""
        self._check(z)
        return self._walker(as_rows(z).detach(), _images(z)).whole_path()

    @torch.no_grad()
    def walk(self, z: Tensor, **rate: Rate) -> Walk:
        """Walk latents as `forward` does, at one of its rates or the quantizer's own, to look at.

        Args:
            z: (B, D, h, w), or (N, D) of one image.
            **rate: At most one rate of `forward`.

        Raises:
            ValueError: As for `forward`.
        """
        self._check(z)
        return self._walk(as_rows(z), _images(z), rate)

    def bits(self, codes: Tensor) -> Tensor:
        """Add up the bits of codes (B, h, w, T) by the `EntropyTables`: (B,) float64."""
        return self.entropy.bits_of_images(codes)

    def reach(self, z: Tensor, quality: Quality, target: Tensor) -> QuantizerOutput:
        """Quantize latents with the smallest ``max_codes`` with which each image reaches a quality.

        Args:
            z: (B, D, h, w) latents.
            quality: Codes (B, h, w, T) -> quality (B,) of the images decoded from them.
            target: The quality wanted, one for all images or one for each (B,).

        Returns:
            As `forward`; T codes for every site where nothing reaches the target.
        """
        self._check(z)
        target = expand_per_image("the target quality", target, len(z))
        walker = self._walker(as_rows(z).detach(), len(z))
        return self._quantize(z, walker.to_quality(lambda c: quality(self._grid(c, z)), target))

    def _walker(self, rows: Tensor, images: int) -> Walker:
        codebook, unit = self.embedding.weight.detach().float(), self.latent_std.float().square()
        return Walker(self.transform, codebook, self.entropy, unit, rows, images)

    def _walk(self, rows: Tensor, images: int, given: Mapping[str, Rate] | None = None) -> Walk:
        """Walk latents (N, D) at the rate given, or at its own."""
        own = ("threshold", self.threshold) if self.rate is None else ("rate", self.rate)
        name, value = next(iter(one_rate(given or {}).items()), own)
        check_rate(name, self.transform)
        return self._walker(rows, images).walk(name, value)

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

    def _rate_loss(self, z: Tensor, searches: Searches, price: Tensor) -> Tensor:
        """Average lambda times the bits of a site, as expected of its turns; of all ranks."""
        weight = price[searches.sites]  # (M,)
        codebook = self.embedding.weight.float().clone()  # averages move it before the gradient
        before = (z.detach()[searches.sites] - searches.queries).detach()
        residual = F.embedding(searches.sites, z) - before  # (M, D): a query, with its gradient
        priced, total = Price(self.entropy.code_bits(), weight), z.new_zeros(())
        for turn in range(self.max_loops):
            at = (searches.turns == turn).nonzero().squeeze(1)
            if len(at) > 0:
                seen = self.transform.project(codebook, turn)
                bits = priced.of_sites(at).expected_bits(residual[at], seen, turn)
                total = total + (weight[at] * bits).sum()
        share = share_of_rank(len(z), z) if self.training else 1.0
        unit = self.latent_std.float().square().clamp(min=1e-20)  # 0 if all latents are the same
        return total / (unit * len(z)) * share

    def _loss_without_gradient(self, path: Path, lengths: Tensor) -> Tensor | None:
        """Compute the loss from a path that ends at lengths (N,); None where it takes searches."""
        if self.training or torch.is_grad_enabled() or self.rate_weight > 0:
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
            codes = self._walk(rows, images).codes
            searches = self.transform.retrace(rows, codes, self.embedding.weight.detach())
            self.transform.initialize(rows, searches, self.embedding.weight.detach())

    @torch.no_grad()
    def _measure_spread(self, rows: Tensor) -> None:
        """Update the latents' spread, by which J measures distances."""
        spread = (rows - self._mean(rows)).square().sum(dim=1)
        std = self._mean(spread).sqrt().to(self.latent_std)
        self.latent_std.lerp_(std, 1 - self._momentum)

    @torch.no_grad()
    def _learn(self, rows: Tensor, codes: Tensor, searches: Searches) -> None:
        """Update the tables, the transform and the codebook by running statistics."""
        self.entropy.learn(codes, self._momentum)
        self.transform.learn(rows, searches, self.embedding.weight.detach())
        self.embedding.learn(searches.targets, searches.found, searches.weights)

    @property
    def _momentum(self) -> float:
        """Weight of the old value in running statistics."""
        return 0.0 if self.embedding.steps == 0 else 0.99

    @torch.no_grad()
    def _steer_threshold(self, distances: Tensor) -> None:
        """Move the threshold toward the one that gives ``target_length``."""
        if self.target_length is not None:
            lengths = lengths_within(distances, self.threshold.expand(len(distances)))
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
        """Add the transform's identity and, if codes are chosen by a rate of its own, its bits."""
        own = {**super().identity(), "transform": self.transform.identity()}
        if self.rate is not None:
            own |= {"rate": self.rate, "bits": self.entropy.code_bits().tolist()}
            own |= {"latent_std": float(self.latent_std), "ends": self.entropy.end_bits().tolist()}
        return own

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


def _images(z: Tensor) -> int:
    """Return the number of images of latents (B, D, h, w), or (N, D) of one."""
    return z.shape[0] if z.ndim == 4 else 1  # len would be a constant in a graph
