"""Compare large pictures that go through a tokenizer in tiles with the same ones whole.

python -m benchmarks.tiles -r logs/<run of a tokenizer> pictures/*.png

For each picture and for a mosaic of all, the share of sites with the same first code, how close the
decoded pictures are, and the error beside the borders of tiles over that elsewhere. Then the time
of encoding and decoding per megapixel by size.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import taming
from benchmarks.timing import in_turn, save, table
from taming.modules.tiling import spans
from taming.run.cli import run, script_parser
from taming.tokenizer import Tokenizer

logger = logging.getLogger("taming.benchmark")

SIDES = (64, 128, 256, 512, 1024, 2048)


@contextmanager
def tile_of(tokenizer: Tokenizer, tile: int | None) -> Iterator[None]:
    """Set the tile for a while."""
    before, tokenizer.tile = tokenizer.tile, tile
    try:
        yield
    finally:
        tokenizer.tile = before


def psnr(images: Tensor, others: Tensor) -> float:
    """Return the PSNR in dB of images in [-1, 1]."""
    error = (images.clamp(-1, 1) - others.clamp(-1, 1)).square().mean()
    return float(-10 * torch.log10(error / 4))


def beside_borders(errors: Tensor, tile: int, factor: int) -> float:
    """Return the mean error (H, W) beside the borders of tiles over that elsewhere."""
    marked = torch.zeros(errors.shape, dtype=torch.bool)
    for axis, length in enumerate(errors.shape):
        for start, _ in spans(length // factor, tile // factor)[1:]:
            marked.narrow(axis, start * factor - 4, 8).fill_(True)
    return float(errors[marked].mean() / errors[~marked].mean())


def compare(tokenizer: Tokenizer, name: str, x: Tensor, tile: int) -> dict[str, Any]:
    """Compare tiles of one size with the whole picture x (1, 3, H, W).

    Args:
        tokenizer: The tokenizer.
        name: Of the picture.
        x: The picture.
        tile: Side of a tile in pixels.

    Returns:
        The row of the table.
    """
    model = tokenizer.model
    with tile_of(tokenizer, None):
        wanted = model.encode(x)
        image = model.decode(wanted.z_q)
    with tile_of(tokenizer, tile):
        found = model.encode(x)
        own = model.decode(found.z_q)
        decoded = model.decode(wanted.z_q)  # the same codes
    first, other = (model.codes_by_level(q)[""][..., 0] for q in (wanted, found))
    errors = (decoded - image).square().mean(dim=1)[0]
    return {
        "picture": f"{name} {x.shape[3]}x{x.shape[2]}",
        "tile": tile,
        "same first code": float((first == other).float().mean()),
        "decoder, dB": psnr(decoded, image),
        "both, dB": psnr(own, image),
        "PSNR changes by, dB": psnr(own, x) - psnr(image, x),
        "borders": beside_borders(errors, tile, model.factor) if tile < max(x.shape) else 1.0,
    }


def times(tokenizer: Tokenizer, picture: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time encoding and decoding by side of a picture, cut from a mosaic of ``picture``."""
    sides: dict[str, Callable[[], object]] = {}
    for side in SIDES:
        copies = [-(-side // length) for length in picture.shape[1:]]
        cut = picture.repeat(1, *copies)[:, :side, :side]
        sides[f"{side} encode"] = partial(tokenizer.encode, cut)
        sides[f"{side} decode"] = partial(tokenizer.decode, tokenizer.encode(cut))
    found = in_turn(sides, repeats)
    rows = []
    for side in SIDES:
        encode, decode = (
            found[f"{side} {way}"].cpu / side**2 * 1e6 for way in ("encode", "decode")
        )
        rows.append({"side": side, "encode, s/MP": encode, "decode, s/MP": decode})
        rows[-1]["together"] = encode + decode
    return rows


@torch.no_grad()
def main() -> None:
    """Log the tables and save them."""
    parser: argparse.ArgumentParser = script_parser(__doc__, device=False)
    parser.add_argument("-r", "--resume", required=True, help="run of a tokenizer")
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures of one size, 6 or more")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer: Any = taming.load(options.resume)
    images = [tokenizer.to_tensor(path) for path in options.pictures]
    rows = [
        compare(tokenizer, path.stem, image[None], tile)
        for path, image in zip(options.pictures[:3], images, strict=False)
        for tile in (256, 512)
    ]
    upper, lower = (torch.cat(images[i : i + 3], dim=2) for i in (0, 3))
    mosaic = torch.cat([upper, lower], dim=1)
    rows += [compare(tokenizer, "mosaic", mosaic[None], tile) for tile in (512, 768)]
    logger.info("Tiles against the whole picture:\n%s", table(rows))
    growth = times(tokenizer, mosaic, options.repeats)
    logger.info("Processor time of one thread:\n%s", table(growth))
    logger.info("saved %s", save("tiles", [*rows, *growth]))


if __name__ == "__main__":
    run(main)
