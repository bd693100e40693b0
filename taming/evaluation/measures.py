"""Measures of pictures and of sets of pictures; torchmetrics and torch-fidelity compute them.

Axis letters: B images, C channels, H W image, N images of a set, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from taming.extras import naming_extras

EXACT = 100.0  # dB, the largest PSNR reported: JSON has no infinity
LEAST_SIDE = 176  # of a picture with an MS-SSIM: at the last of five scales, a window of 11 pixels
NEIGHBOURS = 3  # of precision and recall
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, the finest first
_REACH = 5  # of a window, from its middle
_PIXELS = 1 << 20  # seen together
TOO_FEW = "needs at least two pictures of each set"


@dataclass(frozen=True)
class Measure:
    """A way to look at pictures, and to compare two of them or two sets by what is seen.

    Attributes:
        name: Name of the comparison of two pictures; of a mere feature network, its own.
        about: Tool, network and file, for the protocol.
        see: (B, C, H, W) uint8 -> whatever the other functions take.
        compare: Seen of originals and of others -> (B,); None for a network that compares no two.
        vectors: Seen -> (B, d) features of each picture; None where sets are not compared.
        distance: Name of the Frechet distance of sets.
        least: Smallest side in pixels of a picture that can be seen.
        channels: Numbers of channels that can be seen; () for any.
    """

    name: str
    about: Mapping[str, Any]
    see: Callable[[Tensor], Any]
    compare: Callable[[Any, Any], Tensor] | None = None
    vectors: Callable[[Any], Tensor] | None = None
    distance: str = ""
    least: int = 1
    channels: tuple[int, ...] = ()

    def refusal(self, shape: Sequence[int]) -> str:
        """Say why pictures (B, C, H, W) cannot be seen; "" if they can."""
        channels, *sides = shape[1:]
        if self.channels and channels not in self.channels:
            return f"takes pictures of {' or '.join(map(str, self.channels))} channels"
        if min(sides) < self.least:
            smallest = f"{sides[1]}x{sides[0]}"
            return f"takes pictures of at least {self.least} pixels a side; one has {smallest}"
        return ""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each of the packages that are installed."""
    found: dict[str, str] = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def tool(package: str) -> str:
    """Return name and version of a package; of one that was not installed, the name alone."""
    return " ".join([package, *versions([package]).values()])


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    found = peak_signal_noise_ratio(y, x, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=EXACT)


