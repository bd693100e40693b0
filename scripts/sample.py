"""Sample new images from a trained prior, or complete given ones.

python scripts/sample.py -r logs/<run> -n 16
python scripts/sample.py -r logs/<run> -n 16 --classes 3,7
python scripts/sample.py -r logs/<run> -n 16 --classes 3,7 --guidance 2
python scripts/sample.py -r logs/<run> --complete folder/ --known 0.5
python scripts/sample.py -r logs/<run> --complete folder/ --mask mask.png
python scripts/sample.py -r logs/<run> --complete photo.jpg --classes 3
python scripts/sample.py -r logs/<top prior's run> logs/<bottom prior's run> -n 16

A seed gives the same images for any batch size, except for rounding, which now and then turns one
token into another. The known part of an image to complete is its codes, so completions show its
reconstruction there, the same in all of them.

Several runs are the priors of all levels of a VQ-VAE-2, the top first. Classes are then those of
the top's prior, and guidance applies to the levels whose priors were trained with
condition_dropout.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import taming
from taming.run import cli
from taming.run.parts import folder_of, place_of

if TYPE_CHECKING:
    from torch import Tensor

    from taming.generator import Generator

logger = logging.getLogger("taming.sample")

SHOWN = 256  # most pictures in grid.png, whatever is sampled


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__)
    add = parser.add_argument
    run_help = "run of the prior, or a checkpoint; or those of all levels, the top's first"
    cli.add_run_arguments(parser, run_help, nargs="+")
    add("-o", "--outdir", type=Path, help="default: results/samples/<run>")
    cli.add_sampling_arguments(parser, num_samples=16, batch_size=16)
    add("--min_p", type=float, help="sample among those this likely, relatively")
    guidance_help = "scale of classifier-free guidance; 1 for none"
    add("--guidance", type=float, default=1.0, help=guidance_help)
    complete_help = "images or folders to complete; their known part is shown as reconstructed"
    add("--complete", nargs="+", type=cli.existing, help=complete_help)
    add("--known", type=float, help="known upper share of each; default: 0.5")
    mask_help = "picture that is bright where images are known instead, scaled and cropped alike;\n"
    add("--mask", type=cli.existing, help=mask_help + "a site is known if all its pixels are")
    add("--grid", help="rows,columns of sites; default: as trained")
    options = parser.parse_args()
    if options.outdir is None:
        name = folder_of(place_of(options.resume[0])).absolute().name
        options.outdir = Path("results/samples") / name
    if min(options.num_samples, options.batch_size) < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    if options.grid is not None:
        sides = options.grid.split(",")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(f"--grid expects rows,columns such as 16,16, got {options.grid!r}")
        options.grid = int(sides[0]), int(sides[1])
    if options.known is not None and not 0 <= options.known <= 1:
        raise ValueError(f"--known must be in [0, 1], got {options.known}")
    if options.known is not None and options.mask:
        raise ValueError("give --known or --mask, not both")
    if (options.known is not None or options.mask) and not options.complete:
        raise ValueError("--known and --mask say what is known of images: give them by --complete")
    if len(options.resume) > 1 and (options.complete or options.grid):
        raise ValueError("--complete and --grid are for one run, not for the priors of all levels")
    return options


def sample(generator: Generator, options: argparse.Namespace, asked: dict[str, Any]) -> None:
    """Save new images, one file each as soon as its batch is done, and a grid of the first."""
    from taming.pictures import arrange, save_picture

    classes, n = asked.pop("label"), asked.pop("n")
    labels = [label for label in classes or [None] for _ in range(n)]
    suffixes = ("" if label is None else f"_class{label}" for label in labels)
    files = [options.outdir / f"{n:06}{suffix}.png" for n, suffix in enumerate(suffixes)]
    cli.refuse_existing([options.outdir / "grid.png", *files])
    shown = []
    for first in tqdm(range(0, len(labels), options.batch_size), desc="sample", unit="batch"):
        own = labels[first : first + options.batch_size]
        wanted = {"n": 1, "label": own} if classes else {"n": len(own)}
        pictures = generator.sample(**wanted, first=first, **asked)
        for picture, file in zip(pictures, files[first : first + len(own)], strict=True):
            save_picture(picture, file)
        shown += pictures[: SHOWN - len(shown)]
    save_picture(arrange(shown, 8), options.outdir / "grid.png")


def known_part(generator: Generator, options: argparse.Namespace, grid: tuple[int, int]) -> Tensor:
    """Return the known sites (h, w) bool: an upper part, or a mask's."""
    from taming.data.base import ImagePaths
    from taming.models.sampling import upper_part

    if options.mask is None:
        return upper_part(0.5 if options.known is None else options.known, grid)
    side = grid[0] * generator.model.first_stage_model.factor
    mask = ImagePaths([options.mask], side, antialias=True, background="black")[0]["image"]
    return generator.known_sites(mask.mean(axis=-1), grid)


