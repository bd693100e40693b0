"""Time the codec's part of compressing, without the networks: codes to a file and back.

python -m benchmarks.codec_speed
python -m benchmarks.codec_speed --codes 4096 --factor 16
python -m benchmarks.codec_speed --pictures kodak/*.png --megapixels 6 12 24

Codes and lengths are sampled by tables in which the share of a code falls with its number as 1 / n,
and half of the sites of a turn go on. One thread; the bytes stand beside the bits of the tables.

With --pictures, the networks too: processor time and peak memory of scripts/compress.py with the
tokenizer that ships, in a process of its own for each mosaic of the pictures.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.timing import in_turn, save, table
from taming.codec.container import Header, decode_file, encode_file
from taming.codec.models import EntropyModel, Raw, Static
from taming.run.cli import run, script_parser

logger = logging.getLogger("taming.benchmark")


def zipf_tables(turns: int, codes: int) -> SimpleNamespace:
    """Entropy tables (T, K) and (T,) with shares of 1 / n, and half of the sites going on."""
    shares = 1 / torch.arange(1.0, codes + 1)
    on = torch.full((turns,), 0.5)
    on[-1] = 0
    return SimpleNamespace(codes=(shares / shares.sum()).repeat(turns, 1), going_on=on)


def sample_codes(tables: SimpleNamespace, grid: tuple[int, int]) -> Tensor:
    """Sample codes (h, w, T) by the tables."""
    sites = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.multinomial(s, sites, True, generator=generator) for s in tables.codes]
    on = torch.rand(sites, len(drawn), generator=generator) < tables.going_on  # (N, T)
    taken = torch.cat([torch.ones(sites, 1), on[:, :-1].cumprod(dim=1)], dim=1) > 0
    return torch.stack(drawn, dim=1).where(taken, -1).view(*grid, -1)


def bits_of(tables: SimpleNamespace, codes: Tensor) -> float:
    """Add up the bits of codes (h, w, T) by the shares of the tables."""
    bits = 0.0
    for turn, column in enumerate(codes.flatten(0, 1).unbind(1)):
        bits -= float(tables.codes[turn].double().log2()[column[column >= 0]].sum())
        bits += float((column >= 0).sum()) * (turn < codes.shape[-1] - 1)  # going on: half
    return bits


def to_file(model: EntropyModel, codes: Tensor, size: tuple[int, int]) -> bytes:
    """Write codes (h, w, T) of a picture of (H, W) pixels as a file."""
    segments = list(model.encode(codes))
    header = Header(model.mode, bytes(4), model.fingerprint(), size, len(segments))
    return encode_file(header, segments)


def from_file(model: EntropyModel, data: bytes, grid: tuple[int, int]) -> Tensor:
    """Read the codes of a grid (h, w) from a file."""
    return model.decode(decode_file(data)[1], grid)


def time_side(side: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the codec of a square picture; return a row for each entropy model."""
    tables: Any = zipf_tables(options.turns, options.codes)
    grid = (side // options.factor, side // options.factor)
    codes = sample_codes(tables, grid)
    models = {"raw": Raw(options.turns, options.codes, False), "static": Static(tables, False)}
    files = {name: to_file(model, codes, (side, side)) for name, model in models.items()}
    sides: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        sides[f"{name} encode"] = partial(to_file, model, codes, (side, side))
        sides[f"{name} decode"] = partial(from_file, model, files[name], grid)
    times, rows = in_turn(sides, options.repeats), []
    for name, data in files.items():
        encode, decode = (times[f"{name} {way}"].cpu for way in ("encode", "decode"))
        megapixels = side**2 / 1e6
        row = {"entropy": name, "side": side, "codes": int((codes >= 0).sum())}
        row |= {"bytes": len(data), "by the tables": round(bits_of(tables, codes) / 8)}
        row |= {"encode, ms": encode * 1000, "decode, ms": decode * 1000}
        rows.append({**row, "megapixels a second": megapixels / (encode + decode)})
    return rows


def mosaic(paths: Sequence[Path], megapixels: float) -> Image.Image:
    """Lay pictures out in rows, as a picture of 3 : 2 and so many megapixels."""
    columns = math.ceil(math.sqrt(len(paths)))
    width = round(math.sqrt(1.5e6 * megapixels))
    height = round(width / 1.5)
    whole, rows = Image.new("RGB", (width, height)), -(-len(paths) // columns)
    for number in range(rows * columns):
        (row, column), path = divmod(number, columns), paths[number % len(paths)]
        left, right = (width * n // columns for n in (column, column + 1))
        top, bottom = (height * n // rows for n in (row, row + 1))
        with Image.open(path) as picture:
            cell = ImageOps.fit(picture.convert("RGB"), (right - left, bottom - top))
        whole.paste(cell, (left, top))
    return whole


def compress_alone(path: Path, megapixels: float, *flags: str) -> dict[str, Any]:
    """Run scripts/compress.py on a picture file, one thread, without other numbers."""
    program = Path(__file__).parents[1] / "scripts/compress.py"
    outdir = path.with_suffix("")
    command = [sys.executable, str(program), str(path), "-o", str(outdir), *flags]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"{' '.join(command)} failed")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {"megapixels": megapixels, "flags": " ".join(flags)}
    row |= {"bytes": (outdir / f"{path.stem}.loop").stat().st_size}
    seconds = used.ru_utime + used.ru_stime
    row |= {"seconds": seconds, "seconds a megapixel": seconds / megapixels}
    return row | {"peak, MB": round(peak / 1e6), "float32, MB": 12.0 * megapixels}


def compress_mosaics(paths: Sequence[Path], sizes: Sequence[float]) -> None:
    """Log the table of whole compressions and save it."""
    rows: list[dict[str, Any]] = []
    for megapixels in sizes:
        for flags in (["--no_quality"], []):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "mosaic.png")
                mosaic(paths, megapixels).save(path, compress_level=1)
                rows.append(compress_alone(path, megapixels, *flags))
            logger.info("%s", rows[-1])  # the next may take minutes
    logger.info("Compressing, one thread:\n%s", table(rows))
    logger.info("saved %s", save("codec_memory", rows))


def main() -> None:
    """Log the table and save it."""
    parser: argparse.ArgumentParser = script_parser(__doc__, device=False)
    add = parser.add_argument
    add("--codes", type=int, default=1024, help="K (default: 1024)")
    add("--turns", type=int, default=4, help="T (default: 4)")
    add("--factor", type=int, default=8, help="side of a site in pixels (default: 8)")
    add("--sides", type=int, nargs="+", default=[256, 1024, 4896], help="of pictures, in pixels")
    add("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    add("--pictures", type=Path, nargs="+", help="compress mosaics of these instead")
    add("--megapixels", type=float, nargs="+", default=[6, 12, 24], help="sizes of the mosaics")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pictures:
        compress_mosaics(options.pictures, options.megapixels)
        return
    rows = [row for side in options.sides for row in time_side(side, options)]
    logger.info("Processor time of one thread:\n%s", table(rows))
    logger.info("saved %s", save("codec_speed", rows))


if __name__ == "__main__":
    run(main)
