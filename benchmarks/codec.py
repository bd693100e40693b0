"""Compare files of a tokenizer with JPEG, WebP and AVIF: quality at equal bits per pixel.

python -m benchmarks.codec KODAK_FOLDER [-r photos] [--bpp 0.05 0.1 0.15] [--plot codec.png]

Bits are those of whole files, headers included; Pillow writes and reads the other three. The
qualities of a table's row are means over the pictures. A second table compares the tokenizer with
each of the others at equal bits, by linear interpolation between its settings. All run on one
thread. ``--perceptual`` measures ST-LPIPS too, which takes two minutes for each picture.
``--example PICTURE 0.1 FILE`` shows a picture, its file of 0.1 bits per pixel, and JPEG's.
"""

from __future__ import annotations

import argparse
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import taming
from benchmarks.timing import save, table
from taming.data.paths import find_images
from taming.evaluation.measures import Measure, ms_ssim
from taming.evaluation.networks import shift_tolerant
from taming.run.cli import run, script_parser
from taming.tokenizer import Tokenizer

logger = logging.getLogger("taming.benchmark")

QUALITIES = {
    "JPEG": (1, 3, 5, 8, 12),
    "WebP": (0, 1, 5, 10),
    "AVIF": (5, 15, 20, 25, 30),
}
QUALITY = ("psnr", "ms_ssim", "st_lpips")
TIMES = ("write_s_per_mp", "read_s_per_mp")


class Side(NamedTuple):
    """A codec at one setting.

    Attributes:
        codec: Its name.
        setting: Its quality, or the bits per pixel that it keeps to.
        write: Picture -> file.
        read: File -> picture.
    """

    codec: str
    setting: float
    write: Callable[[Image.Image], bytes]
    read: Callable[[bytes], Image.Image]


def _write(picture: Image.Image, kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}.get(kind, {})
    picture.save(file, kind, quality=quality, **options)
    return file.getvalue()


