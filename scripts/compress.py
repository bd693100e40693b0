"""Compress pictures to files of a trained tokenizer's codes.

python scripts/compress.py -r logs/<run> photo.jpg folder/ -o files
python scripts/compress.py -r logs/<run> photo.jpg -o files --bpp 0.2

At most one flag sets the rate; without one, the tokenizer's own counts. scripts/decompress.py turns
the files, photo.loop and so on, back into pictures. compressed.json reports each picture's bytes,
bits per pixel, PSNR in dB, MS-SSIM (null below 176 pixels, or without torchmetrics), seconds of
compressing, and what its file follows from; with --target_psnr, ``reached`` is false where even all
turns are too few. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taming
from taming.extras import naming_extras
from taming.run import cli
from taming.util import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from taming.tokenizer import Tokenizer

logger = logging.getLogger("taming.compress")

Quality = Callable[["Tensor", "Tensor"], dict[str, float | None]]
RATES = ("bpp", "bits", "target_psnr", "rate", "max_codes")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="+", type=cli.existing, help="image files or folders of them")
    run = "tokenizer: a run, a checkpoint, or the name of one that ships (default: %(default)s)"
    add("-r", "--resume", default="photos", type=cli.existing_run, help=run)
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add("-o", "--outdir", required=True, type=Path)
    add("--entropy", choices=("raw", "static", "context"), help="default: the best there is")
    add("--no_quality", action="store_true", help="do not decode again to measure the quality")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--bpp", type=cli.rate, help="most bits of the file per pixel")
    add("--bits", type=cli.rate, help="most bits of the file")
    add("--target_psnr", type=cli.rate, help="PSNR in dB to reach with fewest codes")
    add("--rate", type=cli.rate, help="lambda, what a bit is worth in squared distance")
    add("--max_codes", type=int, help="largest number of codes of a picture")
    options = parser.parse_args()
    cli.check_folder(options.outdir)
    return options


def quality_measure() -> Quality:
    """Return a measure of PSNR in dB and MS-SSIM of images (C, H, W) in [-1, 1]."""
    from taming.pictures import psnr_of

    try:
        with naming_extras():
            from taming.evaluation.measures import LEAST_SIDE, ms_ssim
    except ValueError as error:
        logger.warning("MS-SSIM is not measured: %s", error)
        return lambda x, x_rec: {"psnr": psnr_of(x, x_rec), "ms_ssim": None}

    def measure(x: Tensor, x_rec: Tensor) -> dict[str, float | None]:
        is_large = min(x.shape[1:]) >= LEAST_SIDE
        found = float(ms_ssim(x[None], x_rec[None], data_range=2.0)) if is_large else None
        return {"psnr": psnr_of(x, x_rec), "ms_ssim": found}

    return measure


def compress(
    tokenizer: Tokenizer, measure: Quality | None, path: Path, output: Path, **options: Any
) -> dict[str, Any]:
    """Compress a picture file to another file; return its numbers by name."""
    start = time.perf_counter()
    data = tokenizer.compress(path, **options)
    seconds = time.perf_counter() - start
    x = tokenizer.to_tensor(path)
    height, width = x.shape[1:]
    numbers = {"file": output.name, "size": [width, height], "bytes": len(data)}
    numbers |= {"bpp": 8 * len(data) / (height * width), "seconds": seconds}
    if measure is not None:
        codes = tokenizer.unpack(data)
        numbers |= measure(x, tokenizer.decode_image(codes))
        if target := options.get("target_psnr"):
            # Rounding to the 256 levels of a file may take away what the codes have reached.
            numbers["reached"] = numbers["psnr"] >= target or len(codes) < codes.levels[0].numel()
    with replacing(output) as part:  # at last: an interruption leaves no file that is not reported
        part.write_bytes(data)
    return numbers


def remarks(target: float | None, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what pictures lack: the PSNR in dB that was wanted, or an MS-SSIM."""
    from taming.files import unreached

    yield from unreached(rows, target)
    if missing := sum(row.get("ms_ssim", 0) is None for row in rows):
        why = "they are below 176 pixels, or torchmetrics is missing"
        yield f"{missing} of {len(rows)} pictures have no MS-SSIM: {why}"


def main() -> None:
    """Compress each picture, and save ``compressed.json`` with the numbers of all.

    Raises:
        ValueError: A picture could not be compressed, or another file of its name is there.
    """
    options = parse_options()
    from taming.codec.files import Codec
    from taming.data.custom import find_files, unique_names
    from taming.files import each_file
    from taming.tokenizer import Tokenizer

    paths = find_files(options.pictures)
    names = unique_names(paths, [cli.COMPRESSED])
    outputs = [options.outdir / f"{name}{cli.COMPRESSED}" for name in names]
    device = cli.choose_device(options.device)
    loaded = taming.load(options.resume, device, trust_config=options.trust_config)
    tokenizer = cli.check_kind(loaded, Tokenizer, options.resume, "a tokenizer")
    rate = {name: value for name in RATES if (value := getattr(options, name)) is not None}
    tokenizer.model.check_rate(rate.keys() - {"bpp", "bits"})
    measure = None if options.no_quality else quality_measure()
    codec = Codec(tokenizer.model, tokenizer.context, tokenizer.name)
    models = codec.tokenizer + codec.entropy_model(options.entropy).fingerprint()
    chosen = {"entropy": options.entropy, **rate}
    origin = {"models": models.hex(), "quality": measure is not None, **chosen}
    work = partial(compress, tokenizer, measure, **chosen)
    say = partial(remarks, rate.get("target_psnr"))
    each_file(work, paths, outputs, options.outdir / "compressed.json", origin, say)


if __name__ == "__main__":
    cli.run(main)
