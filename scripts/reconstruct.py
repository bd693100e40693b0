"""Encode and decode images with a trained tokenizer.

python scripts/reconstruct.py -r logs/<run> picture.jpg folder/ -o results
python scripts/reconstruct.py -r logs/<run> picture.jpg -s 256 --max_codes 4000

The rate of a loopy tokenizer can be set by the distance at which loops end, by the number of codes,
by the quality wanted, by the worth of a bit, or by the number of bits. reconstructions.json reports
the numbers of each image. For a VQ-VAE-2, the comparison also shows what the upper levels decode to
alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taming
from taming.run import cli
from taming.util import at_least

if TYPE_CHECKING:
    from torch import Tensor

    from taming.models.vqgan import VQModel

ENDINGS = (".png", "_lengths.png", "_compare.png")


def latent_std(model: VQModel) -> float:
    """Return the standard deviation of a loopy tokenizer's latents, 1 where it is not measured."""
    return float(getattr(model.quantize, "latent_std", 1.0))


def chosen_rate(options: argparse.Namespace, model: VQModel) -> dict[str, float]:
    """Turn the flags into arguments of `VQModel.encode`; {} if none is given."""
    names = ("threshold", "max_codes", "target_psnr", "rate", "target_bits")
    rate = {name: getattr(options, name) for name in names}
    rate = {name: value for name, value in rate.items() if value is not None}
    if "threshold" in rate:
        rate["threshold"] *= latent_std(model)
    return rate


def files_of(name: str) -> list[str]:
    """Return the files of an image: reconstruction, lengths, and all pictures side by side."""
    return [f"{name}{ending}" for ending in ENDINGS]


def refuse_overwriting(paths: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    """Refuse a folder of results in which an input would be overwritten.

    Raises:
        ValueError: Names the image.
    """
    images = {path.resolve() for path in paths}
    for file in (folder / file for name in names for file in files_of(name)):
        if file.resolve() in images:
            raise ValueError(f"{file} is one of the images: choose another folder with -o")


def reconstruct(
    model: VQModel, x: Tensor, rate: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode and decode one image.

    Args:
        model: The tokenizer, in eval mode.
        x: (1, 3, H, W) in [-1, 1], of any size: it is extended to whole sites and cut back.
        rate: At most one argument of `VQModel.encode` that sets a rate.

    Returns:
        Pictures (3, H, W) by name, and numbers by name.
    """
    import torch

    from taming.pictures import pad, psnr_of

    height, width = x.shape[2:]
    padded = pad(x[0], model.factor)[None]
    quantized = model.encode(padded, **rate, size=(height, width))
    x_rec = model.decode(quantized.z_q).clamp(-1, 1)[..., :height, :width]  # (1, 3, H, W)
    pictures = {"input": x, "reconstruction": x_rec}
    extra = model.code_pictures(quantized, (padded.shape[2], padded.shape[3]))
    pictures |= {name: picture[..., :height, :width] for name, picture in extra.items()}
    counts: dict[str, Any] = dict.fromkeys(("sites", "codes", "tokens", "bits"), 0)
    codes = model.codes_by_level(quantized)
    for level, grid in codes.items():  # (1, h, w, T)
        sequence = model.levels[level].sequence
        tokens = sequence.encode(grid)[0].shape[1]
        counts["sites"] += grid[..., 0].numel()
        counts["codes"] += int((grid >= 0).sum())
        counts["tokens"] += tokens
        counts["bits"] += tokens * math.log2(sequence.vocab_size)
    numbers = {"size": [width, height], **counts}
    numbers["psnr"] = psnr_of(x, x_rec)
    numbers["table_bits"] = float(model.bits_of([*codes.values()] if len(codes) > 1 else codes[""]))
    if trace := model.quantize.traces(quantized).get(""):
        reached = trace.distances[trace.within]
        turns = torch.bincount(
            trace.lengths.flatten(), minlength=model.quantize.sequence.max_loops + 1
        )
        own = "threshold" if getattr(model.quantize, "rate", None) is None else "rate"
        if not {"rate", "target_bits"} & {*(rate or [own])}:  # by which no threshold ends a loop
            largest = float(reached.max()) / latent_std(model) if len(reached) else 0.0
            never = float((~trace.within).float().mean())
            numbers |= {"threshold": largest, "never_within_threshold": never}
        numbers |= {
            "turns_per_site": float(trace.lengths.float().mean()),
            "turns": turns.tolist()[1:],
        }
    return {name: picture[0] for name, picture in pictures.items()}, numbers


def save_pictures(pictures: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Save the reconstruction, the lengths if there are any, and all pictures side by side."""
    from taming.pictures import save_picture, side_by_side

    reconstruction, lengths, compare = (folder / file for file in files_of(name))
    save_picture(pictures["reconstruction"], reconstruction)
    if "lengths" in pictures:
        save_picture(pictures["lengths"], lengths)
    save_picture(side_by_side(*pictures.values()), compare)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=cli.existing, help="image files or folders of them")
    run = "tokenizer: a run, a checkpoint, or the name of one that ships (default: %(default)s)"
    add("-r", "--resume", default="photos", type=cli.existing_run, help=run)
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add("-o", "--outdir", default="results/reconstructions", type=Path)
    add("-s", "--size", type=int, help="length of the short side in pixels")
    add = parser.add_mutually_exclusive_group().add_argument
    threshold_help = "distance at which a loop ends, as a share of the latents' standard deviation"
    add("--threshold", type=cli.rate, help=threshold_help)
    add("--max_codes", type=int, help="largest number of codes of an image")
    add("--target_psnr", type=cli.rate, help="PSNR in dB to reach with fewest codes")
    rate_help = "lambda: codes and ends of least squared distance + lambda x bits of the tables"
    add("--rate", type=cli.rate, help=rate_help)
    add("--target_bits", type=cli.rate, help="largest number of those bits")
    options = parser.parse_args()
    cli.check_folder(options.outdir)
    at_least(1, **{"--size": options.size})
    return options


def main() -> None:
    """Reconstruct each image, and save ``reconstructions.json`` with the numbers of all.

    Raises:
        ValueError: An image could not be used.
    """
    options = parse_options()
    from taming.data.custom import find_files, unique_names
    from taming.files import each_file, unreached
    from taming.pictures import load_image
    from taming.tokenizer import Tokenizer

    paths = find_files(options.images)
    names = unique_names(paths, ENDINGS)
    refuse_overwriting(paths, names, options.outdir)
    device = cli.choose_device(options.device)
    loaded = taming.load(options.resume, device, trust_config=options.trust_config)
    tokenizer = cli.check_kind(loaded, Tokenizer, options.resume, "a tokenizer")
    if (channels := tokenizer.channels) != 3:
        raise ValueError(f"{options.resume} holds a tokenizer of {channels} channels, not 3")
    model = tokenizer.model
    rate = chosen_rate(options, model)
    model.check_rate(rate)
    target = rate.get("target_psnr")

    def work(path: Path, output: Path) -> dict[str, Any]:
        x = load_image(path, options.size)[None].to(model.device)
        pictures, numbers = reconstruct(model, x, rate)
        save_pictures(pictures, output.parent, output.name)
        if target:
            most = numbers["sites"] * model.quantize.sequence.max_loops
            numbers["reached"] = numbers["psnr"] >= target or numbers["codes"] < most
        return numbers

    outputs, report = [options.outdir / name for name in names], "reconstructions.json"
    say = partial(unreached, target=target)
    each_file(work, paths, outputs, options.outdir / report, remarks=say)


if __name__ == "__main__":
    cli.run(main)
