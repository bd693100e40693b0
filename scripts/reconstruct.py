"""Encode and decode images with a trained tokenizer.

python scripts/reconstruct.py -r logs/<run> picture.jpg folder/ -o results
python scripts/reconstruct.py -r logs/<run> picture.jpg -s 256 --max-tokens 4000

A loopy tokenizer's rate can be set for each image: by the distance at which loops end, by the
number of tokens, or by the quality wanted. reconstructions.json tells what each image took. Of a
VQ-VAE-2, the comparison also shows what its upper levels say alone.
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
from taming.models.vqvae2 import VQVAE2
from taming.modules.vqvae.base import LoopTrace, Quantizer, QuantizerOutput
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.pictures import save_picture, side_by_side
from taming.run.folder import model_from_run
from taming.run.script import check_folder, choose_device, run

logger = logging.getLogger("taming.reconstruct")

EXACT = 1e-10  # least mean square of an error, for JSON has no infinite PSNR; 100 dB


def load_image(path: Path, size: int | None, site: int) -> Tensor:
    """Read an image, scale its short side, and cut its sides to whole sites.

    Args:
        path: An image file.
        size: Length of the short side in pixels; None keeps it.
        site: Side of a site in pixels.

    Returns:
        (1, 3, H, W) float32 in [-1, 1].

    Raises:
        ValueError: The file is no image, or smaller than a site.
    """
    with error_context(str(path)):
        picture = decode_image(path)
    height, width = picture.shape[1:]
    scaled = (height, width) if size is None else scale_short_side(height, width, size)
    rows, columns = (side // site * site for side in scaled)
    if rows < 1 or columns < 1:
        raise ValueError(f"{path}: {scaled[1]}x{scaled[0]} is smaller than a site of {site} pixels")
    view = View(scaled, (scaled[0] - rows) // 2, (scaled[1] - columns) // 2, rows, columns)
    return torch.from_numpy(to_unit_range(view.apply(picture, antialias=True))).permute(2, 0, 1)[
        None
    ]


def add_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that set the rate of a loopy tokenizer, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--threshold",
        type=float,
        help="distance at which a loop ends, as a share of the latents' standard deviation",
    )
    group.add_argument("--max-tokens", type=int, help="most tokens (slots written) per image")
    group.add_argument("--target-psnr", type=float, help="fewest tokens that reach this PSNR in dB")


def chosen_rate(options: argparse.Namespace, model: VQModel) -> dict[str, float]:
    """Arguments of `VQModel.encode` from the flags; none where no flag is given."""
    rate = {name: getattr(options, name) for name in ("threshold", "max_tokens", "target_psnr")}
    rate = {name: value for name, value in rate.items() if value is not None}
    if "threshold" in rate and isinstance(model.quantize, LoopyVectorQuantizer):
        rate["threshold"] *= float(model.quantize.latent_std)
    return rate


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name the results of each image: its stem, with a number where several images have it."""
    names: list[str] = []
    taken: set[str] = set()  # some file systems take no notice of capitals
    for path in paths:
        candidates = (f"{path.stem}_{number}" if number > 1 else path.stem for number in count(1))
        free = (n for n in candidates if taken.isdisjoint(f.casefold() for f in files_of(n)))
        names.append(next(free))
        taken.update(file.casefold() for file in files_of(names[-1]))
    return names


def files_of(name: str) -> tuple[str, str, str]:
    """Files that are written for an image: reconstruction, turns, and both beside it."""
    return f"{name}.png", f"{name}_depth.png", f"{name}_compare.png"


