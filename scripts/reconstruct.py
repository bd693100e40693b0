"""Encode and decode images with a trained tokenizer.

python scripts/reconstruct.py -r logs/<run> picture.jpg folder/ -o results
python scripts/reconstruct.py -r logs/<run> picture.jpg -s 256 --max-codes 4000

The rate of a loopy tokenizer can be set by the distance at which loops end, by the number of codes,
or by the quality wanted. reconstructions.json reports the numbers of each image. For a VQ-VAE-2,
the comparison also shows what the upper levels decode to alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from taming.data.custom import find_files
from taming.data.preprocessing import (
    View,
    decode_image,
    error_context,
    scale_short_side,
    to_unit_range,
)
from taming.models.vqgan import VQModel
from taming.pictures import save_picture, side_by_side
from taming.run.cli import check_folder, choose_device, run
from taming.run.folder import model_from_run

logger = logging.getLogger("taming.reconstruct")

EXACT = 1e-10  # smallest mean squared error reported, 100 dB: JSON has no infinity


def load_image(path: Path, size: int | None, site: int) -> Tensor:
    """Read an image, scale its short side, and crop its sides to whole sites.

    Args:
        path: An image file.
        size: Length of the short side in pixels; None keeps it.
        site: Side of a site in pixels.

    Returns:
        (1, 3, H, W) float32 in [-1, 1].

    Raises:
        ValueError: The file is not an image, or smaller than a site.
    """
    with error_context(str(path)):
        picture = decode_image(path)
    height, width = picture.shape[1:]
    scaled = (height, width) if size is None else scale_short_side(height, width, size)
    rows, columns = (side // site * site for side in scaled)
    if rows < 1 or columns < 1:
        raise ValueError(f"{path}: {scaled[1]}x{scaled[0]} is smaller than a site of {site} pixels")
    view = View(scaled, (scaled[0] - rows) // 2, (scaled[1] - columns) // 2, rows, columns)
    pixels = torch.from_numpy(to_unit_range(view.apply(picture, antialias=True)))  # (H, W, 3)
    return pixels.permute(2, 0, 1)[None]


def add_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set the rate of a loopy tokenizer; at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--threshold",
        type=float,
        help="distance at which a loop ends, as a share of the latents' standard deviation",
    )
    group.add_argument(
        "--max-codes", "--max-tokens", type=int, help="largest number of codes of an image"
    )
    group.add_argument("--target-psnr", type=float, help="PSNR in dB to reach with fewest codes")


def latent_std(model: VQModel) -> float:
    """Return the standard deviation of a loopy tokenizer's latents, 1 where it is not measured."""
    return float(getattr(model.quantize, "latent_std", 1.0))