def _in_bands(compare: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Average a comparison (B,) of windows that lie inside of images, some rows at a time.

    A similarity takes some hundred times the memory of the pixels that it sees together.
    """
    inner, most = x.shape[2] - 2 * _REACH, max(_PIXELS // x.shape[3], 1)
    total = x.new_zeros(len(x))
    for top in range(0, inner, most):
        rows = min(most, inner - top)
        band = slice(top, top + rows + 2 * _REACH)
        total += compare(x[:, :, band], y[:, :, band]) * rows
    return total / inner


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    def inside(x: Tensor, y: Tensor) -> Tensor:
        options: Any = {"data_range": 255.0, "return_full_image": True}
        image = structural_similarity_index_measure(y, x, **options)[1]
        return image[:, :, _REACH:-_REACH, _REACH:-_REACH].mean(dim=(1, 2, 3))

    return _in_bands(inside, *(F.pad(t, 4 * [_REACH], mode="reflect") for t in (x, y)))


def ms_ssim(x: Tensor, y: Tensor, data_range: float = 255.0) -> Tensor:
    """Compute MS-SSIM (Wang et al. 2003) as torchmetrics does, in bounded memory.

    Args:
        x: (B, C, H, W), of at least 176 pixels a side.
        y: The same.
        data_range: Difference of the largest and the smallest value.

    Returns:
        (B,) in [0, 1].
    """

    def contrast(x: Tensor, y: Tensor) -> Tensor:
        options: Any = {"data_range": data_range, "return_contrast_sensitivity": True}
        return structural_similarity_index_measure(y, x, reduction="none", **options)[1]

    found = x.new_ones(len(x))
    for weight in _SCALES[:-1]:
        found = found * _in_bands(contrast, x, y).relu() ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    last = structural_similarity_index_measure(y, x, data_range=data_range, reduction="none")
    return found * last.reshape(len(x)).relu() ** _SCALES[-1]  # type: ignore[union-attr]


def pixel_measures() -> list[Measure]:
    """Return PSNR in dB, SSIM and MS-SSIM, of pictures in levels of 0 to 255."""
    about = {"tool": tool("torchmetrics"), "data_range": 255}
    window = {**about, "window": "Gaussian of 11 pixels, sigma 1.5"}
    return [
        Measure("PSNR", about | {"largest": EXACT}, Tensor.float, _psnr),
        Measure("SSIM", window, Tensor.float, _ssim, least=11),
        Measure("MS-SSIM", window | {"scales": 5}, Tensor.float, ms_ssim, least=LEAST_SIDE),
    ]


class _Given(nn.Module):
    """The feature network of a torchmetrics distance whose features are computed elsewhere."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, d) as they are."""
        return x


class FrechetDistance:
    """Frechet distance of two sets of features, summed in float64 over batches."""

    def __init__(self) -> None:
        self.metric: FrechetInceptionDistance | None = None

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (B, d) of the reference (real) or of the other set."""
        if self.metric is None:
            given = _Given(features.shape[1])
            self.metric = FrechetInceptionDistance(given)  # on the CPU: float64 is not everywhere
        self.metric.update(features.detach().cpu().double(), real=real)

    def compute(self) -> float | None:
        """Return the distance, at least 0; None if a set has fewer than two pictures."""
        metric: Any = self.metric
        if (
            metric is None
            or min(int(metric.real_features_num_samples), int(metric.fake_features_num_samples)) < 2
        ):
            return None
        return max(float(metric.compute()), 0.0)  # rounding may pass 0


def precision_and_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    Args:
        generated: (N, d) features.
        real: (N', d) features.

    Raises:
        ValueError: torch-fidelity is not installed, or a set has too few pictures.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} pictures of each set")
    with naming_extras():
        from torch_fidelity.metric_prc import prc_features_to_metric as prc
    found = prc(
        generated.double(),
        real.double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


@dataclass
class Comparison:
    """Sums of one set of pictures against the originals: of reconstructions at one rate.

    Attributes:
        measures: The measures.
        missing: Name -> why a measure is not there; shared by all comparisons.
        values: Name -> value of each picture in the order of ``positions``, None where the measure
            cannot see it.
        positions: Number of each picture in the data.
    """

    measures: Sequence[Measure]
    missing: dict[str, str]
    values: dict[str, list[float | None]] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    distances: dict[str, FrechetDistance] = field(default_factory=dict)

    def update(self, positions: Sequence[int], levels: Tensor, seen: Mapping[str, Any]) -> None:
        """Add pictures (B, C, H, W) uint8; ``seen`` is what `look` returned for the originals."""
        self.positions += positions
        for measure in self.measures:
            if measure.name not in seen:
                self.values.setdefault(measure.name, []).extend([None] * len(levels))
                continue
            found = measure.see(levels)
            if measure.compare:
                values = measure.compare(seen[measure.name], found).flatten().tolist()
                self.values.setdefault(measure.name, []).extend(values)
            if measure.vectors:
                distance = self.distances.setdefault(measure.distance, FrechetDistance())
                distance.update(measure.vectors(seen[measure.name]), real=True)
                distance.update(measure.vectors(found), real=False)

    def per_image(self) -> dict[str, list[float | None]]:
        """Return the values of each picture in the order of the data, by measure."""
        order = sorted(range(len(self.positions)), key=self.positions.__getitem__)
        some = {name: v for name, v in self.values.items() if any(x is not None for x in v)}
        return {name: [values[i] for i in order] for name, values in some.items()}

    def compute(self) -> dict[str, float]:
        """Return means over the pictures that a measure sees, and Frechet distances of sets."""
        means: dict[str, float] = {}
        for name, values in self.per_image().items():
            seen = [value for value in values if value is not None]
            means[name] = torch.tensor(seen).double().mean().item()
        for measure in self.measures:
            if measure.distance not in self.distances:
                continue
            if (value := self.distances[measure.distance].compute()) is None:
                self.missing[measure.distance] = TOO_FEW
            else:
                means[measure.distance] = value
        return means


class Look:
    """Sees the originals once for all comparisons, and counts what measures cannot see.

    Args:
        measures: The measures.
    """

    def __init__(self, measures: Sequence[Measure]) -> None:
        self.measures = measures
        self._pictures = 0
        self._refused: dict[str, list[str]] = {}  # name -> the reason for each picture left out

    def __call__(self, levels: Tensor) -> dict[str, Any]:
        """Return what each measure that can sees of originals (B, C, H, W) uint8, by name."""
        self._pictures += len(levels)
        seen: dict[str, Any] = {}
        for measure in self.measures:
            if why := measure.refusal(levels.shape):
                self._refused.setdefault(measure.name, []).extend([why] * len(levels))
            else:
                seen[measure.name] = measure.see(levels)
        return seen

    def left_out(self, missing: dict[str, str]) -> dict[str, str]:
        """Return how many pictures a measure could not see, and why not the first, by name.

        Args:
            missing: Name -> why a measure is not there; those that saw no picture are added.
        """
        parts: dict[str, str] = {}
        for name, reasons in self._refused.items():
            if len(reasons) == self._pictures:
                missing[name] = reasons[0]
            else:
                parts[name] = f"{len(reasons)} of {self._pictures} pictures; it {reasons[0]}"
        return parts
