"""Walks: paths of latents through the loop, and where they end under each kind of rate.

A threshold, or a number of codes, cuts a path that does not depend on it. A rate lambda chooses the
codes too: those of least

    J = |z - z_q|^2 / latent_std^2 + lambda bits

where z_q is that before a depth embedding. A turn takes the code of least J so far, a beam keeps
the paths of least J, and a site ends at the turn whose whole J is least.

Axis letters: B images, S sites of an image, N = B S latents, T turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from taming.modules.util import checks_values
from taming.modules.vqvae.entropy import EntropyTables, Price
from taming.modules.vqvae.loop import Transform
from taming.modules.vqvae.paths import Path
from taming.modules.vqvae.rate import (
    expand_per_image,
    fewest_codes,
    lengths_within,
    threshold_for,
)

LOG2_RATES, PROBES = (-30.0, 10.0), 12  # of lambda, beyond all that is of use; to 1%
CHEAPEST = 2.0**40  # a lambda by which distances no longer count
Rate = float | Tensor | None  # one number for all images, or one for each (B,)


def check_rate(name: str, transform: Transform) -> None:
    """Refuse a rate by bits where a length changes no distance."""
    if transform.dummies and name in ("rate", "target_bits", "rate_range"):
        raise ValueError(
            f"{type(transform).__name__} decodes a site to its last code alone, so more turns do "
            f"not bring it nearer: {name} has no meaning"
        )


class Walk(NamedTuple):
    """Paths of latents, and where they end.

    Attributes:
        path: The `Path`.
        lengths: (N,) int64 in [1, T], turns of each site.
        threshold: (N,) float32, distance that ends a loop; inf where J decides.
        price: (N,) float32, squared distance that is worth a bit; 0 where a threshold decides.
    """

    path: Path
    lengths: Tensor
    threshold: Tensor
    price: Tensor

    @property
    def codes(self) -> Tensor:
        """Codes (N, T) of the walk."""
        return self.path.end_at(self.lengths)

    @property
    def distances(self) -> Tensor:
        """Distance of each site at its last turn, (N,)."""
        return self.path.distances.gather(1, self.lengths[:, None] - 1).squeeze(1)

    def where(self, chosen: Tensor, other: Walk) -> Walk:
        """Take the images (B,) bool that are chosen from this walk, and the rest from another."""
        of_image = len(self.lengths) // max(len(chosen), 1)
        sites = chosen.to(self.lengths.device).repeat_interleave(of_image)  # (N,)
        path = Path(
            torch.where(sites[:, None, None], self.path.codes, other.path.codes),
            torch.where(sites[:, None], self.path.distances, other.path.distances),
            self.path.dummy,
        )
        lengths = torch.where(sites, self.lengths, other.lengths)
        threshold = torch.where(sites, self.threshold, other.threshold)
        return Walk(path, lengths, threshold, torch.where(sites, self.price, other.price))


@dataclass(frozen=True)
class Walker:
    """Walks the latents of some images at any rate, one number for each image.

    Args:
        transform: Searches the paths.
        codebook: (K, D) float32.
        tables: Bits of codes and ends.
        unit: () float32, squared distance that counts as 1 in J.
        rows: (N, D) float32, the latents.
        images: B.
    """

    transform: Transform
    codebook: Tensor
    tables: EntropyTables
    unit: Tensor
    rows: Tensor
    images: int

    @property
    def sites(self) -> int:
        """S, sites of an image."""
        return self.rows.shape[0] // max(self.images, 1)

    def walk(self, name: str, value: float | Tensor) -> Walk:
        """Walk at a rate.

        Args:
            name: ``threshold``, ``max_codes``, ``rate`` or ``target_bits``.
            value: One number, or one for each image (B,).

        Raises:
            ValueError: The value is out of range.
        """
        dtype = torch.float32 if isinstance(value, float) else None  # whatever torch's default is
        numbers = expand_per_image(name, torch.as_tensor(value, dtype=dtype), self.images)
        if name == "max_codes":
            return self.within_codes(self.whole_path(), numbers)
        right, what = (numbers >= 0) & numbers.isfinite(), "at least 0 and finite"
        if name == "threshold":
            right, what = numbers >= 0, "a distance of at least 0"
        if checks_values(numbers) and not right.all():
            raise ValueError(f"{name} must be {what}, got {value}")
        if name == "target_bits":
            return self.within_bits(numbers.cpu().double())
        return (self.at_rate if name == "rate" else self.to_threshold)(numbers.to(self.rows))

    def whole_path(self) -> Path:
        """Find the paths through all turns, whatever they cost."""
        return self._search(self.rows.new_zeros(self.rows.shape[0]))

    def to_threshold(self, threshold: Tensor) -> Walk:
        """Walk to the first code within a threshold (B,)."""
        tau = threshold.repeat_interleave(self.sites)
        path = self._search(tau)
        return Walk(path, lengths_within(path.distances, tau), tau, torch.zeros_like(tau))

    def within_codes(self, path: Path, max_codes: Tensor) -> Walk:
        """Cut the whole path at the smallest threshold that gives at most (B,) codes."""
        tau = threshold_for(path.distances, max_codes)
        return Walk(path, lengths_within(path.distances, tau), tau, torch.zeros_like(tau))

    @torch.no_grad()
    def to_quality(self, quality: Callable[[Tensor], Tensor], target: Tensor) -> Walk:
        """Walk with the fewest codes found that reach a quality (B,), of codes (N, T) -> (B,)."""
        path = self.whole_path()  # searched once, then cut to each number of codes

        def reached(max_codes: Tensor) -> Tensor:
            return quality(self.within_codes(path, max_codes).codes)

        sizes = (self.sites, self.tables.max_loops)
        return self.within_codes(path, fewest_codes(reached, target, *sizes))

    def at_rate(self, rate: Tensor) -> Walk:
        """Walk along the codes and to the ends of least J at lambda (B,)."""
        weight = (rate * self.unit).repeat_interleave(self.sites)  # (N,)
        # Without a price, the search is the usual one to the last bit.
        price = Price(self.tables.code_bits(), weight) if bool((rate > 0).any()) else None
        path = self._search(torch.full_like(weight, -1.0), price)  # no distance ends it, J does
        cost = path.distances.square() + weight[:, None] * self._bits_of_ends(path)
        return Walk(path, cost.argmin(dim=1) + 1, torch.full_like(weight, torch.inf), weight)

    def within_bits(self, target: Tensor) -> Walk:
        """Walk at about the smallest lambda that gives at most (B,) float64 bits, on the CPU.

        Bisects log lambda, for all images together, until each has 99.9% of its bits or lambda is
        known to 1%. Bits need not fall with every lambda, but what is returned was
        measured.

        Raises:
            ValueError: The cheapest codes of an image are more.
        """
        walk, bits = self._measure(torch.full_like(target, CHEAPEST))
        if len(over := (bits > target).nonzero()) > 0:
            image = int(over[0])
            raise ValueError(
                f"target_bits {float(target[image])} is less than the {float(bits[image])} bits of "
                f"the cheapest codes for image {image}"
            )
        low, high = (torch.full_like(target, end) for end in LOG2_RATES)
        tried, spent = self._measure(torch.zeros_like(target))
        free = spent <= target  # the bits of the whole path
        walk, bits = tried.where(free, walk), torch.where(free, spent, bits)
        for _ in range(PROBES):
            short = ~free & (bits < 0.999 * target)
            if not short.any():
                break
            middle = (low + high) / 2
            tried, spent = self._measure(middle.exp2())
            fits = spent <= target
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
            better = short & fits  # whatever the other images of the batch still need
            walk, bits = tried.where(better, walk), torch.where(better, spent, bits)
        return walk

    def _measure(self, rate: Tensor) -> tuple[Walk, Tensor]:
        """Walk at lambda (B,); return the bits (B,) too."""
        walk = self.at_rate(rate.to(self.rows))
        codes = walk.codes.reshape(self.images, self.sites, self.tables.max_loops)
        return walk, self.tables.bits_of_images(codes)

    def _search(self, tau: Tensor, price: Price | None = None) -> Path:
        """Find the paths until they are within tau (N,)."""
        turns = self.tables.max_loops
        return self.transform.search(self.rows, self.codebook, tau, turns, price)

    def _bits_of_ends(self, path: Path) -> Tensor:
        """Bits (N, T) of each site, if it ended at each turn."""
        count = len(path.codes)
        ends = torch.arange(1, path.distances.shape[1] + 1, device=path.codes.device)
        return torch.stack([self.tables.bits(path.end_at(n.expand(count))) for n in ends], dim=1)
