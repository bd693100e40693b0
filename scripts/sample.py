"""Draw new images from a trained prior, or complete given ones.

python scripts/sample.py -r logs/<run> -n 16
python scripts/sample.py -r logs/<run> -n 16 --classes 3,7
python scripts/sample.py -r logs/<run> -n 16 --classes 3,7 --guidance 2
python scripts/sample.py -r logs/<run> --complete folder/ --known 0.5
python scripts/sample.py -r logs/<run> --complete folder/ --mask mask.png
python scripts/sample.py -r logs/<run> --complete photo.jpg --classes 3

A seed gives the same images whatever the batch size, but for rounding, which now and then turns one
token into another. What is known of an image to complete is its codes, so completions show its
reconstruction there, the same in all of them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from taming.data.base import ImagePaths
from taming.data.custom import find_files
from taming.models.sampling import (
    Prior,
    SamplingParams,
    decode_codes,
    empty_codes,
    encode_codes,
    numbers_of,
    paste,
    sample_images,
    trained_grid,
    upper_part,
    whole_condition,
)
from taming.models.vqvae2 import Level
from taming.modules.transformer.generate import generators_of
from taming.pictures import save_picture, tile
from taming.run.cli import check_folder, choose_device, labels_of, run, script_parser
from taming.run.folder import model_from_run

logger = logging.getLogger("taming.sample")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("-r", "--resume", required=True, help="run of the prior, or a checkpoint")
    parser.add_argument("-o", "--outdir", default="results/samples", type=Path)
    parser.add_argument("-n", "--num_samples", type=int, default=16, help="for each class, if any")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("-t", "--temperature", type=float, default=1.0)
    parser.add_argument("-k", "--top_k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("-p", "--top_p", type=float, help="draw among the likeliest of this mass")
    parser.add_argument("--min_p", type=float, help="draw among those this likely, relatively")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1 for none"
    )
    parser.add_argument("--classes", help="labels, such as 3,7, of a class-conditional prior")
    parser.add_argument(
        "--complete",
        nargs="+",
        help="images or folders whose rest to draw; what is known is shown as reconstructed",
    )
    parser.add_argument("--known", type=float, help="known upper share of each; default: 0.5")
    parser.add_argument(
        "--mask",
        help="picture that is bright where images are known instead, scaled and cut as they are;\n"
        "a site is known if all its pixels are",
    )
    parser.add_argument("--grid", help="rows,columns of sites; default: as trained")
    parser.add_argument("-s", "--seed", type=int, default=23)
    options = parser.parse_args()
    if options.num_samples < 1 or options.batch_size < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    if options.known is not None and not 0 <= options.known <= 1:
        raise ValueError(f"--known must be in [0, 1], got {options.known}")
    if options.known is not None and options.mask:
        raise ValueError("give --known or --mask, not both")
    if (options.known is not None or options.mask) and not options.complete:
        raise ValueError("--known and --mask say what is known of images: give them by --complete")
    return options


def grid_of(model: Prior, wish: str | None) -> tuple[int, int]:
    """Rows and columns of sites, as wished or as the prior was trained for."""
    if wish is None:
        return trained_grid(model)
    sides = wish.split(",")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--grid expects rows,columns such as 16,16, got {wish!r}")
    return int(sides[0]), int(sides[1])


def drawing_of(options: argparse.Namespace, numbers: Iterable[int]) -> SamplingParams:
    """How the tokens of the images with these numbers are drawn."""
    return SamplingParams(
        options.temperature,
        options.top_k,
        options.top_p,
        min_p=options.min_p,
        guidance=options.guidance,
        generators=generators_of(options.seed, numbers),
    )


def draw(
    model: Prior,
    labels: list[int],
    codes: Tensor,
    options: argparse.Namespace,
    item: int = 0,
    known: int | Tensor = 0,
) -> Tensor:
    """Draw an image for each label, all from the same codes (1, h, w, T), in batches."""
    condition, images = torch.tensor(labels, device=model.device)[:, None], []
    numbers = torch.arange(len(labels), device=model.device)
    for part in tqdm(numbers.split(options.batch_size), desc="batches", leave=False):
        drawing = drawing_of(options, numbers_of(item, part.tolist()))
        begun = codes.repeat(len(part), 1, 1, 1)
        drawn = sample_images(model, whole_condition(condition[part]), begun, drawing, known)
        images.append(model.show(drawn).cpu())
    return torch.cat(images)


def sample(model: Prior, options: argparse.Namespace) -> None:
    """Write new images, one file each, and a grid of all."""
    labels = labels_of(model, options.classes, options.num_samples)
    grid = grid_of(model, options.grid)
    images = draw(model, labels, empty_codes(model, 1, grid), options)
    for number, (label, image) in enumerate(zip(labels, images, strict=True)):
        name = f"{number:06}.png" if model.be_unconditional else f"{number:06}_class{label}.png"
        save_picture(image, options.outdir / name)
    save_picture(tile(images, 8), options.outdir / "grid.png")


def known_part(options: argparse.Namespace, grid: tuple[int, int], factor: int) -> Tensor:
    """Which sites (h, w), of ``factor`` pixels, are known: an upper part, or what a mask says."""
    if options.mask is None:
        return upper_part(0.5 if options.known is None else options.known, grid)
    mask = ImagePaths([options.mask], grid[0] * factor, antialias=True)[0]["image"]
    bright = torch.from_numpy(mask).mean(dim=-1) > 0
    return rearrange(bright, "(h f) (w g) -> h w (f g)", f=factor, g=factor).all(dim=-1)


def complete(model: Prior, options: argparse.Namespace) -> None:
    """Write a row for each image: input, what is known of it, and completions."""
    labels = labels_of(model, options.classes, options.num_samples)
    grid = grid_of(model, options.grid)
    if grid[0] != grid[1]:
        raise ValueError(f"--complete needs a square grid, got {grid[0]}x{grid[1]}")
    stage = model.first_stage_model
    tokenizer = stage.model if isinstance(stage, Level) else stage
    if tokenizer.encoder.conv_in.in_channels != 3:
        raise ValueError("--complete takes photographs, but the tokenizer's images have no colours")
    factor = stage.factor
    images = ImagePaths(find_files(options.complete), grid[0] * factor, antialias=True)
    known = known_part(options, grid, factor)
    for number in tqdm(range(len(images)), desc="complete"):
        item = images[number]
        x = torch.from_numpy(item["image"]).permute(2, 0, 1)[None]
        codes = encode_codes(model, x.to(model.device))
        reconstruction = decode_codes(model, codes).cpu()
        drawn = draw(model, labels, codes, options, number, known)
        blank_and_drawn = torch.cat([torch.ones_like(x), drawn])
        row = torch.cat([x, paste(blank_and_drawn, reconstruction, known)])
        name = f"{number:06}_{Path(item['file_path_']).stem}_completed.png"
        save_picture(tile(row, len(row)), options.outdir / name)


def main() -> None:
    """Draw or complete, as asked."""
    options = parse_options()
    check_folder(options.outdir)
    device = choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    model = model_from_run(options.resume)
    if not isinstance(model, Prior):
        raise ValueError(f"{options.resume} holds a {type(model).__name__}, not a prior")
    model = model.to(device)
    complete(model, options) if options.complete else sample(model, options)
    logger.info("pictures in %s", options.outdir)


if __name__ == "__main__":
    run(main)
