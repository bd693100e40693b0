"""Evaluation of a tokenizer: quality of reconstructions, and what their codes cost.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, T turns, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from taming.evaluation.images import Digest, ImageSet, by_shape
from taming.evaluation.measures import Comparison, Look, Measure
from taming.models.vqgan import VQModel
from taming.pictures import from_levels, pad, to_levels
from taming.tokenizer import Tokenizer

OWN = "own"  # name of the rate that the tokenizer has without being asked for one


@dataclass
class Cost:
    """Codes, tokens and bits of images at one rate.

    Attributes:
        model: The tokenizer.
        tokens: Tokens of each image, all levels together, in the order of arrival.
        bits: log2 of the vocabulary for each token of an image.
        pixels: H W of all images together.
    """

    model: VQModel
    tokens: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    pixels: int = 0

    def __post_init__(self) -> None:
        self.codebook = self.model.quantize.codebook_metrics().to(self.model.device)

    def update(self, z: Tensor, quantized: Any, pixels: int) -> None:
        """Add images: latents (B, D, h, w), the quantizer's output, H W of an image."""
        self.codebook.update(z, quantized)
        self.pixels += len(z) * pixels
        tokens = torch.zeros(len(z), dtype=torch.int64)
        bits = torch.zeros(len(z), dtype=torch.float64)
        for level, codes in self.model.codes_by_level(quantized).items():  # (B, h, w, T)
            sequence = self.model.levels[level].sequence
            lengths = sequence.encode(codes)[1].cpu()  # (B,)
            tokens += lengths
            bits += lengths * math.log2(sequence.vocab_size)
        self.tokens += tokens.tolist()
        self.bits += bits.tolist()

    def compute(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Return numbers by name, and histograms of codes and lengths."""
        found = self.codebook.compute()
        histograms = {name: v.tolist() for name, v in found.items() if v.ndim == 1}
        numbers = {name: float(value) for name, value in found.items() if value.ndim == 0}
        bits = math.fsum(self.bits)
        numbers["tokens_per_image"] = sum(self.tokens) / len(self.tokens)
        numbers["bits_per_image"] = bits / len(self.bits)
        numbers["bits_per_pixel"] = bits / self.pixels
        return numbers, histograms


def quantize_at(model: VQModel, z: Tensor, codes: Sequence[float]) -> Iterator[tuple[str, Any]]:
    """Quantize latents at several rates.

    Args:
        model: The tokenizer.
        z: (B, D, h, w).
        codes: Mean numbers of codes of a site; each image keeps to each.

    Yields:
        Name of a rate, and the quantizer's output: first as it is by itself.
    """
    quantizer: Any = model.quantize
    yield OWN, quantizer(z)
    for rate in codes:
        yield f"{rate:g}", quantizer(z, max_codes=math.floor(rate * z[0, 0].numel() + 1e-6))


def check_rates(model: VQModel, codes: Sequence[float]) -> list[float]:
    """Return the mean numbers of codes of a site, sorted, each once.

    Raises:
        ValueError: The tokenizer has a fixed rate, or cannot have such a one.
    """
    if codes and not model.quantize.variable_rate:
        raise ValueError(f"{type(model.quantize).__name__} has a fixed rate: omit codes")
    most = model.quantize.sequence.max_loops if codes else 1
    for rate in codes:
        if not 1 <= rate <= most:  # nor nan
            raise ValueError(f"codes must be mean numbers of codes in [1, {most}], got {rate:g}")
    return sorted(set(codes))


@torch.no_grad()
def reconstruct(
    model: VQModel, x: Tensor, codes: Sequence[float]
) -> Iterator[tuple[str, Tensor, Any, Tensor]]:
    """Encode images of one size once, and decode them at each rate.

    Args:
        model: The tokenizer, in eval mode.
        x: (B, C, H, W) in [-1, 1], of any size: it is extended to whole sites and cut back.
        codes: As for `quantize_at`.

    Yields:
        Name of the rate, latents, the quantizer's output, and levels (B, C, H, W) uint8.
    """
    height, width = x.shape[2:]
    padded = torch.stack([pad(image, model.factor) for image in x])
    z = model.encode_to_prequant(padded.to(next(model.parameters())))  # (B, D, h, w)
    for name, quantized in quantize_at(model, z, codes):
        x_rec = model.as_input(model.decode(quantized.z_q))
        yield name, z, quantized, to_levels(x_rec[..., :height, :width])


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    images: ImageSet,
    measures: Sequence[Measure],
    missing: dict[str, str],
    codes: Sequence[float] = (),
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measure reconstructions and codes of images, at several rates in one pass.

    Args:
        tokenizer: The tokenizer.
        images: The images.
        measures: What to measure of reconstructions.
        missing: Name -> why a measure is not there; measures that images rule out are added.
        codes: Mean numbers of codes of a site.
        batch_size: Largest number of images of one size that go through the model together.

    Returns:
        ``protocol`` of the images, ``images`` (their names), ``left_out`` as of `Look`, and
        ``rates``: name -> ``quality``, ``codes``, ``histograms`` and ``per_image``.
    """
    model, digest, look = tokenizer.model, Digest(), Look(measures)
    costs: dict[str, Cost] = {}
    comparisons: dict[str, Comparison] = {}
    named: dict[int, str] = {}
    bar = tqdm(total=images.length, desc="evaluate", unit="image")
    stream = images.images(model.image_key)
    for positions, names, image in by_shape(stream, batch_size):
        levels = to_levels(image)
        digest.update(levels)
        named |= dict(zip(positions, names, strict=True))
        seen = look(levels.to(model.device))
        for rate, z, quantized, x_rec in reconstruct(model, from_levels(levels), codes):
            cost = costs.setdefault(rate, Cost(model))
            cost.update(z, quantized, levels[0, 0].numel())
            comparison = comparisons.setdefault(rate, Comparison(measures, missing))
            comparison.update(positions, x_rec, seen)
        bar.update(len(positions))
    bar.close()
    if not named:
        raise ValueError("there are no images to evaluate on")
    left_out = look.left_out(missing)
    rates = {rate: _numbers(costs[rate], comparisons[rate]) for rate in costs}
    own = model.quantize.tracked_scalars()
    rates[OWN]["codes"] |= {name: float(value) for name, value in own.items()}
    return {
        "protocol": {"unreadable": len(images.unreadable), **images.about, **digest.about()},
        "rates": rates,
        "left_out": left_out,
        "images": [named[position] for position in sorted(named)],
    }


def _numbers(cost: Cost, comparison: Comparison) -> dict[str, Any]:
    numbers, histograms = cost.compute()
    per_image: dict[str, list[Any]] = {**comparison.per_image()}
    order = sorted(range(len(cost.tokens)), key=comparison.positions.__getitem__)
    per_image["tokens"] = [cost.tokens[i] for i in order]
    per_image["bits"] = [cost.bits[i] for i in order]
    quality = comparison.compute()
    return {"quality": quality, "codes": numbers, "histograms": histograms, "per_image": per_image}