def _read(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def sides(tokenizer: Tokenizer, bpps: Sequence[float]) -> Iterator[Side]:
    """Yield the tokenizer at each number of bits per pixel, and the others at each quality."""
    for bpp in bpps:
        yield Side("loop", bpp, partial(tokenizer.compress, bpp=bpp), tokenizer.decompress)
    for kind, qualities in QUALITIES.items():
        for quality in qualities:
            yield Side(kind, quality, partial(_write, kind=kind, quality=quality), _read)


def _bytes(picture: Image.Image) -> Tensor:
    """Turn a picture into (1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def distance_from(picture: Image.Image, perceptual: Measure) -> Callable[[Image.Image], float]:
    """Return the perceptual distance of pictures from this one, whose features are kept."""
    assert perceptual.compare is not None
    seen, compare = perceptual.see(_bytes(picture)), perceptual.compare
    return lambda other: float(compare(seen, perceptual.see(_bytes(other))))


def measure(
    side: Side, picture: Image.Image, distance: Callable[[Image.Image], float] | None
) -> dict[str, float] | None:
    """Write and read a picture; None if the codec cannot keep to so few bits.

    Args:
        side: Codec and setting.
        picture: RGB, each side at least 161 pixels, as MS-SSIM needs.
        distance: Perceptual distance of another picture from this one.

    Returns:
        Bits per pixel of the file, PSNR in dB, MS-SSIM, the distance if there is one, and seconds
        of processor time per megapixel.
    """
    start = time.process_time()
    try:
        data = side.write(picture)
    except ValueError:  # it names the smallest size
        return None
    written = time.process_time()
    decoded = side.read(data)
    ended = time.process_time()
    image, again = _bytes(picture).double(), _bytes(decoded).double()
    pixels = picture.width * picture.height
    error = (image - again).square().mean()
    found = {
        "bpp": 8 * len(data) / pixels,
        "psnr": float(20 * np.log10(255) - 10 * error.log10()),
        "ms_ssim": float(ms_ssim(image.float(), again.float())),
    }
    if distance is not None:
        found["st_lpips"] = distance(decoded)
    times = ((written - start) / pixels * 1e6, (ended - written) / pixels * 1e6)
    return found | dict(zip(TIMES, times, strict=True))


def at_equal_bits(rows: list[dict[str, Any]], codec: str) -> list[dict[str, Any]]:
    """Compare the tokenizer with a codec at the tokenizer's bits, where the codec reaches them."""
    own = [row for row in rows if row["codec"] == "loop"]
    others = sorted((row for row in rows if row["codec"] == codec), key=lambda row: row["bpp"])
    bpps = [row["bpp"] for row in others]
    names = [name for name in QUALITY if name in rows[0]]
    found = []
    for row in own:
        if bpps and bpps[0] <= row["bpp"] <= bpps[-1]:
            theirs = {n: np.interp(row["bpp"], bpps, [o[n] for o in others]) for n in names}
            gains = {n: float(row[n] - theirs[n]) for n in names}
            found.append({"beside": codec, "bpp": row["bpp"], **gains})
    return found


def mean_rows(measured: dict[Side, list[dict[str, float] | None]]) -> list[dict[str, Any]]:
    """Average over pictures; left out is a side with too few bits for some of them."""
    rows = []
    for side, found in measured.items():
        small = [numbers for numbers in found if numbers]
        if len(small) == len(found):
            means = {name: mean(numbers[name] for numbers in small) for name in small[0]}
            rows.append({"codec": side.codec, "setting": side.setting, **means})
        else:
            missing = len(found) - len(small)
            logger.warning("%s at %g: %d pictures need more", side.codec, side.setting, missing)
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot PSNR and MS-SSIM against bits per pixel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (number, title) in zip(
        axes, (("psnr", "PSNR, dB"), ("ms_ssim", "MS-SSIM")), strict=True
    ):
        for codec in dict.fromkeys(row["codec"] for row in rows):
            points = [row for row in rows if row["codec"] == codec]
            axis.plot([p["bpp"] for p in points], [p[number] for p in points], "o-", label=codec)
        axis.set(xlabel="bits per pixel of the file", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=120)


def example(picture: Image.Image, tokenizer: Tokenizer, bpp: float, side: int = 400) -> Image.Image:
    """Show the middle of a picture, of its file of so many bits, and of JPEG's of at most as many.

    Where JPEG has none, its smallest is shown.
    """
    data = tokenizer.compress(picture, bpp=bpp)
    files = [_write(picture, "JPEG", quality) for quality in range(1, 96)]
    jpeg = max((f for f in files if len(f) <= len(data)), key=len, default=min(files, key=len))
    bits = [8 * len(f) / (picture.width * picture.height) for f in (data, jpeg)]
    logger.info("example: %.3f bits per pixel, and %.3f of JPEG", *bits)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    sheet = Image.new("RGB", (3 * side, side))
    for number, shown in enumerate((picture, tokenizer.decompress(data), _read(jpeg))):
        sheet.paste(shown.crop((left, top, left + side, top + side)), (number * side, 0))
    return sheet


def main() -> None:
    """Measure all sides on all pictures."""
    parser = script_parser(__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("pictures", type=Path, help="folder of pictures, held out in training")
    parser.add_argument("-r", "--run", default="photos", help="tokenizer (default: %(default)s)")
    bpps = [0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25]
    parser.add_argument("--bpp", type=float, nargs="+", default=bpps, help="(default: %(default)s)")
    parser.add_argument("-n", type=int, help="number of pictures (default: all)")
    parser.add_argument("--perceptual", action="store_true", help="measure ST-LPIPS too")
    parser.add_argument("--plot", type=Path, help="file of the plot")
    shown = ("PICTURE", "BPP", "FILE")
    parser.add_argument("--example", nargs=3, metavar=shown, help="picture to show as files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer: Any = taming.load(options.run)
    paths = [options.pictures / name for name in find_images(str(options.pictures))][: options.n]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    perceptual = shift_tolerant(torch.device("cpu")) if options.perceptual else None
    if options.example:
        name, bpp, file = options.example
        example(Image.open(name).convert("RGB"), tokenizer, float(bpp)).save(file, quality=92)
    measured: dict[Side, list[dict[str, float] | None]] = {
        side: [] for side in sides(tokenizer, options.bpp)
    }
    for picture in tqdm(pictures, desc="pictures"):
        distance = perceptual and distance_from(picture, perceptual)
        for side, found in measured.items():
            found.append(measure(side, picture, distance))
    rows = mean_rows(measured)
    logger.info("%d pictures\n\n%s\n", len(pictures), table(rows))
    gains = [row for codec in QUALITIES for row in at_equal_bits(rows, codec)]
    if gains:
        logger.info("the tokenizer above the others at equal bits\n\n%s", table(gains))
    logger.info("saved %s", save("codec_perceptual" if perceptual else "codec", rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    run(main)
