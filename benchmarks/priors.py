"""Compare priors by the bits of an image's tokens and by the quality of their samples.

Trains a loopy tokenizer on CIFAR-10 (8 x 8 sites, two turns on average), then class-conditional
priors over its tokens, and reports

- bits per held-out image, lengths included, and those of counted frequencies for comparison;
- the fraction of each prior's samples that a classifier, trained on real images, assigns to the
  intended class, and their Frechet distance to reconstructions in the classifier's features
  (comparable only among these priors);
- the fraction of known sites whose codes a completion changes, and the PSNR of its known pixels
  against reconstructions.

Trained models are kept in the folder of results and reused. All priors train for the same number of
steps, which take different times; the table has the minutes.

python benchmarks/priors.py --quick --train train.parquet --test test.parquet
python benchmarks/priors.py --standard --only unary two-level pixelcnn
python benchmarks/priors.py --full --precision bf16-mixed
"""

from __future__ import annotations

import json
import logging
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from race.classifier import Classifier, Judgement, judge, labelled, trained_classifier
from race.drawing import complete, sample
from race.folder import claim
from race.measure import threshold_for_mean
from race.networks import HIDDEN, NAMES, OrderZero, build_prior
from race.plans import PLANS, Plan, images_of
from race.training import bits_per_image, first, fit, last, loader, trained_tokenizer
from torch import Tensor

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import VQModel
from taming.modules.util import count_params
from taming.run.cli import run, script_parser

logger = logging.getLogger("taming.benchmark")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes and durations of a comparison.

    Attributes:
        tokenizer: Plan of the tokenizer, from the race of tokenizers.
        networks: Network name -> its parameters, as for `build_prior`.
        steps: Training steps of a prior.
        batch_size: Images per step.
        learning_rate: Learning rate of the transformers and the PixelCNN.
        classifier_steps: Training steps of the classifier.
        samples: Number of images to sample from each prior.
        completions: Number of held-out images to complete.
    """

    tokenizer: Plan
    networks: dict[str, dict[str, Any]]
    steps: int
    batch_size: int
    learning_rate: float
    classifier_steps: int
    samples: int
    completions: int


SMALL = {
    "main": {"n_layer": 2, "n_head": 4, "n_embd": 96},
    "depth": {"n_layer": 1, "n_head": 4, "n_embd": 96},
    "pixelcnn": {"channels": 64, "layers": 4, "kernel_size": 3},
}
MEDIUM = {
    "main": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "depth": {"n_layer": 2, "n_head": 4, "n_embd": 96},
    "pixelcnn": {"channels": 96, "layers": 6, "kernel_size": 3},
}
LARGE = {
    "main": {"n_layer": 6, "n_head": 8, "n_embd": 256, "resid_pdrop": 0.1},
    "depth": {"n_layer": 2, "n_head": 4, "n_embd": 128, "resid_pdrop": 0.1},
    "pixelcnn": {"channels": 128, "layers": 10, "kernel_size": 3, "dropout": 0.1},
}
SIZES = {  # quick: minutes in all; standard: half an hour per prior on a CPU core; full: a GPU
    "quick": Sizes(replace(PLANS["quick"], steps=200), SMALL, 60, 32, 2e-3, 150, 200, 20),
    "standard": Sizes(PLANS["standard"], MEDIUM, 1800, 32, 2e-3, 1500, 10_000, 200),
    "full": Sizes(PLANS["standard"], LARGE, 20_000, 128, 1e-3, 10_000, 10_000, 200),
}


def open_images(sizes: Sizes, options: Namespace) -> tuple[Any, Any]:
    """Open the training images and the held-out images to measure."""
    side = sizes.tokenizer.ddconfig["resolution"]
    train = images_of(options.train, "train", side, train=True)
    test = images_of(options.test, "test", side, train=False)
    return train, last(test, sizes.tokenizer.test_images)


def tokenizer_of(sizes: Sizes, train: Any, options: Namespace) -> VQModel:
    """Train the tokenizer and set it to two turns per site on average."""
    plan = sizes.tokenizer
    contender = plan.contenders()["loopy-2"]
    model = trained_tokenizer(plan, contender, 0, train, options.outdir, options.precision)
    side = plan.ddconfig["resolution"]
    still = first(images_of(options.train, "train", side, train=False), plan.calibration_images)
    images = [model.get_input(b, "image").to(model.device) for b in loader(still, 100)]
    model.quantize.threshold = threshold_for_mean(model, images, 2.0)
    return model


def trained_prior(
    name: str, sizes: Sizes, tokenizer: VQModel, train: Any, options: Namespace
) -> tuple[Any, float]:
    """Train a prior, or load an earlier result; return it and the minutes of training."""
    pl.seed_everything(0, verbose=False)
    file, device = options.outdir / f"{name}.pt", tokenizer.device
    model: Any = build_prior(name, sizes.networks, tokenizer, sizes.steps)
    if not file.exists():
        start = time.monotonic()
        model.learning_rate = sizes.learning_rate
        fit(model, loader(train, sizes.batch_size, shuffle=True), sizes.steps, options.precision)
        minutes = (time.monotonic() - start) / 60
        logger.info("trained %s in %.1f minutes", name, minutes)
        torch.save({"minutes": minutes, "state_dict": model.state_dict()}, file)
    saved = torch.load(file, map_location=device)
    model.load_state_dict(saved["state_dict"])
    return model.to(device).eval(), saved["minutes"]


@torch.no_grad()
def reconstructions(
    tokenizer: VQModel, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode and decode images (B, 3, H, W) of classes (B,)."""
    for x, labels in batches:
        yield tokenizer(x)[0], labels


