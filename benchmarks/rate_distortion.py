"""Compare quantizers by image quality at equal codes and equal bits per image.

Trains an autoencoder without codes for each seed, then continues from it with each quantizer for
the same number of steps, measures held-out images, and saves a CSV file, a table, a plot and
comparisons. Earlier results in the folder are reused.

python benchmarks/rate_distortion.py --quick --train train.parquet --test test.parquet
python benchmarks/rate_distortion.py --standard
python benchmarks/rate_distortion.py --full --train photos/train --test photos/val

Without --train and --test, CIFAR-10 is downloaded. Bits are counted in three ways: raw, log2 of the
vocabulary for each token of the sequence; zero-order entropy of codes and lengths; and the negative
log-likelihood of a small transformer trained on the sequences, lengths included.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from race.contenders import MAX_LOOPS, Contender
from race.folder import claim
from race.measure import (
    Measurement,
    cut_by,
    fixed_length,
    measure,
    set_rate_for_mean,
    shuffled_lengths,
    threshold_for_mean,
)
from race.peers import ResidualVQ
from race.plans import ALL, PLANS, Plan, images_of
from race.report import write_report
from race.training import (
    first,
    last,
    loader,
    prior_bits,
    trained_base,
    trained_tokenizer,
    widen_search,
)
from tqdm import tqdm

from taming.models.vqgan import VQModel
from taming.modules.sequence.notations import RasterSequence
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.run.cli import run, script_parser

logger = logging.getLogger("taming.benchmark")

FIELDS = ("name", "group", "seed", "length", *Measurement._fields, "prior_bits")


def settings(
    model: VQModel, contender: Contender, calibration: list[torch.Tensor]
) -> Iterator[str]:
    """Set a trained tokenizer to each of its rates in turn; yield the mean length of a site."""
    if contender.lengths is None:
        yield ""
        return
    for length in contender.lengths:
        if isinstance(model.quantize, LoopyVectorQuantizer) and model.quantize.rate is not None:
            set_rate_for_mean(model, calibration[:2], length)
        elif isinstance(model.quantize, LoopyVectorQuantizer):
            model.quantize.threshold = threshold_for_mean(model, calibration, length)
        else:
            assert isinstance(model.quantize, ResidualVQ)
            model.quantize.shorten(int(length))
        yield str(length)


def train_base(plan: Plan, seed: int, options: Namespace, threads: int) -> None:
    """Train the autoencoder from which all contenders of a seed start."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train = images_of(options.train, "train", plan.ddconfig["resolution"], train=True)
    trained_base(plan, seed, train, options.outdir, options.precision)


def race(plan: Plan, name: str, seed: int, options: Namespace) -> list[dict[str, Any]]:
    """Train one contender with one seed and measure it at all of its rates."""
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    contender = plan.contenders()[name]
    size = plan.ddconfig["resolution"]
    train = images_of(options.train, "train", size, train=True)
    # The last images, because the first ones were used to choose the recipe.
    test = last(images_of(options.test, "test", size, train=False), plan.test_images)
    still = first(images_of(options.train, "train", size, train=False), plan.calibration_images)
    model = trained_tokenizer(plan, contender, seed, train, options.outdir, options.precision)
    widen_search(model, contender)  # not before, so that it costs no time in training

    def batches(data: Any) -> list[torch.Tensor]:
        return [model.get_input(b, "image").to(model.device) for b in loader(data, 100)]

    images, calibration = batches(test), batches(still)
    rows = []

    def add(label: str, group: str, length: str, result: Measurement, bits: float | None) -> None:
        values = (label, group, seed, length, *result, bits)
        rows.append(dict(zip(FIELDS, values, strict=True)))

    for length in settings(model, contender, calibration):
        bits = None
        if not options.no_prior:
            bits = prior_bits(plan, model, train, test, options.precision)
        add(name, contender.group, length, measure(model, images), bits)
        if name == "loopy-one" and isinstance(model.quantize, LoopyVectorQuantizer):
            shuffled = cut_by(model, shuffled_lengths(model.quantize.threshold))
            add("shuffled", "control: shuffled", length, measure(model, images, shuffled), None)
    if name == "loopy-one":
        for turns in range(1, MAX_LOOPS - 1):
            sequence = RasterSequence(model.quantize.n_e, turns)
            result = measure(model, images, cut_by(model, fixed_length(turns)), sequence)
            add("fixed", "control: fixed depth", str(turns), result, None)
    return rows


