"""Compute the tokens of pictures once, so that priors need neither images nor tokenizer time.

python scripts/encode.py -r logs/<run> -o cache/photos --data photos/
python scripts/encode.py -r logs/<run> -o cache/set --data shards/ --max_codes 600
python scripts/encode.py -r logs/<run> -o cache
python scripts/encode.py -r logs/<run> -o cache --splits train --passes 4

--data names a folder of pictures, a list of them (.txt), Parquet files, WebDataset tars, or a data
set of the hub. Pictures keep their sizes unless --size is given. Without --data, the splits of the
run's own data, unless -b or key=value items set others, go to <outdir>/train and so on: with random
crops or flips, several passes keep some of their variety; ``image_number`` is an image's index in
the data set, and ``pass_number`` its pass, from 0.

The result is a folder for taming.data.tokens.TokenCache. Numbers, vectors of numbers and texts of
each picture are kept, such as its class or layout; images and maps are not. What was interrupted
goes on by the same command. report.json names the pictures that could not be encoded.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taming.run import cli
from taming.run.folder import SavedRun
from taming.run.parser import Parser

logger = logging.getLogger("taming.encode")

# Options of `encode_shards`, and of the pictures that --data names.
_ENGINE = ("engine", "max_codes", "target_psnr", "threshold", "rate", "batch_size")
_PICTURES = ("size", "labels", "split", "image_column", "columns", "shard_size")
_OWN = ("splits", "passes", "seed")  # options of the run's own data


def parser_of() -> Parser:
    """Return the parser."""
    parser = cli.run_parser(__doc__)
    add = parser.add_argument
    add("-o", "--outdir", type=Path, required=True, help="folder of the cache")
    add("--engine", default="local", help="local, torchrun, slurm or ray (docs/scaling.md)")
    add("--devices", type=int, help="number of processes; default: all GPUs or cores")
    add("--batch_size", type=int, default=16, help="pictures of one size that are encoded together")
    add("--max_codes", type=int, help="largest number of codes of a picture")
    add("--target_psnr", type=cli.rate, help="PSNR in dB to reach with fewest codes")
    add("--threshold", type=cli.rate, help="distance at which a loop ends, in the space of latents")
    add("--rate", type=cli.rate, help="lambda, the worth of a bit, by which codes are chosen")
    error_help = "skip what cannot be encoded, or raise an error; default: skip with --data"
    add("--on_error", choices=("skip", "raise"), help=error_help)
    group = parser.add_argument_group("any pictures").add_argument
    group("--data", nargs="+", help="folder, list, Parquet files, tars or name on the hub")
    group("--size", type=int, help="side of square crops; default: each picture's own size")
    group("--labels", action="store_true", help="the subfolders are classes")
    group("--split", default="train", help="split of a data set of the hub")
    group("--image_column", help="column of encoded pictures; default: the only one")
    group("--columns", nargs="*", help="columns to keep as labels; default: all")
    group("--shard_size", type=int, help="pictures of a file of the cache")
    group = parser.add_argument_group("the run's own data").add_argument
    group("--splits", nargs="+", help="splits of the data; default: all")
    group("--passes", type=int, default=1, help="passes over the training set")
    group("-s", "--seed", type=int, default=23, help="seed of random crops")
    return parser


def devices_of(options: argparse.Namespace) -> Any:
    """Turn --device and --devices into the devices of `encode_shards`."""
    if options.device == "auto":
        return options.devices
    return options.device if options.devices is None else [options.device] * options.devices


def main() -> None:
    """Encode the pictures that are named, or the splits of the run's own data."""
    parser = parser_of()
    options, saved = cli.parse_run(parser)
    cli.check_folder(options.outdir)
    for name in _OWN if options.data else _PICTURES:
        if getattr(options, name) != parser.get_default(name):
            whose = "the run's own data: omit --data" if options.data else "pictures: give --data"
            raise ValueError(f"--{name} is of {whose}, or --{name}")
    if not options.data and saved.config.values.get("data") is None:
        raise ValueError(f"{options.resume} comes without pictures: give --data FOLDER")
    try:
        encode(options, saved)
    except KeyboardInterrupt:
        logger.warning("repeat the command to go on")
        raise


def encode(options: argparse.Namespace, saved: SavedRun) -> None:
    """Encode what the options name."""
    from taming.scale import encode_shards

    common = {name: getattr(options, name) for name in _ENGINE}
    common |= {"devices": devices_of(options), "progress": True}
    if options.data:
        pictures = {name: getattr(options, name) for name in _PICTURES}
        data = options.data[0] if len(options.data) == 1 else options.data
        common["on_error"] = options.on_error or "skip"
        report = encode_shards(saved, data, options.outdir, **common, **pictures)
        log_reports({options.outdir: report})
        return
    common |= {"on_error": options.on_error or "raise", "tile": None}
    reports = {}
    for split, source in own_sources(options, saved).items():
        folder = options.outdir / split
        reports[folder] = encode_shards(saved, source, folder, **common)
    log_reports(reports)


def own_sources(options: argparse.Namespace, saved: SavedRun) -> dict[str, Any]:
    """Return the chosen splits of the run's own data."""
    from taming.scale.own import own_source, splits_of

    names = options.splits or splits_of(saved)
    passes = {"train": options.passes}
    return {name: own_source(saved, name, passes.get(name, 1), options.seed) for name in names}


def log_reports(reports: Mapping[Path, Any]) -> None:
    """Log what complete caches hold.

    Raises:
        IncompleteError: Pictures could not be encoded; counts them, and names the first.
    """
    from taming.data.preprocessing import refuse_failed

    failed = []
    for folder, report in reports.items():
        logger.info("%d pictures, %d tokens in %s", report.pictures, report.tokens, folder)
        if report.unreadable:
            logger.warning("%s names those that failed", folder / "report.json")
        failed += [f"{key}: {reason.removeprefix(f'{key}: ')}" for key, reason in report.unreadable]
    refuse_failed(failed, len(failed) + sum(report.pictures for report in reports.values()))


if __name__ == "__main__":
    cli.run(main)
