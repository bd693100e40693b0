"""Evaluation of a prior: bits of images, and how near generated pictures are to them.

Axis letters: B images, C channels, H W image, N images of a set, d features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from taming.decoding import pil_to_tensor
from taming.evaluation.images import Digest, ImageSet
from taming.evaluation.measures import (
    TOO_FEW,
    FrechetDistance,
    Look,
    Measure,
    precision_and_recall,
)
from taming.generator import Generator
from taming.models.prior import Prior, is_cached
from taming.pictures import to_levels

SHOWN = 16  # generated pictures that are kept to be looked at


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch to a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class Features:
    """Features of a set of pictures in each network, in the order of arrival."""

    def __init__(self, measures: Sequence[Measure], missing: dict[str, str]) -> None:
        self.measures, self.missing, self.look = measures, missing, Look(measures)
        self.found: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, levels: Tensor) -> None:
        """Add pictures (B, C, H, W) uint8."""
        seen = self.look(levels)
        for measure in self.measures:
            if measure.vectors and measure.name in seen:
                vectors = measure.vectors(seen[measure.name]).cpu()
                self.found.setdefault(measure.name, []).append(vectors)

    def of(self, measure: Measure) -> Tensor | None:
        """Return the features (N, d) in a measure's network; None if there are none."""
        found = self.found.get(measure.name)
        return torch.cat(found) if found else None


def compare_sets(generated: Features, real: Features) -> dict[str, float]:
    """Return Frechet distance, precision and recall in each network, by name."""
    numbers: dict[str, float] = {}
    for measure in real.measures:
        made, given = generated.of(measure), real.of(measure)
        if made is None or given is None:
            continue
        distance = FrechetDistance()
        distance.update(given, real=True)
        distance.update(made, real=False)
        if (value := distance.compute()) is None:
            real.missing[measure.distance] = TOO_FEW
        else:
            numbers[measure.distance] = value
        names = [f"{name} ({measure.about['network']})" for name in ("precision", "recall")]
        try:
            numbers |= dict(zip(names, precision_and_recall(made, given), strict=True))
        except ValueError as error:
            real.missing[", ".join(names)] = str(error)
    return numbers


@torch.no_grad()
def measure_bits(priors: Sequence[Prior], batch: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return tokens, raw bits, bits and pixels of each image of a batch, all levels together."""
    found: dict[str, list[float]] = {}
    for prior in priors:
        seen = prior.tokenize_batch(batch)
        nats, lengths = (value.cpu() for value in prior.measure_nats(seen))  # (B,) each
        raw = lengths.double() * math.log2(prior.sequence.vocab_size)
        own = {"tokens": lengths, "raw_bits": raw, "bits": nats.double() / math.log(2)}
        for name, values in own.items():
            before = found.get(name) or [0] * len(nats)
            found[name] = [a + b for a, b in zip(before, values.tolist(), strict=True)]
        found["pixels"] = [seen.pixels] * len(nats)
    return found


def cost_of(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Summarize `measure_bits` of all images: means by name."""
    images, bits, tokens = len(found["bits"]), math.fsum(found["bits"]), sum(found["tokens"])
    return {
        "tokens_per_image": tokens / images,
        "raw_bits_per_image": math.fsum(found["raw_bits"]) / images,
        "bits_per_image": bits / images,
        "bits_per_token": bits / tokens,
        "bits_per_pixel": bits / sum(found["pixels"]),
    }


def sampled(generator: Generator, number: int, seed: int, params: dict[str, Any]) -> Iterator[Any]:
    """Yield lists of generated pictures, ``number`` in all, the classes in turn if there are any.

    Picture i is the same for any batch size, up to rounding.
    """
    classes = generator.model.n_classes
    batch = generator.batch_size
    for start in tqdm(range(0, number, batch), desc="generate", unit="batch"):
        count = min(batch, number - start)
        if generator.model.be_unconditional:
            yield generator.sample(count, seed=seed, first=start, **params)
        else:
            labels = [(start + i) % (classes or 1) for i in range(count)]
            yield generator.sample(1, labels, seed=seed, first=start, **params)


def evaluate_prior(
    priors: Sequence[Prior],
    images: ImageSet,
    measures: Sequence[Measure],
    missing: dict[str, str],
    generated: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    **params: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """Measure bits of images, and generated pictures against them.

    Args:
        priors: The prior, or those of all levels of a VQ-VAE-2, the top's first; they are switched
            to evaluation mode.
        images: The images, with what the prior takes as its condition.
        measures: Networks in which sets are compared.
        missing: Name -> why a measure is not there; measures that images rule out are added.
        generated: Number of pictures to generate; 0 for none.
        batch_size: Pictures generated together.
        seed: Seed of the generated pictures.
        **params: Fields of `SamplingParams`.

    Returns:
        ``protocol`` of the images, ``codes``, ``quality``, ``left_out`` as of `Look`, and
        ``per_image``; and the first generated pictures, PIL images.

    Raises:
        ValueError: The images lack what the prior needs, or nothing can be generated from it.
    """
    for prior in priors:
        prior.eval()
    several = priors if len(priors) > 1 else priors[0]
    generator = Generator(several, batch_size) if generated else None
    digest, real = Digest(), Features(measures if generated else [], missing)
    found: dict[str, list[float]] = {}
    bar = tqdm(total=images.length, desc="evaluate", unit="image")
    key, device = priors[0].first_stage_key, priors[0].device
    for batch in images.batches():
        for name, values in measure_bits(priors, _on(device, batch)).items():
            found.setdefault(name, []).extend(values)
        if not is_cached(batch):
            levels = to_levels(priors[0].get_input(key, batch))
            digest.update(levels)
            real.update(levels.to(device))
        elif generated:
            raise ValueError("a token cache has no pictures to compare with: name some by data")
        bar.update(len(found["bits"]) - bar.n)
    bar.close()
    if not found:
        raise ValueError("there are no images to evaluate on")
    protocol = {
        "unreadable": len(images.unreadable),
        **images.about,
        **(digest.about() if len(digest) else {"images": len(found["bits"])}),
    }
    numbers: dict[str, Any] = {"protocol": protocol, "codes": cost_of(found), "quality": {}}
    numbers["left_out"] = real.look.left_out(missing)
    numbers["per_image"] = {name: found[name] for name in ("tokens", "bits")}
    shown: list[Any] = []
    if generator is not None:
        made = Features(measures, missing)
        for pictures in sampled(generator, generated, seed, params):
            made.update(torch.stack([pil_to_tensor(p) for p in pictures]).to(device))
            shown += pictures[: max(SHOWN - len(shown), 0)]
        numbers["left_out"] |= made.look.left_out(missing)
        numbers["quality"] = compare_sets(made, real)
        protocol["generated"] = {"pictures": generated, "seed": seed, **params}
    return numbers, shown
