"""Decompress files of scripts/compress.py to pictures.

python scripts/decompress.py -r logs/<run> files/ -o pictures
python scripts/decompress.py -r logs/<run> photo.loop -o previews --turns 1

The tokenizer must be the one that compressed them. decompressed.json reports each file's bytes,
bits per pixel, seconds of decompressing, how many ``turns`` are shown ``of_turns`` of the file, and
what its picture follows from. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taming
from taming.run import cli

if TYPE_CHECKING:
    from taming.tokenizer import Tokenizer

logger = logging.getLogger("taming.decompress")


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


@cache
def advice(fingerprint: bytes) -> str:
    """Return which tokenizer to name for the files of a fingerprint."""
    from taming.codec.files import Codec
    from taming.run.parts import shipped
    from taming.tokenizer import Tokenizer

    for name in shipped():
        loaded = cli.check_kind(taming.load(name), Tokenizer, name, "a tokenizer")
        if Codec(loaded.model).tokenizer == fingerprint:
            return f"it is that of {name}: pass -r {name}"
    return "pass -r RUN of the tokenizer that wrote it"


def decompress(
    tokenizer: Tokenizer, own: bytes, path: Path, output: Path, **options: Any
) -> dict[str, Any]:
    """Decompress a file to a picture file; return its numbers by name.

    Raises:
        ValueError: As for `Tokenizer.decompress`; of another tokenizer than the ``own`` fingerprint
            is of, it says which to name.
    """
    from taming.codec.container import decode_file
    from taming.pictures import save_picture

    data, start = path.read_bytes(), time.perf_counter()
    header, segments = decode_file(data, options["partial"])
    if header.tokenizer != own:
        theirs = f"the file is of the tokenizer {header.tokenizer.hex()}"
        known = f"{tokenizer.name} is {own.hex()}"
        raise ValueError(f"{theirs}, and {known}; {advice(header.tokenizer)}")
    picture = tokenizer.decompress(data, **options)
    seconds = time.perf_counter() - start
    save_picture(picture, output)
    bpp = 8 * len(data) / (picture.width * picture.height)
    size = {"picture": output.name, "size": [*picture.size], "bytes": len(data), "bpp": bpp}
    turns = len(segments[: options["turns"]])
    return {**size, "turns": turns, "of_turns": header.segments, "seconds": seconds}


def remarks(turns: int | None, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the pictures that show fewer turns than were wanted, None for all."""
    for row in rows:
        if row["turns"] < min(row["of_turns"], turns or row["of_turns"]):
            shown = f"{row['picture']} shows {row['turns']} of {row['of_turns']} turns"
            yield f"{shown}: the rest of its file is damaged or cut off"


def main() -> None:
    """Decompress each file, and save ``decompressed.json`` with the numbers of all.

    Raises:
        ValueError: A file could not be decompressed, or another picture of its name is there.
    """
    options = parse_options()
    from taming.codec.files import Codec
    from taming.data.custom import find_files, unique_names
    from taming.files import each_file
    from taming.tokenizer import Tokenizer

    paths = find_files(options.files, [cli.COMPRESSED])
    outputs = [options.outdir / f"{name}.png" for name in unique_names(paths, [".png"])]
    device = cli.choose_device(options.device)
    loaded = taming.load(options.resume, device, trust_config=options.trust_config)
    tokenizer = cli.check_kind(loaded, Tokenizer, options.resume, "a tokenizer")
    turns, levels = options.turns, tokenizer.model.levels.values()
    if turns is not None and turns > (most := sum(own.sequence.max_loops for own in levels)):
        logger.warning("--turns %d shows all: a file has at most %d turns", turns, most)
    own = Codec(tokenizer.model).tokenizer
    chosen = {"turns": turns, "partial": options.partial}
    origin = {"run": tokenizer.name, "model": own.hex(), **chosen}
    work, say = partial(decompress, tokenizer, own, **chosen), partial(remarks, turns)
    each_file(work, paths, outputs, options.outdir / "decompressed.json", origin, say)


if __name__ == "__main__":
    cli.run(main)
