"""Walks: paths of latents through the loop, and where they end under each kind of rate.

A threshold, or a number of codes, cuts a path that does not depend on it. A rate lambda chooses the
codes too: those of least

    J = |z - z_q|^2 / latent_std^2 + lambda bits

where z_q is that before a depth embedding. A turn takes the code of least J so far, a beam keeps
the paths of least J, and a site ends at the turn whose whole J is least.

Axis letters: B images, S sites of an image, N = B S latents, T turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    lengths_within,
    sample_budgets,
    sample_rates,
    threshold_for,
)

LOG2_RATES, PROBES = (-20.0, 12.0), 12  # of lambda, beyond all that is of use; to half a percent
CHEAPEST = 2.0**40  # a lambda by which distances no longer count
Rate = float | Tensor | None  # one number for all images, or one for each (B,)
Search = Callable[[Tensor, Price | None], Path]  # thresholds (N,), price of codes -> path


def check_rates(names: Sequence[str], transform: Transform) -> None:
    """Refuse several rates at once, and those by bits where a length changes no distance."""
    if len(names) > 1:
        raise ValueError(
            "give a threshold or max_codes or rate or target_bits, not several: "
            f"{' and '.join(names)}"
        )
    if transform.dummies and {*names} & {"rate", "target_bits", "rate_range"}:
        raise ValueError(
            f"{type(transform).__name__} decodes a site to its last code alone, so more turns do "
            f"not bring it nearer: {names[0]} has no meaning"
        )


class Walk(NamedTuple):
    """Paths of latents, and where they end.

    Attributes:
        path: The `Path`.
        lengths: (N,) int64 in [1, T], turns of each site.
        threshold: (N,) float32, distance that ends a loop; inf where J decides.
    """

    path: Path
    lengths: Tensor
    threshold: Tensor

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
        return Walk(path, lengths, torch.where(sites, self.threshold, other.threshold))


@dataclass(frozen=True)
class Walker:
    """Walks the latents of some images at any rate, one number for each image.

    Args:
        search: Walks them to thresholds (N,), at a price of codes or none.
        tables: Bits of codes and ends.
        images: B.
        sites: S.
        unit: () float32, squared distance that counts as 1 in J.
    """

    search: Search
    tables: EntropyTables
    images: int
    sites: int
    unit: Tensor

    def walk(self, name: str, value: Rate, path: Path | None = None) -> Walk:
        """Walk at a rate, one number or one for each image.

        Args:
            name: ``threshold``, ``max_codes``, ``rate`` or ``target_bits``.
            value: The rate.
            path: The path, if it is known; for ``max_codes``.

        Raises:
            ValueError: The value is out of range.
        """
        numbers = expand_per_image(name, torch.as_tensor(value), self.images)
        if name == "max_codes":
            return self.within_codes(numbers, path)
        if checks_values(numbers) and not (numbers >= 0).all():
            what = "a distance of at least 0" if name == "threshold" else "at least 0"
            raise ValueError(f"{name} must be {what}, got {value}")
        if name == "target_bits":
            return self.within_bits(numbers.cpu().double())
        return (self.at_rate if name == "rate" else self.to_threshold)(numbers.to(self.unit))

    def sample(
        self, length_range: tuple[float, float] | None, rate_range: tuple[float, float] | None
    ) -> dict[str, Tensor]:
        """Sample a rate for each image in training; {} without a range."""
        if length_range:
            budgets = sample_budgets(self.images, self.sites, length_range, self.unit.device)
            return {"max_codes": budgets}
        return (
            {"rate": sample_rates(self.images, rate_range, self.unit.device)} if rate_range else {}
        )

    def to_threshold(self, threshold: Tensor) -> Walk:
        """Walk to the first code within a threshold (B,)."""
        tau = threshold.repeat_interleave(self.sites)
        path = self.search(tau, None)
        return Walk(path, lengths_within(path.distances, tau), tau)

    def within_codes(self, max_codes: Tensor, path: Path | None = None) -> Walk:
        """Walk to the smallest threshold that gives at most (B,) codes; the path may be known."""
        if path is None:
            path = self.search(self.unit.new_zeros(self.images * self.sites), None)
        tau = threshold_for(path.distances, max_codes)
        return Walk(path, lengths_within(path.distances, tau), tau)

    def at_rate(self, rate: Tensor) -> Walk:
        """Walk along the codes and to the ends of least J at lambda (B,)."""
        weight = (rate * self.unit).repeat_interleave(self.sites)  # (N,)
        # Without a price, the search is the usual one to the last bit.
        price = Price(self.tables.code_bits(), weight) if bool((rate > 0).any()) else None
        path = self.search(torch.zeros_like(weight), price)
        cost = path.distances.square() + weight[:, None] * self._bits_of_ends(path)
        return Walk(path, cost.argmin(dim=1) + 1, torch.full_like(weight, torch.inf))

    def within_bits(self, target: Tensor) -> Walk:
        """Walk at about the smallest lambda that gives at most (B,) float64 bits, on the CPU.

        Bisects log lambda, for all images together, until each has 99.9% of its bits or lambda is
        known to half a percent. Bits need not fall with every lambda, but what is returned was
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
        free = spent <= target  # all that its turns can say
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
        walk = self.at_rate(rate.to(self.unit))
        codes = walk.codes.reshape(self.images, self.sites, self.tables.max_loops)
        return walk, self.tables.bits_of_images(codes)

    def _bits_of_ends(self, path: Path) -> Tensor:
        """Bits (N, T) of each site, if it ended at each turn."""
        count = len(path.codes)
        ends = torch.arange(1, path.distances.shape[1] + 1, device=path.codes.device)
        return torch.stack([self.tables.bits(path.end_at(n.expand(count))) for n in ends], dim=1)
