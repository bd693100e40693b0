"""Draw new images from a trained prior, or complete given ones.

python scripts/sample.py -r logs/<run> -n 16
python scripts/sample.py -r logs/<run> -n 16 --classes 3,7
python scripts/sample.py -r logs/<run> --complete folder/ --known 0.5
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from taming.data.base import ImagePaths
from taming.data.custom import find_files
from taming.experiment import model_from_run
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.util import Labelator
from taming.pictures import save_picture, tile
from taming.script import choose_device, run

logger = logging.getLogger("taming.sample")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="run of the prior, or a checkpoint")
    parser.add_argument("-o", "--outdir", default="results/samples", type=Path)
    parser.add_argument("-n", "--num_samples", type=int, default=16, help="for each class, if any")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("-t", "--temperature", type=float, default=1.0)
    parser.add_argument("-k", "--top_k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("-p", "--top_p", type=float, help="draw among the likeliest of this mass")
    parser.add_argument("--classes", help="labels, such as 3,7, of a class-conditional prior")
    parser.add_argument("--complete", nargs="+", help="images or folders whose rest to draw")
    parser.add_argument("--known", type=float, default=0.5, help="known upper share of each")
    parser.add_argument("--grid", help="rows,columns of sites; default: what it was trained for")
    parser.add_argument("-s", "--seed", type=int, default=23)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options = parser.parse_args()
    if options.num_samples < 1 or options.batch_size < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    if not 0 <= options.known <= 1:
        raise ValueError(f"--known must be in [0, 1], got {options.known}")
    return options


def grid_of(model: Net2NetTransformer, wish: str | None) -> tuple[int, int]:
    """Rows and columns of sites, as wished or as the transformer's tables say."""
    shape = model.transformer.config.site_shape
    if wish is None:
        if shape is None:
            raise ValueError("this prior does not know its grid: give --grid rows,columns")
        return shape[0], shape[1]
    sides = wish.split(",")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--grid expects rows,columns such as 16,16, got {wish!r}")
    rows, columns = map(int, sides)
    if shape is not None and (rows > shape[0] or columns > shape[1]):
        raise ValueError(f"--grid {wish}: this prior knows at most {shape[0]}x{shape[1]} sites")
    return rows, columns


def labels_of(model: Net2NetTransformer, options: argparse.Namespace) -> list[int]:
    """The condition of each sample: its class, or the start token of an unconditional prior."""
    if model.be_unconditional:
        if options.classes:
            raise ValueError("--classes: this prior is unconditional")
        return [model.sos_token] * options.num_samples
    stage = model.cond_stage_model
    if not isinstance(stage, Labelator):
        raise ValueError(f"only classes can be given here, not what a {type(stage).__name__} takes")
    if not options.classes:
        raise ValueError("this prior is class-conditional: give --classes, such as 3,7")
    classes = options.classes.split(",")
    if not all(label.isdecimal() for label in classes):
        raise ValueError(f"--classes expects labels such as 3,7, got {options.classes!r}")
    highest = max(map(int, classes))
    if highest >= stage.n_classes:
        raise ValueError(
            f"--classes: this prior knows the labels 0 to {stage.n_classes - 1}, got {highest}"
        )
    return [int(label) for label in classes for _ in range(options.num_samples)]


def draw(
    model: Net2NetTransformer, known: Tensor, condition: Tensor, options: argparse.Namespace
) -> Tensor:
    """Draw images (B, 3, H, W) after known tokens (B, L0), with a progress bar per token."""
    grid = grid_of(model, options.grid)
    most = grid[0] * grid[1] * model.sequence.site_tokens - known.shape[1]
    with tqdm(total=most, desc="tokens", leave=False) as progress:

        def show(count: int) -> None:
            progress.update(count - progress.n)

        tokens = model.sample(
            known,
            condition,
            temperature=options.temperature,
            sample=True,
            top_k=options.top_k,
            top_p=options.top_p,
            grid=grid,
            callback=show,
        )
    channels = model.first_stage_model.quantize.e_dim
    return model.decode_to_img(tokens, (len(tokens), channels, *grid))


def sample(model: Net2NetTransformer, options: argparse.Namespace) -> None:
    """Write new images, one file each, and a grid of all."""
    labels = labels_of(model, options)
    condition = torch.tensor(labels, device=model.device)[:, None]
    images = []
    for part in tqdm(condition.split(options.batch_size), desc="batches"):
        images.append(draw(model, part[:, :0], part, options).cpu())
    for number, (label, image) in enumerate(zip(labels, torch.cat(images), strict=True)):
        name = f"{number:06}.png" if model.be_unconditional else f"{number:06}_class{label}.png"
        save_picture(image, options.outdir / name)
    save_picture(tile(torch.cat(images), 8), options.outdir / "grid.png")


def complete(model: Net2NetTransformer, options: argparse.Namespace) -> None:
    """Write a row for each image: input, its known part, and completions."""
    if not model.be_unconditional:
        raise ValueError("--complete needs an unconditional prior")
    grid, factor = grid_of(model, options.grid), model.first_stage_model.encoder.factor
    if grid[0] != grid[1]:
        raise ValueError(f"--complete needs a square grid, got {grid[0]}x{grid[1]}")
    images = ImagePaths(find_files(options.complete), grid[0] * factor, antialias=True)
    known_rows = round(options.known * grid[0])
    for number in tqdm(range(len(images)), desc="complete"):
        item = images[number]
        x = torch.from_numpy(item["image"]).permute(2, 0, 1)[None].to(model.device)
        _, tokens = model.encode_to_z(x)
        known = model.first_sites(tokens, known_rows * grid[1]).repeat(options.num_samples, 1)
        condition = tokens.new_full((options.num_samples, 1), model.sos_token)
        drawn = draw(model, known, condition, options)
        shown = x.clone()
        shown[:, :, known_rows * factor :] = 1.0
        row = torch.cat([x, shown, drawn])
        name = f"{Path(item['file_path_']).stem}_completed.png"
        save_picture(tile(row, len(row)), options.outdir / name)


def main() -> None:
    """Draw or complete, as asked."""
    options = parse_options()
    device = choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    model = model_from_run(options.resume)
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{options.resume} holds a {type(model).__name__}, not a prior")
    model = model.to(device)
    complete(model, options) if options.complete else sample(model, options)
    logger.info("pictures in %s", options.outdir)


if __name__ == "__main__":
    run(main)
