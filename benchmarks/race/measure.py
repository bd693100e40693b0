"""Distortion and rate of a trained tokenizer on held-out images.

Axis letters: B images, D channels, h w grid, N latents, S sites, T turns, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from taming.models.vqgan import VQModel
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.vqvae.base import Quantizer
from taming.modules.vqvae.loop import Path
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.modules.vqvae.rate import lengths_within

ROUNDS, PROBES, RATES = 3, 6, (3e-4, 0.1)  # in search of a lambda
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


class Measurement(NamedTuple):
    """Distortion and rate.

    Attributes:
        psnr: PSNR in dB of the mean squared error over all images.
        ssim: Structural similarity.
        tokens: Codes per image; the name is the column's in results that already exist.
        raw_bits: Bits per image, log2 of the vocabulary for each token of the sequence.
        entropy_bits: Bits per image, zero-order entropy of codes and lengths.
        usage: Fraction of the codebook's codes that occur.
    """

    psnr: float
    ssim: float
    tokens: float
    raw_bits: float
    entropy_bits: float
    usage: float


def entropy(values: Tensor) -> float:
    """Return the zero-order entropy of integers (N,), in bits, summed over all of them."""
    counts = values.flatten().bincount().double()
    return float(len(values) * torch.special.entr(counts / counts.sum()).sum() / math.log(2))


def code_bits(codes: Tensor, n_e: int) -> float:
    """Return the zero-order entropy of codes (N, T) in each turn, and of lengths, in bits.

    Bits are summed over all sites. The number of dummies (K) follows from the length, so they
    cost no further bits.
    """
    lengths = (codes >= 0).sum(dim=1)
    turns = [turn[(turn >= 0) & (turn < n_e)] for turn in codes.unbind(1)]
    return entropy(lengths) + sum(entropy(turn) for turn in turns if len(turn) > 0)


@torch.no_grad()
def measure(
    model: VQModel,
    images: Iterable[Tensor],
    quantize: Quantize | None = None,
    sequence: TokenSequence | None = None,
) -> Measurement:
    """Encode and decode images; measure their distortion and rate.

    Args:
        model: A tokenizer in eval mode.
        images: Batches (B, 3, H, W) in [-1, 1] on the model's device.
        quantize: z (B, D, h, w) -> z_q and codes (B, h, w, T); by default the model's own.
        sequence: Notation of the codes; turns beyond its ``max_loops`` are ignored. By default
            the model's own.
    """
    quantize = quantize or own_quantizer(model)
    sequence = sequence or model.quantize.sequence
    psnr = PeakSignalNoiseRatio(data_range=2.0).to(model.device)
    ssim = StructuralSimilarityIndexMeasure(data_range=2.0).to(model.device)
    parts: list[Tensor] = []
    for x in images:
        z_q, codes = quantize(model.encode_to_prequant(x))
        x_rec = model.decode(z_q).clamp(-1, 1)
        psnr.update(x_rec, x)
        ssim.update(x_rec, x)
        parts.append(codes)
    codes = torch.cat(parts)
    count, rows = len(codes), codes.flatten(0, 2)
    turns = sequence.max_loops
    length = sum(float(sequence.encode(part[..., :turns])[1].sum()) for part in parts)
    return Measurement(
        float(psnr.compute()),
        torch.as_tensor(ssim.compute()).item(),
        float((rows >= 0).sum()) / count,
        length * math.log2(sequence.vocab_size) / count,
        code_bits(rows, model.quantize.n_e) / count,
        usage(rows, model.quantize),
    )


def usage(codes: Tensor, quantizer: Quantizer) -> float:
    """Return the fraction of the codes of all codebooks that occur among codes (N, T)."""
    found = [part[(part >= 0) & (part < quantizer.n_e)].unique() for part in codes.unbind(1)]
    if quantizer.codebooks == 1:
        found = [torch.cat(found).unique()]
    return sum(map(len, found)) / (len(found) * quantizer.n_e)


def own_quantizer(model: VQModel) -> Quantize:
    """Return the model's own quantization."""

    def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
        out = model.quantize(z)
        return out.z_q, out.info.indices.reshape(len(z), *z.shape[2:], -1)

    return quantize


def cut_by(model: VQModel, lengths_of: Callable[[Path, int], Tensor]) -> Quantize:
    """Return a quantization with lengths ``lengths_of(path, images) -> (N,)``, for controls."""
    quantizer = model.quantize
    assert isinstance(quantizer, LoopyVectorQuantizer)

    def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
        path = quantizer.whole_path(z)
        codes = path.end_at(lengths_of(path, len(z)))
        codes = codes.reshape(len(z), *z.shape[2:], -1)
        return quantizer.get_codebook_entry(codes), codes

    return quantize


def shuffled_lengths(threshold: Tensor) -> Callable[[Path, int], Tensor]:
    """Return lengths by a threshold, shuffled among the sites of each image."""
    generator = torch.Generator().manual_seed(0)

    def lengths(path: Path, images: int) -> Tensor:
        own = lengths_within(path.distances, threshold.expand(len(path.distances)))
        own = own.reshape(images, -1)
        order = torch.rand(own.shape, generator=generator).argsort(dim=1).to(own.device)
        return own.gather(1, order).flatten()

    return lengths


def fixed_length(turns: int) -> Callable[[Path, int], Tensor]:
    """Return the same length for all sites."""
    return lambda path, images: torch.full(
        (len(path.distances),), turns, device=path.distances.device
    )


@torch.no_grad()
def threshold_for_mean(model: VQModel, images: Iterable[Tensor], length: float) -> Tensor:
    """Find the threshold at which the mean length of a site is ``length``.

    Lengths fall with the threshold, so bisection on its logarithm finds it.
    """
    assert isinstance(model.quantize, LoopyVectorQuantizer)
    paths = [model.quantize.whole_path(model.encode_to_prequant(x)).distances for x in images]
    distances = torch.cat(paths)
    low, high = 1e-6 * distances.max(), distances.max()
    for _ in range(40):
        middle = (low * high).sqrt()
        if lengths_within(distances, middle.expand(len(distances))).float().mean() > length:
            low = middle
        else:
            high = middle
    return high


@torch.no_grad()
def set_rate_for_mean(model: VQModel, images: Sequence[Tensor], length: float) -> None:
    """Set the lambda at which the mean length of a site is ``length``, and count its tables.

    Lengths fall with lambda, so bisection on its logarithm finds it. Tables and lambda depend on
    each other; after a few rounds they hardly move.
    """
    quantizer = model.quantize
    assert isinstance(quantizer, LoopyVectorQuantizer)
    latents = torch.cat([model.encode_to_prequant(x) for x in images])
    for _ in range(ROUNDS):
        low, high = RATES
        for _ in range(PROBES):
            quantizer.rate = math.sqrt(low * high)
            codes = quantizer(latents).info.indices
            if (codes >= 0).sum() > length * codes[..., 0].numel():
                low = quantizer.rate
            else:
                high = quantizer.rate
        quantizer.entropy.count(codes)
