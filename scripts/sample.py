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
from typing import Any

import lightning.pytorch as pl
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from taming.data.base import ImagePaths
from taming.data.custom import find_files
from taming.models.level_prior import check_priors, sample_levels
from taming.models.prior import Prior
from taming.models.sampling import numbers_of, paste, sample_images, upper_part
from taming.modules.transformer.generate import SamplingParams, generators_of
from taming.pictures import save_picture, tile
from taming.run.cli import check_folder, choose_device, labels_of, run, script_parser
from taming.run.folder import model_from_run

logger = logging.getLogger("taming.sample")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "-r",
        "--resume",
        nargs="+",
        required=True,
        help="run of the prior, or a checkpoint; or those of all levels, the top's first",
    )
    parser.add_argument("-o", "--outdir", default="results/samples", type=Path)
    parser.add_argument("-n", "--num_samples", type=int, default=16, help="for each class, if any")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("-t", "--temperature", type=float, default=1.0)
    parser.add_argument("-k", "--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("-p", "--top_p", type=float, help="sample among the likeliest of this mass")
    parser.add_argument("--min_p", type=float, help="sample among those this likely, relatively")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1 for none"
    )
    parser.add_argument("--classes", help="labels, such as 3,7, of a class-conditional prior")
    parser.add_argument(
        "--complete",
        nargs="+",
        help="images or folders to complete; their known part is shown as reconstructed",
    )
    parser.add_argument("--known", type=float, help="known upper share of each; default: 0.5")
    parser.add_argument(
        "--mask",
        help="picture that is bright where images are known instead, scaled and cropped alike;\n"
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
    if len(options.resume) > 1 and (options.complete or options.grid):
        raise ValueError("--complete and --grid are for one run, not for the priors of all levels")
    return options


def grid_of(model: Prior, wish: str | None) -> tuple[int, int]:
    """Return rows and columns of sites: those wished for, or those trained on."""
    if wish is None:
        return model.grid
    sides = wish.split(",")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--grid expects rows,columns such as 16,16, got {wish!r}")
    return int(sides[0]), int(sides[1])


def draw(
    priors: list[Any],
    labels: list[int],
    options: argparse.Namespace,
    item: int = 0,
    codes: Tensor | None = None,
    **start: Any,
) -> Tensor:
    """Sample an image (3, H, W) for each label, in batches.

    Args:
        priors: One prior, or those of all levels.
        labels: Condition of each image.
        options: The command line.
        item: Number of the completed image, from which random numbers follow.
        codes: (1, h, w, T), the codes of the image to complete.
        **start: Further arguments of `Prior.sample_codes`, for one prior.
    """
    last, images = priors[-1], []
    condition = torch.tensor(labels, device=last.device)[:, None]
    for part in tqdm(torch.arange(len(labels)).split(options.batch_size), desc="batches"):
        params = SamplingParams(
            options.temperature,
            options.top_k,
            options.top_p,
            min_p=options.min_p,
            guidance=options.guidance,
            generators=generators_of(options.seed, numbers_of(item, part.tolist())),
        )
        own = condition[part.to(last.device)]
        if len(priors) > 1:
            drawn = last.first_stage_model.model.decode_code(sample_levels(priors, own, params))
        else:
            given = None if codes is None else codes.expand(len(part), -1, -1, -1)
            drawn = sample_images(last, own, params, codes=given, **start)
        images.append(last.show(drawn).cpu())
    return torch.cat(images)


def sample(priors: list[Any], options: argparse.Namespace) -> None:
    """Save new images, one file each, and a grid of all."""
    labels = labels_of(priors[0], options.classes, options.num_samples)
    images = draw(priors, labels, options, grid=grid_of(priors[0], options.grid))
    for number, (label, image) in enumerate(zip(labels, images, strict=True)):
        suffix = "" if priors[0].be_unconditional else f"_class{label}"
        save_picture(image, options.outdir / f"{number:06}{suffix}.png")
    save_picture(tile(images, 8), options.outdir / "grid.png")


def known_part(options: argparse.Namespace, grid: tuple[int, int], factor: int) -> Tensor:
    """Return the known sites (h, w) bool, of ``factor`` pixels: an upper part, or a mask's."""
    if options.mask is None:
        return upper_part(0.5 if options.known is None else options.known, grid)
    mask = ImagePaths([options.mask], grid[0] * factor, antialias=True)[0]["image"]
    bright = torch.from_numpy(mask).mean(dim=-1) > 0
    return rearrange(bright, "(h f) (w g) -> h w (f g)", f=factor, g=factor).all(dim=-1)


def complete(model: Prior, options: argparse.Namespace) -> None:
    """Save a row for each image: input, its known part, and completions."""
    labels = labels_of(model, options.classes, options.num_samples)
    grid = grid_of(model, options.grid)
    if grid[0] != grid[1]:
        raise ValueError(f"--complete needs a square grid, got {grid[0]}x{grid[1]}")
    stage = model.first_stage_model
    tokenizer = getattr(stage, "model", stage)  # a level's
    if tokenizer.encoder.conv_in.in_channels != 3:
        raise ValueError("--complete takes photographs, but the tokenizer's images have no colours")
    factor = stage.factor
    images = ImagePaths(find_files(options.complete), grid[0] * factor, antialias=True)
    known = known_part(options, grid, factor)
    for number in tqdm(range(len(images)), desc="complete"):
        item = images[number]
        x = torch.from_numpy(item["image"]).permute(2, 0, 1)[None]  # (1, 3, H, W)
        codes = model.encode_codes(x.to(model.device))
        reconstruction = model.decode_codes(codes).cpu()
        drawn = draw([model], labels, options, number, codes=codes, known=known)
        blank_and_drawn = torch.cat([torch.ones_like(x), drawn])
        row = torch.cat([x, paste(blank_and_drawn, reconstruction, known)])
        name = f"{number:06}_{Path(item['file_path_']).stem}_completed.png"
        save_picture(tile(row, len(row)), options.outdir / name)


def main(all_levels: bool = False) -> None:
    """Sample or complete.

    Args:
        all_levels: The runs must be the priors of all levels of a VQ-VAE-2, even a single one.
    """
    options = parse_options()
    check_folder(options.outdir)
    device = choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    priors, all_levels = [], all_levels or len(options.resume) > 1
    for name in options.resume:
        priors.append(model := model_from_run(name))
        if not isinstance(model, Prior):
            kind = "a prior of one level" if all_levels else "a prior"
            raise ValueError(f"{name} holds a {type(model).__name__}, not {kind}")
    if all_levels:
        check_priors(priors)
    priors = [prior.to(device) for prior in priors]
    complete(priors[0], options) if options.complete else sample(priors, options)
    logger.info("pictures in %s", options.outdir)


if __name__ == "__main__":
    run(main)