def chosen_rate(options: argparse.Namespace, model: VQModel) -> dict[str, float]:
    """Turn the flags into arguments of `VQModel.encode`; {} if none is given."""
    rate = {name: getattr(options, name) for name in ("threshold", "max_codes", "target_psnr")}
    rate = {name: value for name, value in rate.items() if value is not None}
    if "threshold" in rate:
        rate["threshold"] *= latent_std(model)
    return rate


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name the results of each image by its stem, numbered where several images share it."""
    names: list[str] = []
    taken: set[str] = set()  # casefolded: some file systems ignore case
    for path in paths:
        candidates = (f"{path.stem}_{number}" if number > 1 else path.stem for number in count(1))
        free = (n for n in candidates if taken.isdisjoint(f.casefold() for f in files_of(n)))
        names.append(next(free))
        taken.update(file.casefold() for file in files_of(names[-1]))
    return names


def files_of(name: str) -> tuple[str, str, str]:
    """Return the files of an image: reconstruction, lengths, and all pictures side by side."""
    return f"{name}.png", f"{name}_lengths.png", f"{name}_compare.png"


def refuse_overwriting(paths: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    """Refuse a folder of results in which an input would be overwritten.

    Raises:
        ValueError: Names the image.
    """
    images = {path.resolve() for path in paths}
    for file in (folder / file for name in names for file in files_of(name)):
        if file.resolve() in images:
            raise ValueError(f"{file} is one of the images: choose another folder with -o")


@torch.no_grad()
def reconstruct(
    model: VQModel, x: Tensor, rate: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode and decode one image.

    Args:
        model: The tokenizer, in eval mode.
        x: (1, 3, H, W) in [-1, 1].
        rate: At most one argument of `VQModel.encode` that sets a rate.

    Returns:
        Pictures (3, H, W) by name, and numbers by name.
    """
    quantized = model.encode(x, **rate)
    x_rec = model.decode(quantized.z_q).clamp(-1, 1)  # (1, 3, H, W)
    shown = {"input": x, "reconstruction": x_rec}
    shown |= model.code_pictures(quantized, (x.shape[2], x.shape[3]))
    sites, codes, tokens, bits = 0, 0, 0, 0.0
    for level, grid in model.codes_by_level(quantized).items():  # (1, h, w, T)
        sequence = model.levels[level].sequence
        length = sequence.encode(grid)[0].shape[1]
        sites, codes = sites + grid[..., 0].numel(), codes + int((grid >= 0).sum())
        tokens, bits = tokens + length, bits + length * math.log2(sequence.vocab_size)
    error = float((x - x_rec).square().mean()) / 4
    numbers = {
        "size": [x.shape[3], x.shape[2]],
        "sites": sites,
        "codes": codes,
        "tokens": tokens,
        "bits": bits,
        "psnr": -10 * math.log10(max(error, EXACT)),
    }
    if trace := model.quantize.traces(quantized).get(""):
        reached = trace.distances[trace.within]
        numbers |= {
            "threshold": float(reached.max()) / latent_std(model) if len(reached) else 0.0,
            "never_within_threshold": int((~trace.within).sum()),
            "turns_per_site": float(trace.lengths.float().mean()),
            "turns": torch.bincount(
                trace.lengths.flatten(), minlength=model.quantize.sequence.max_loops + 1
            ).tolist()[1:],
        }
    return {name: picture[0] for name, picture in shown.items()}, numbers


def save_pictures(pictures: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Save the reconstruction, the lengths if there are any, and all pictures side by side."""
    reconstruction, lengths, compare = (folder / file for file in files_of(name))
    save_picture(pictures["reconstruction"], reconstruction)
    if "lengths" in pictures:
        save_picture(pictures["lengths"], lengths)
    save_picture(side_by_side(*pictures.values()), compare)


def load_tokenizer(run: str) -> VQModel:
    """Load the tokenizer of a run.

    Raises:
        ValueError: The run holds another model, or a tokenizer of other than 3 channels.
    """
    model = model_from_run(run)
    if not isinstance(model, VQModel):
        raise ValueError(f"{run} holds a {type(model).__name__}, not a tokenizer")
    channels = model.encoder.conv_in.in_channels
    if channels != 3:
        raise ValueError(f"{run} holds a tokenizer of {channels} channels, not of colours")
    return model


def main() -> None:
    """Reconstruct each image, and save ``reconstructions.json`` with the numbers of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", nargs="+", help="image files or folders of them")
    parser.add_argument(
        "-r", "--resume", required=True, help="run of the tokenizer, or a checkpoint"
    )
    parser.add_argument("-o", "--outdir", default="results/reconstructions", type=Path)
    parser.add_argument("-s", "--size", type=int, help="length of the short side in pixels")
    add_rate_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options = parser.parse_args()

    check_folder(options.outdir)
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size must be at least 1, got {options.size}")
    paths = find_files(options.images)
    names = unique_names(paths)
    refuse_overwriting(paths, names, options.outdir)
    model = load_tokenizer(options.resume).to(choose_device(options.device))
    rate = chosen_rate(options, model)
    report: dict[str, dict[str, Any]] = {}
    try:
        for path, name in tqdm(zip(paths, names, strict=True), "reconstruct", len(paths)):
            x = load_image(path, options.size, model.factor).to(model.device)
            with error_context(str(path)):
                pictures, numbers = reconstruct(model, x, rate)
            save_pictures(pictures, options.outdir, name)
            report[str(path)] = numbers
    finally:
        if report:  # images before one that fails are not lost
            (options.outdir / "reconstructions.json").write_text(json.dumps(report, indent=2))
    for name, numbers in report.items():
        if numbers["psnr"] < rate.get("target_psnr", -math.inf):
            logger.warning("%s reaches %.2f dB with all its turns", name, numbers["psnr"])
    logger.info("%d reconstructions in %s", len(paths), options.outdir)


if __name__ == "__main__":
    run(main)
