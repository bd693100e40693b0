"""Decompress files of scripts/compress.py to pictures.

python scripts/decompress.py -r logs/<run> files/ -o pictures
python scripts/decompress.py -r logs/<run> photo.loop -o previews --turns 1

The tokenizer must be the one that compressed them. decompressed.json reports each file's bytes,
bits per pixel and seconds of decompressing.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taming
from taming.run import cli

if TYPE_CHECKING:
    from taming.tokenizer import Tokenizer


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", type=cli.existing, help=f"{cli.COMPRESSED} files or folders of them")
    run = "tokenizer: a run, a checkpoint, or the name of one that ships (default: %(default)s)"
    add("-r", "--resume", default="photos", type=cli.existing_run, help=run)
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add("-o", "--outdir", required=True, type=Path)
    add("--turns", type=int, help="most turns to decode, as for a preview")
    partial_help = "decode a damaged or cut file from the turns before that place"
    add("--partial", action="store_true", help=partial_help)
    options = parser.parse_args()
    cli.check_folder(options.outdir)
    if options.turns is not None and options.turns < 1:
        raise ValueError(f"--turns must be at least 1, got {options.turns}")
    return options


def decompress(tokenizer: Tokenizer, path: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Decompress a file to a picture file; return its numbers by name."""
    from taming.pictures import save_picture

    data, start = path.read_bytes(), time.perf_counter()
    picture = tokenizer.decompress(data, **options)
    seconds = time.perf_counter() - start
    save_picture(picture, output)
    bpp = 8 * len(data) / (picture.width * picture.height)
    size = {"picture": output.name, "size": [*picture.size], "bytes": len(data), "bpp": bpp}
    return {**size, "seconds": seconds}


def main() -> None:
    """Decompress each file, and save ``decompressed.json`` with the numbers of all.

    Raises:
        ValueError: A file could not be decompressed, or a picture of its name is there already.
    """
    options = parse_options()
    from taming.data.custom import find_files, unique_names
    from taming.run.each import each_file
    from taming.tokenizer import Tokenizer

    paths = find_files(options.files, [cli.COMPRESSED])
    outputs = [options.outdir / f"{name}.png" for name in unique_names(paths, [".png"])]
    cli.refuse_existing(outputs)
    device = cli.choose_device(options.device)
    loaded = taming.load(options.resume, device, trust_config=options.trust_config)
    tokenizer = cli.check_kind(loaded, Tokenizer, options.resume, "a tokenizer")
    work = partial(decompress, tokenizer, turns=options.turns, partial=options.partial)
    each_file(work, paths, outputs, options.outdir / "decompressed.json")


if __name__ == "__main__":
    cli.run(main)