def complete(generator: Generator, options: argparse.Namespace, asked: dict[str, Any]) -> None:
    """Save completions of each image, and in a row: the image, its known part, and all of them.

    Raises:
        ValueError: An image could not be used, when the others are completed; or a file of the
            results is there already.
    """
    import torch

    from taming.data.base import ImagePaths
    from taming.data.custom import find_files
    from taming.data.preprocessing import refuse_failed, skipping
    from taming.models.sampling import numbers_of, paste
    from taming.pictures import arrange, save_picture, to_tensor

    grid = options.grid or generator.model.grid
    if grid[0] != grid[1]:
        raise ValueError(f"--complete needs a square grid, got {grid[0]}x{grid[1]}")
    if generator.tokenizer.channels != 3:
        raise ValueError("--complete takes photographs, but the tokenizer's images have no colours")
    side = grid[0] * generator.model.first_stage_model.factor
    paths = find_files(options.complete)
    images = ImagePaths(paths, side, antialias=True)
    names = [f"{number:06}_{path.stem}_" for number, path in enumerate(paths)]
    ends = ("completed.png", "000000.png")
    cli.refuse_existing(options.outdir / f"{name}{end}" for name in names for end in ends)
    known = known_part(generator, options, grid)
    failed: list[str] = []
    for number in tqdm(range(len(images)), desc="complete"):
        with skipping(failed):
            item = images[number]
            first = numbers_of(number, [0])[0]
            completed = generator.complete(item["image"], known, first=first, **asked)
            row = torch.stack([to_tensor(picture) for picture in (item["image"], *completed)])
            seen = paste(torch.ones_like(row[:1]), row[1:2], known.cpu())
            row = torch.cat([row[:1], seen, row[1:]])
            for place, picture in enumerate(completed):
                save_picture(picture, options.outdir / f"{names[number]}{place:06}.png")
            save_picture(arrange(row, len(row)), options.outdir / f"{names[number]}completed.png")
    refuse_failed(failed, len(images))


def main(all_levels: bool = False) -> None:
    """Sample or complete; ``all_levels``: even a single run must be of all levels of a VQ-VAE-2."""
    options = parse_options()
    cli.check_folder(options.outdir)
    from taming.generator import Generator

    runs = options.resume if all_levels or len(options.resume) > 1 else options.resume[0]
    about = {"tokenizer": options.tokenizer, "trust_config": options.trust_config}
    loaded = taming.load(runs, cli.choose_device(options.device), **about)
    generator = cli.check_kind(loaded, Generator, runs, "a prior")
    generator.batch_size = options.batch_size
    names = ("seed", "grid", "temperature", "top_k", "top_p", "min_p", "guidance")
    asked = {name: getattr(options, name) for name in names}
    asked |= {"n": options.num_samples, "label": cli.labels_of(generator.model, options.classes)}
    (complete if options.complete else sample)(generator, options, asked)
    logger.info("pictures in %s", options.outdir)


if __name__ == "__main__":
    cli.run(main)
