"""Evaluation of a trained model: numbers, and the protocol by which they were measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taming.evaluation.examples import Example, grid_of, reconstructions
from taming.evaluation.images import ImageSet, OnError, of_files, of_pictures, of_run
from taming.evaluation.measures import Measure, versions
from taming.evaluation.networks import about_file, all_measures
from taming.evaluation.prior import evaluate_prior
from taming.evaluation.tokenizer import OWN, check_rates, evaluate_tokenizer
from taming.generator import Generator
from taming.models.prior import Prior
from taming.modules.transformer.generate import SamplingParams
from taming.pictures import Picture, is_single
from taming.run.folder import SavedRun
from taming.signatures import naming_nearest
from taming.tokenizer import Tokenizer
from taming.util import at_least, usable_device

Data = Picture | Sequence[Picture] | None
PACKAGES = ("torch", "torchmetrics", "torch-fidelity", "stlpips-pytorch", "loopy-taming")


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        numbers: All numbers and their protocol, as ``docs/evaluation.md`` lists them; of types that
            JSON has.
        examples: Pictures to look at.
    """

    numbers: dict[str, Any]
    examples: list[Example]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the head of a table of all measures, and its rows, as texts."""
        columns: dict[str, Any] = self.numbers.get("rates") or {"value": self.numbers}
        head = ["measure", *(_title(name) for name in columns)]
        rows: list[list[str]] = []
        for block in ("quality", "codes"):
            names = dict.fromkeys(name for c in columns.values() for name in c[block])
            for name in names:
                values = [c[block].get(name) for c in columns.values()]
                rows.append([name, *map(_text, values)])
        return head, rows

    def table(self) -> str:
        """Return the table of `rows` as text, and a line for each measure that lacks pictures."""
        head, rows = self.rows()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            f"{line[0]:<{widths[0]}}"
            + "".join(
                f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)
            )
            for line in [head, *rows]
        ]
        for key, title in (("missing", "not measured"), ("left_out", "left out")):
            lines += [f"{title}: {name}: {why}" for name, why in self.numbers[key].items()]
        if unreadable := self.numbers["unreadable"]:
            lines.append(f"not read: {len(unreadable)} pictures; the first: {unreadable[0]}")
        return "\n".join(lines) + "\n"


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _title(rate: str) -> str:
    return rate if rate in (OWN, "value") else f"{rate} codes"


@naming_nearest(SamplingParams)
def evaluate(
    model: str | Path | Tokenizer | Generator | Prior,
    data: Data = None,
    *,
    codes: Sequence[float] = (),
    generated: int = 0,
    size: int | None = None,
    split: str = "test",
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    examples: int = 0,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    trust_config: bool = False,
    on_error: OnError = "skip",
    pretrained: bool = True,
    **params: Any,
) -> Evaluation:
    """Measure a tokenizer or a prior on images.

    Args:
        model: Run folder or checkpoint; or a model that was loaded.
        data: Folder of images, text file that lists some, Parquet file, name of a data set of the
            hub, ``owner/name``, or pictures of any kind, one or several; None for the validation
            set of the run.
        codes: Mean numbers of codes of a site at which a loopy tokenizer is measured besides its
            own rate, in the same pass.
        generated: Number of pictures that a prior generates, to be compared with the data.
        size: Side of square crops in pixels; None keeps pictures whole, for a prior takes the size
            trained on. Only with the files of a folder, list or Parquet file, or the hub's.
        split: Split of a data set of the hub.
        batch_size: Largest number of pictures of one size that go through the model together.
        device: Device for a model that is not loaded yet.
        examples: Number of the best, median and worst reconstructions each to show.
        seed: Seed of generated pictures.
        tokenizer: Run of a prior's tokenizer, if it is not where it was.
        trust_config: Build whatever the run's configuration names, which may run any code.
        on_error: "skip" pictures that cannot be read and list them, or "raise" an error that names
            the first.
        pretrained: Also measure by pretrained networks (LPIPS, FID and others), whose weights are
            downloaded if they are missing.
        **params: Fields of `SamplingParams` for generated pictures, such as ``top_p``.

    Returns:
        Numbers, protocol and examples.

    Raises:
        FileNotFoundError: There is no such run or data.
        ValueError: The model is neither tokenizer nor prior, or a value does not fit it.

    Example:
        >>> import taming
        >>> result = taming.evaluate("logs/<run>", "photos", codes=[1, 2])  # doctest: +SKIP
        >>> result.numbers["rates"]["2"]["quality"]["PSNR"]  # doctest: +SKIP
    """
    at_least(0, generated=generated, examples=examples)
    at_least(1, size=size, batch_size=batch_size)
    saved: SavedRun | None = None
    loaded: Any = model
    if isinstance(model, str | Path):
        device = usable_device(device)
        saved = SavedRun.load(model, tokenizer=tokenizer, trust_config=trust_config)
        loaded = saved.model().to(device)
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}")
    source = _Source(saved, data, size, batch_size, split, on_error, pretrained)
    if priors := _priors_of(loaded):
        if codes:
            raise ValueError("codes are the rate of a tokenizer, but this is a prior: omit codes")
        numbers, pictures = _of_prior(priors, source, generated, seed, params)
    else:
        if generated or params:
            raise ValueError("only a prior generates pictures, and this is a tokenizer")
        face = loaded if isinstance(loaded, Tokenizer) else Tokenizer(loaded)
        numbers, pictures = _of_tokenizer(face, source, codes, examples)
    about: dict[str, Any] = {"kind": "prior" if priors else "tokenizer"}
    if saved is not None:
        about |= {"run": str(saved.folder)}
        numbers["protocol"]["checkpoint"] = about_file(saved.checkpoint)
    return Evaluation({**about, **numbers}, pictures)


@dataclass(frozen=True)
class _Source:
    """The images that were given, and whether pretrained networks compare them."""

    saved: SavedRun | None
    data: Data
    size: int | None
    batch_size: int
    split: str
    on_error: OnError
    pretrained: bool

    def open(self, key: str, channels: int, side: int | None, classes: int | None) -> ImageSet:
        """Open the images; ``side`` is that of the crops if no size was given."""
        if self.size and not isinstance(self.data, str | Path):
            raise ValueError("size crops the files of a folder, list or Parquet file: give data")
        if isinstance(self.data, str | Path):
            crop = self.size or side
            options = (crop, self.batch_size, classes, self.split, self.on_error)
            return of_files(self.data, key, channels, *options)
        if self.data is not None:
            pictures: Any = [self.data] if is_single(self.data) else self.data
            return of_pictures(pictures, key, channels, self.on_error)
        if self.saved is None:
            raise ValueError("a model that is loaded has no validation set: give data")
        return of_run(self.saved, self.on_error)


def _priors_of(model: Any) -> list[Prior]:
    """Return the priors of a `Generator`, or the prior itself; [] for others."""
    return getattr(model, "priors", None) or ([model] if hasattr(model, "measure_nats") else [])


def _of_prior(
    priors: Sequence[Prior], source: _Source, generated: int, seed: int, params: dict[str, Any]
) -> tuple[dict[str, Any], list[Example]]:
    """Evaluate priors of one model."""
    if params and not generated:
        raise ValueError(f"{', '.join(params)}: of generated pictures, so give generated as well")
    SamplingParams(**params)  # refused before anything is measured if it is wrong
    prior = priors[0]
    stage = prior.first_stage_model
    side = prior.grid[0] * stage.factor
    images = source.open(prior.first_stage_key, stage.channels, side, prior.n_classes)
    measures, missing = [], {}
    if generated:
        measures, missing = all_measures(prior.device, "g", source.pretrained)
    numbers, shown = evaluate_prior(
        priors, images, measures, missing, generated, source.batch_size, seed, **params
    )
    numbers["protocol"] |= _protocol(measures, missing, prior)
    numbers |= {"missing": missing, "unreadable": images.unreadable}
    return numbers, grid_of(shown)


def _of_tokenizer(
    face: Tokenizer, source: _Source, codes: Sequence[float], examples: int
) -> tuple[dict[str, Any], list[Example]]:
    """Evaluate a tokenizer."""
    model = face.model
    rates = check_rates(model, codes)
    images = source.open(model.image_key, model.channels, None, None)
    measures, missing = all_measures(model.device, "r", source.pretrained)
    numbers = evaluate_tokenizer(face, images, measures, missing, rates, source.batch_size)
    crop = f"; extended by reflection to whole sites of {model.factor} pixels, and cut back"
    numbers["protocol"]["crop"] += crop
    numbers["protocol"] |= _protocol(measures, missing, model)
    pictures = reconstructions(face, images, numbers, examples)
    return {**numbers, "missing": missing, "unreadable": images.unreadable}, pictures


def _protocol(measures: Sequence[Measure], missing: dict[str, str], model: Any) -> dict[str, Any]:
    """Return how the numbers were measured, apart from the images."""
    used = {m.name: {**m.about} for m in measures if m.name not in missing}
    return {
        "pixels": "levels 0 to 255, originals and reconstructions rounded alike",
        "reference": "the images themselves, no stored statistics",
        "measures": used,
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "device": str(model.device),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