def measure_prior(
    name: str, model: Any, sizes: Sizes, test: Any, judges: tuple[Classifier, Judgement]
) -> Row:
    """Measure one prior."""
    classifier, real = judges
    row: Row = {"name": name, "bits": bits_per_image(model, loader(test, 100))}
    row["parameters"] = count_params(model) - count_params(model.first_stage_model)
    start = time.monotonic()
    result = judge(classifier, sample(model, sizes.samples))
    row["seconds_per_sample"] = (time.monotonic() - start) / sizes.samples
    row |= {"recognised": result.accuracy, "distance": result.distance(real)}
    if isinstance(model, Net2NetTransformer):  # fewer samples suffice for the accuracy
        row["guided"] = judge(classifier, sample(model, sizes.samples // 5, 2.0)).accuracy
    some = loader(first(test, sizes.completions), sizes.completions)
    return row | complete(model, *next(labelled(some, model.device)))


def report(rows: list[Row], references: Row) -> str:
    """Format a Markdown table of all priors."""
    lines = [
        "Frequencies of tokens by their place within a site: "
        f"{references['order_zero']:.0f} bits per image. "
        f"Recognised: {references['real']:.1%} of real images, {references['reconstructed']:.1%} "
        "of reconstructions. Distances are to reconstructions, in this classifier's features, and "
        "comparable only within this table. Guided: recognised, at a guidance scale of 2.",
        "",
        "Priors train for the same number of steps, not for the same time. Training hides the "
        f"class of {HIDDEN:.0%} of the images from transformers, for guidance, but not from the "
        "PixelCNN. Known sites: of completions, from the upper half or from random sites. "
        "PSNR of the known half: of reconstructions / of completions / of completions without the "
        "known pixels pasted over them, because each decoded pixel depends on all codes.",
        "",
        "| prior | parameters | minutes of training | bits per image | saved against frequencies "
        "| recognised | guided | distance | known sites changed | PSNR of the known half |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        saved = 1 - row["bits"] / references["order_zero"]
        guided = f"{row['guided']:.1%}" if "guided" in row else ""
        half = " / ".join(f"{psnr:.2f}" for psnr in row["known_half"])
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['minutes']:.1f} "
            f"| {row['bits']:.0f} | {saved:.1%} | {row['recognised']:.1%} | {guided} "
            f"| {row['distance']:.2f} | {max(row['changed']):.2%} | {half} |"
        )
    return "\n".join(lines)


def compare(sizes: Sizes, names: list[str], options: Namespace) -> list[Row]:
    """Train and measure all priors; save ``measurements.json`` and ``report.md``."""
    data = {"train": options.train, "test": options.test, "precision": options.precision}
    claim(options.outdir / "priors.json", {**asdict(sizes), **data})
    train, test = open_images(sizes, options)
    tokenizer = tokenizer_of(sizes, train, options)
    file = options.outdir / "classifier.pt"
    classifier = trained_classifier(train, sizes.classifier_steps, file, tokenizer.device)

    sequence = tokenizer.quantize.sequence

    def tokens(data: Any) -> Iterator[Tensor]:
        for x, _ in labelled(loader(data, 100), tokenizer.device):
            codes = tokenizer.encode(x).info.indices
            yield sequence.encode(codes)[0]

    with torch.no_grad():
        counted = OrderZero(sequence, tokens(first(train, 20 * len(test))))
        bits = sum(counted.bits(part) for part in tokens(test)) / len(test)
    batches = loader(test, 100)
    real = judge(classifier, labelled(batches, tokenizer.device))
    rebuilt = judge(classifier, reconstructions(tokenizer, labelled(batches, tokenizer.device)))
    references = {"order_zero": bits, "real": real.accuracy, "reconstructed": rebuilt.accuracy}
    rows = []
    for name in names:
        model, minutes = trained_prior(name, sizes, tokenizer, train, options)
        measured = measure_prior(name, model, sizes, test, (classifier, rebuilt))
        rows.append(measured | {"minutes": minutes})
        found = {"references": references, "priors": rows}
        (options.outdir / "measurements.json").write_text(json.dumps(found, indent=2))
        (options.outdir / "report.md").write_text(report(rows, references) + "\n")
    return rows


def main() -> None:
    """Parse the command line, run the comparison, and log the table."""
    parser = script_parser(__doc__, device=False)
    which = parser.add_mutually_exclusive_group(required=True)
    for name in SIZES:
        which.add_argument(f"--{name}", dest="sizes", action="store_const", const=name)
    parser.add_argument("--train", help="Parquet file; default: CIFAR-10 by download")
    parser.add_argument("--test", help="Parquet file, held out")
    parser.add_argument("-o", "--outdir", type=Path, help="default: results/priors/SIZES")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES, help="priors to compare")
    parser.add_argument("--steps", type=int, help="training steps of each prior")
    parser.add_argument(
        "--precision", default="32-true", help="precision of training, such as bf16-mixed"
    )
    options = parser.parse_args()
    sizes = SIZES[options.sizes]
    if options.steps:
        sizes = replace(sizes, steps=options.steps)
    options.outdir = options.outdir or Path("results/priors", options.sizes)
    options.outdir.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    compare(sizes, list(options.only), options)
    logger.info("%s", (options.outdir / "report.md").read_text())


if __name__ == "__main__":
    run(main)
