"""Time the codec's part of compressing, without the networks: codes to a file and back.

python -m benchmarks.codec_speed
python -m benchmarks.codec_speed --codes 4096 --factor 16

Codes and lengths are sampled by tables in which the share of a code falls with its number as 1 / n,
and half of the sites of a turn go on. One thread; the bytes stand beside the bits of the tables.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import in_turn, save, table
from taming.codec.container import Header, read, write
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
    return write(header, segments)


def from_file(model: EntropyModel, data: bytes, grid: tuple[int, int]) -> Tensor:
    """Read the codes of a grid (h, w) from a file."""
    return model.decode(read(data)[1], grid)


def main() -> None:
    """Log the table and save it."""
    parser: argparse.ArgumentParser = script_parser(__doc__, device=False)
    add = parser.add_argument
    add("--codes", type=int, default=1024, help="K (default: 1024)")
    add("--turns", type=int, default=4, help="T (default: 4)")
    add("--factor", type=int, default=8, help="side of a site in pixels (default: 8)")
    add("--sides", type=int, nargs="+", default=[256, 1024, 4896], help="of pictures, in pixels")
    add("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables: Any = zipf_tables(options.turns, options.codes)
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        grid = (side // options.factor, side // options.factor)
        codes = sample_codes(tables, grid)
        models = {"raw": Raw(options.turns, options.codes, False), "static": Static(tables, False)}
        files = {name: to_file(model, codes, (side, side)) for name, model in models.items()}
        sides: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            sides[f"{name} encode"] = partial(to_file, model, codes, (side, side))
            sides[f"{name} decode"] = partial(from_file, model, files[name], grid)
        times = in_turn(sides, options.repeats)
        for name, data in files.items():
            encode, decode = (times[f"{name} {way}"].cpu for way in ("encode", "decode"))
            megapixels = side**2 / 1e6
            row = {"entropy": name, "side": side, "codes": int((codes >= 0).sum())}
            row |= {"bytes": len(data), "by the tables": round(bits_of(tables, codes) / 8)}
            row |= {"encode, ms": encode * 1000, "decode, ms": decode * 1000}
            rows.append({**row, "megapixels a second": megapixels / (encode + decode)})
    logger.info("Processor time of one thread:\n%s", table(rows))
    logger.info("saved %s", save("codec_speed", rows))


if __name__ == "__main__":
    run(main)