def parse() -> Namespace:
    """Parse the command line."""
    parser = script_parser(__doc__, device=False)
    which = parser.add_mutually_exclusive_group(required=True)
    for name in PLANS:
        which.add_argument(f"--{name}", dest="plan", action="store_const", const=name)
    parser.add_argument("--train", help="Parquet file or folder of training images")
    parser.add_argument("--test", help="Parquet file or folder of held-out images")
    parser.add_argument("-o", "--outdir", type=Path, help="default: results/rate_distortion/PLAN")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--only", nargs="*", choices=ALL, metavar="NAME", help="contenders to race")
    parser.add_argument(
        "--precision", default="32-true", help="precision of training, such as bf16-mixed"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="simultaneous trainings; default: one per CPU core; 1 with a GPU",
    )
    parser.add_argument("--no_prior", action="store_true", help="skip the priors")
    return parser.parse_args()


def main() -> None:
    """Run all missing trainings, then report."""
    options = parse()
    plan = PLANS[options.plan]
    options.outdir = options.outdir or Path("results/rate_distortion", options.plan)
    options.outdir.mkdir(parents=True, exist_ok=True)
    data = {key: getattr(options, key) for key in ("train", "test", "precision", "no_prior")}
    claim(options.outdir / "race.json", {**asdict(plan), **data}, free=("seeds", "names"))
    cores = os.cpu_count() or 1
    workers = options.workers or (1 if torch.cuda.is_available() else cores)
    options.threads = max(1, cores // workers)
    table = options.outdir / "measurements.csv"
    rows = load_rows(table)
    done = {(row["name"], int(row["seed"])) for row in rows}
    wanted = [
        (name, seed)
        for seed in range(options.seeds or plan.seeds)
        for name in options.only or plan.names
        if (name, seed) not in done
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        # All autoencoders first: otherwise two contenders would train the same one at once.
        seeds = sorted({s for n, s in wanted if not (options.outdir / f"{n}-{s}.pt").exists()})
        threads = max(options.threads, cores // max(1, len(seeds)))  # one seed takes all cores
        bases = [pool.submit(train_base, plan, seed, options, threads) for seed in seeds]
        for finished in tqdm(as_completed(bases), total=len(bases), desc="autoencoders"):
            finished.result()
        races = {pool.submit(race, plan, *which, options): which for which in wanted}
        collect(races, rows, table)
    write_report(load_rows(table), plan, options.outdir)


def collect(
    races: Mapping[Future, tuple[str, int]], rows: list[dict[str, Any]], table: Path
) -> None:
    """Add the measurements of each race to the table; a failed race does not affect the others.

    Args:
        races: Race -> name and seed of its contender.
        rows: Earlier measurements.
        table: File of all measurements.

    Raises:
        Exception: The error of the first failed race, when all races are over.
    """
    failed = []
    for finished in tqdm(as_completed(races), total=len(races), desc="contenders"):
        if error := finished.exception():
            logger.error("%s, seed %d: %s", *races[finished], error)
            failed.append(error)
            continue
        rows = rows + finished.result()
        save_rows(rows, table)
    if failed:
        raise failed[0]


def save_rows(rows: list[dict[str, Any]], table: Path) -> None:
    """Save all measurements atomically: an interruption leaves the earlier table."""
    unfinished = table.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(table)


def load_rows(table: Path) -> list[dict[str, Any]]:
    """Load the earlier measurements, or an empty list if the table does not exist."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run(main)