def refuse_overwriting(paths: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    """Refuse a folder of results in which an image itself would be overwritten.

    Raises:
        ValueError: Names the image.
    """
    images = {path.resolve() for path in paths}
    for file in (folder / file for name in names for file in files_of(name)):
        if file.resolve() in images:
            raise ValueError(f"{file} is one of the images: choose another folder with -o")


def widest_ending(trace: LoopTrace) -> float:
    """Largest distance at which a loop ended by itself; 0 where none did."""
    return float(trace.distances[trace.within].max()) if trace.within.any() else 0.0


def code_maps(model: VQModel, quantized: QuantizerOutput) -> list[tuple[Quantizer, Tensor]]:
    """Every quantizer of a model and the codes (1, h, w, T) that it gave to an image."""
    if isinstance(model, VQVAE2):
        return list(zip(model.quantize.levels, quantized.info.indices, strict=True))
    h, w = quantized.z_q.shape[2:]
    return [(model.quantize, quantized.info.indices.reshape(1, h, w, -1))]


@torch.no_grad()
def reconstruct(
    model: VQModel, x: Tensor, rate: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode and decode one image.

    Args:
        model: The tokenizer, in eval mode.
        x: (1, 3, H, W) in [-1, 1].
        rate: At most one of the arguments of `VQModel.encode` that set a rate.

    Returns:
        Pictures (3, H, W) by name, and numbers by name.
    """
    quantized = model.encode(x, **rate)
    x_rec = model.decode(quantized.z_q).clamp(-1, 1)
    maps = [(quantizer.sequence, codes) for quantizer, codes in code_maps(model, quantized)]
    written = [sequence.encode(codes)[0].shape[1] for sequence, codes in maps]
    bits = [n * math.log2(s.vocab_size) for n, (s, _) in zip(written, maps, strict=True)]
    shown = model.code_pictures(quantized, (x.shape[2], x.shape[3]))
    shown = {"input": x, "reconstruction": x_rec, **shown}
    pictures = {name: picture[0] for name, picture in shown.items()}
    numbers = {
        "size": [x.shape[3], x.shape[2]],
        "sites": sum(codes[..., 0].numel() for _, codes in maps),
        "tokens": sum(int((codes >= 0).sum()) for _, codes in maps),
        "sequence_length": sum(written),
        "bits": sum(bits),
        "psnr": -10 * math.log10(max(float((x - x_rec).square().mean()) / 4, EXACT)),
    }
    trace = quantized.info.encodings
    if isinstance(trace, LoopTrace) and isinstance(model.quantize, LoopyVectorQuantizer):
        numbers["threshold"] = widest_ending(trace) / float(model.quantize.latent_std)
        numbers["never_within_threshold"] = int((~trace.within).sum())
        numbers["turns_per_site"] = float(trace.lengths.float().mean())
        numbers["turns"] = torch.bincount(
            trace.lengths.flatten(), minlength=model.quantize.sequence.max_loops + 1
        ).tolist()[1:]
    return pictures, numbers


def save_pictures(pictures: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Write ``<name>.png``, ``<name>_depth.png`` of a loopy tokenizer, ``<name>_compare.png``."""
    reconstruction, depth, compare = (folder / file for file in files_of(name))
    save_picture(pictures["reconstruction"], reconstruction)
    if "lengths" in pictures:
        save_picture(pictures["lengths"], depth)
    save_picture(side_by_side(*pictures.values()), compare)


def load_tokenizer(run: str) -> VQModel:
    """Build the tokenizer of a run.

    Raises:
        ValueError: It is none, or not one of coloured images.
    """
    model = model_from_run(run)
    if not isinstance(model, VQModel):
        raise ValueError(f"{run} holds a {type(model).__name__}, not a tokenizer")
    channels = model.encoder.conv_in.in_channels
    if channels != 3:
        raise ValueError(f"{run} is a tokenizer of {channels} channels, not of colours")
    return model


def main() -> None:
    """Reconstruct each image, and write ``reconstructions.json`` of all."""
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
    device = choose_device(options.device)
    model = load_tokenizer(options.resume).to(device)
    rate = chosen_rate(options, model)
    site = model.encoder.factor * (model.quantize.factors[0] if isinstance(model, VQVAE2) else 1)
    report: dict[str, dict[str, Any]] = {}
    try:
        for path, name in tqdm(zip(paths, names, strict=True), "reconstruct", len(paths)):
            x = load_image(path, options.size, site).to(device)
            with error_context(str(path)):
                pictures, numbers = reconstruct(model, x, rate)
            save_pictures(pictures, options.outdir, name)
            report[str(path)] = numbers
    finally:
        if report:  # those before an image that fails are not lost
            (options.outdir / "reconstructions.json").write_text(json.dumps(report, indent=2))
    for name, numbers in report.items():
        if numbers["psnr"] < rate.get("target_psnr", -math.inf):
            logger.warning("%s reaches %.2f dB with all its turns", name, numbers["psnr"])
    logger.info("%d reconstructions in %s", len(paths), options.outdir)


if __name__ == "__main__":
    run(main)
