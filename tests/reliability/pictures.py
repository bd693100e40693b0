"""Picture files of all modes and formats, whole and damaged: decoded right, or refused by name.

python -m tests.reliability.pictures --n 400 --seed 0

A file is right if it becomes a tensor (3, H, W) of the reference's mean colours, and refused if the
error is a ValueError that names it. Flipped bytes of formats without checksums may change a picture
unnoticed: these are counted as altered. Anything else is wrong: another exception, a crash, a hang,
a file that is cut short and passes for whole, a picture turned black or white.
"""

from __future__ import annotations

import argparse
import io
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import Image, features

from taming.decoding import decode_image

RIGHT, REFUSED, ALTERED, WRONG = "right", "refused", "altered", "WRONG"
WIDTH, HEIGHT = 37, 23


class File(NamedTuple):
    """A file's suffix and content, and its mean red, green and blue; None if it has no meaning."""

    suffix: str
    content: bytes
    mean: np.ndarray | None


def _picture(rng: np.random.Generator) -> np.ndarray:
    """Return a smooth picture (H, W, 3) of levels in [0, 255], float."""
    coarse = rng.integers(40, 216, (3, 4, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return np.asarray(smooth).astype(np.float64)


def _with_alpha(rng: np.random.Generator, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add alpha, with noise under what is transparent; return it and the mean over white."""
    alpha = np.full((HEIGHT, WIDTH, 1), 255.0)
    alpha[:, :12], alpha[:5] = 0, 102
    noise = rng.integers(0, 256, colours.shape)
    stored = np.concatenate([np.where(alpha == 0, noise, colours), alpha], axis=-1)
    shown = (colours * alpha + 255 * (255 - alpha)) / 255
    return stored.round().astype(np.uint8), shown.mean((0, 1))


def _grey(rng: np.random.Generator) -> np.ndarray:
    return _picture(rng)[..., :1]


def _saved(kind: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def save_png(values: np.ndarray, depth: int, colour: int, transparent: bytes = b"") -> bytes:
    """Save (H, W, C) as a PNG of a depth and colour type that Pillow does not write."""
    height, width, channels = values.shape
    if depth == 16:
        rows = values.astype(">u2").tobytes()
        stride = 2 * width * channels
    else:  # bits of grey
        bits = np.unpackbits(values.astype(np.uint8), axis=-1)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(height, -1), axis=-1)
        rows, stride = packed.tobytes(), packed.shape[1]
    lines = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    chunks += [(b"tRNS", transparent)] if transparent else []
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _eight_bits(mode: str, kind: str, suffix: str, rng: np.random.Generator) -> File:
    """A picture of 8 bits or fewer, of any of Pillow's modes."""
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    if mode in ("LA", "RGBA"):
        stored, mean = _with_alpha(rng, _picture(rng)[..., : len(mode) - 1])
        exact = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}}
        return File(suffix, _saved(kind, Image.fromarray(stored), **exact.get(kind, {})), mean)
    image = Image.fromarray(_picture(rng).round().astype(np.uint8))
    if mode == "palette with alpha":
        image = image.quantize(16)
        hidden, shown = image.getpixel((0, 0)), np.asarray(image.convert("RGB")).astype(float)
        shown[np.asarray(image) == hidden] = 255
        return File(suffix, _saved(kind, image, transparency=hidden), shown.mean((0, 1)))
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    mean = np.asarray(image.convert("RGB")).mean((0, 1))
    return File(suffix, _saved(kind, image, **options), mean)


def _deep(kind: str, suffix: str, top: int, rng: np.random.Generator) -> File:
    """Grey of 16 bits, or, with ``top`` 1, floats in [0, 1]."""
    grey = _grey(rng)[..., 0]
    values = (grey / 255 * top).astype(np.float32 if top == 1 else np.uint16)
    return File(suffix, _saved(kind, Image.fromarray(values)), grey.mean().repeat(3))


def _png(depth: int, channels: int, transparent: bool, rng: np.random.Generator) -> File:
    """A PNG of 2, 4 or 16 bits, perhaps with a transparent colour or alpha."""
    top, shown = 2**depth - 1, _picture(rng)[..., : 1 if channels < 3 else 3]
    values = (shown / 255 * top).round()
    shown, key = values / top * 255, b""
    if channels in (2, 4):
        alpha = np.full((HEIGHT, WIDTH, 1), float(top))
        alpha[:, :12] = 0
        shown = np.where(alpha == 0, 255, shown)
        values = np.concatenate([values, alpha], axis=-1)
    elif transparent:
        values[:, :12] = values[0, 0]
        shown = np.where((values == values[0, 0]).all(-1, keepdims=True), 255, values / top * 255)
        key = values[0, 0].astype(">u2").tobytes()
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return File(".png", save_png(values, depth, colour, key), shown.mean((0, 1)) * np.ones(3))


def _tiff(dtype: str, channels: int, photometric: str, rng: np.random.Generator) -> File:
    """A TIFF that Pillow does not write; 32-bit and signed integers have no meaning."""
    shown, top = _picture(rng)[..., :channels], 1.0 if dtype[0] == "f" else np.iinfo(dtype).max
    values = (shown / 255 * top).astype(dtype)
    if photometric == "miniswhite":
        values = (top - values).astype(dtype)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values.squeeze(), photometric=photometric)
    known = dtype in ("uint8", "uint16", "float32")  # Pillow takes no float64
    return File(".tif", buffer.getvalue(), shown.mean((0, 1)) * np.ones(3) if known else None)


def _array(dtype: str, channels: int, rng: np.random.Generator) -> File:
    """An ``.npy`` file."""
    shown = _picture(rng)[..., :channels]
    if channels in (2, 4):
        stored, mean = _with_alpha(rng, shown[..., : channels - 1])
        values = stored / 255
    else:
        values, mean = shown / 255, shown.mean((0, 1)) * np.ones(3)
    if dtype == "bool":
        values = values > 0.5
        mean = values.mean((0, 1)) * 255 * np.ones(3)
    else:
        top = {"uint8": 255, "uint16": 65535, "int64": 1000}.get(dtype, 1)
        values = (values * top).astype(dtype)
    buffer = io.BytesIO()
    np.save(buffer, values)
    return File(".npy", buffer.getvalue(), None if dtype == "int64" else mean)


def _out_of_range(value: float, rng: np.random.Generator) -> File:
    """Floats with one value that is no brightness."""
    values = (_grey(rng)[..., 0] / 255).astype(np.float32)
    values[3, 4] = value
    return File(".tif", _saved("TIFF", Image.fromarray(values)), None)


def _reads_back(image: Image.Image, kind: str) -> bool:
    """Return True if Pillow can read what it saves of an image."""
    with suppress(OSError):
        return Image.open(io.BytesIO(_saved(kind, image))).load() is not None
    return False


def kinds() -> dict[str, Callable[[np.random.Generator], File]]:
    """Makers of files by the name of their kind."""
    modes = {
        "1": "PNG.png TIFF.tif BMP.bmp PPM.pbm",
        "L": "PNG.png JPEG.jpg WEBP.webp TIFF.tif BMP.bmp PPM.pgm GIF.gif JPEG2000.jp2 TGA.tga",
        "LA": "PNG.png TIFF.tif JPEG2000.jp2 TGA.tga",
        "P": "PNG.png TIFF.tif BMP.bmp GIF.gif",
        "palette with alpha": "PNG.png GIF.gif",
        "RGB": "PNG.png JPEG.jfif WEBP.webp TIFF.tiff BMP.dib PPM.ppm GIF.gif JPEG2000.j2k TGA.tga "
        "SGI.rgb DDS.dds QOI.qoi AVIF.avif",
        "RGBA": "PNG.png WEBP.webp TIFF.tif JPEG2000.jp2 TGA.tga DDS.dds AVIF.avif",
        "CMYK": "JPEG.jpg TIFF.tif",
        # Some releases of Pillow, 12.3 among them, cannot read the YCbCr TIFF files they save.
        "YCbCr": "JPEG.jpe" + " TIFF.tif" * _reads_back(Image.new("YCbCr", (5, 5)), "TIFF"),
    }
    made: dict[str, Callable[[np.random.Generator], File]] = {
        f"{mode} {kind}": partial(_eight_bits, mode, kind, f".{suffix}")
        for mode, formats in modes.items()
        for kind, suffix in (name.split(".") for name in formats.split())
        if kind != "AVIF" or features.check("avif")
    }
    for kind, suffix, top in (
        *(("PNG", ".png", 65535), ("TIFF", ".tif", 65535), ("PPM", ".pgm", 65535)),
        *(("JPEG2000", ".jp2", 65535), ("TIFF", ".tif", 1), ("PPM", ".pfm", 1)),
    ):
        made[f"{'float' if top == 1 else '16-bit'} {kind}"] = partial(_deep, kind, suffix, top)
    for depth, channels, key in (
        *((2, 1, False), (4, 1, False), (2, 1, True), (4, 1, True), (16, 1, True), (16, 2, False)),
        *((16, 3, False), (16, 3, True), (16, 4, False)),
    ):
        name = f"PNG of {depth} bits, {channels} channels{', a transparent colour' if key else ''}"
        made[name] = partial(_png, depth, channels, key)
    for dtype, channels, photometric in (
        *(("uint16", 3, "rgb"), ("uint8", 1, "miniswhite"), ("uint16", 1, "miniswhite")),
        *(("float32", 1, "miniswhite"), ("float64", 1, "minisblack")),
        *(("uint32", 1, "minisblack"), ("int32", 1, "minisblack"), ("int16", 1, "minisblack")),
    ):
        made[f"TIFF {dtype} {channels} {photometric}"] = partial(
            _tiff, dtype, channels, photometric
        )
    for dtype, channels in product(("uint8", "uint16", "float32", "bool", "int64"), (1, 2, 3, 4)):
        if dtype != "bool" or channels in (1, 3):
            made[f"npy {dtype} {channels}"] = partial(_array, dtype, channels)
    for value in (float("nan"), float("inf"), 37.0, -0.5):
        made[f"float TIFF with {value}"] = partial(_out_of_range, value)
    return made


DAMAGES = ("none", "wrong suffix", "truncated", "flipped", "empty", "huge header")


def damaged(file: File, damage: str, rng: np.random.Generator) -> File:
    """Damage a file; a huge header that a format has no place for becomes an empty file."""
    suffix, content, mean = file
    if damage == "wrong suffix":
        suffix = str(rng.choice([s for s in (".png", ".jpg", ".tif", ".bmp") if s != suffix]))
        # Neither has a signature by which it is known under another name.
        mean = None if file.suffix in (".tga", ".npy") else mean
    elif damage == "truncated":
        content = content[: int(rng.integers(1, len(content)))]
    elif damage == "flipped":
        flipped = bytearray(content)
        for place in rng.integers(0, len(content), int(rng.integers(1, 9))):
            flipped[place] ^= int(rng.integers(1, 256))
        content = bytes(flipped)
    elif damage == "empty":
        content = b""
    elif damage == "huge header":
        content = _huge(content)
    return File(suffix, content, mean)


def _huge(content: bytes) -> bytes:
    """State 60,000 x 60,000 pixels in the header."""
    side = 60_000
    if content[:4] == b"\x89PNG":
        header = struct.pack(">II", side, side) + content[24:29]
        return content[:8] + _chunk(b"IHDR", header) + content[33:]
    if content[:2] == b"BM":
        return content[:18] + struct.pack("<ii", side, side) + content[26:]
    if content[:3] == b"GIF":
        return content[:6] + struct.pack("<HH", side, side) + content[10:]
    if content[:2] == b"\xff\xd8" and (place := content.find(b"\xff\xc0")) > 0:
        return content[: place + 5] + struct.pack(">HH", side, side) + content[place + 9 :]
    if content[:1] == b"P" and content[1:2] in b"456f":
        return content.replace(b"%d %d" % (WIDTH, HEIGHT), b"%d %d" % (side, side), 1)
    sizes = struct.pack("<H", WIDTH), struct.pack("<H", HEIGHT)
    if content[:2] == b"II" and all(content.count(size) for size in sizes):
        for size in sizes:  # of a TIFF, in the first two tags
            content = content.replace(size, struct.pack("<H", side), 1)
        return content
    return b""


def judge(path: str, file: File, damage: str) -> tuple[str, str]:
    """Decode a file: (outcome, what was wrong)."""
    try:
        picture = decode_image(path)
    except ValueError as error:
        if path not in str(error):
            return WRONG, f"not named: {error}"
        must_be_read = damage in ("none", "wrong suffix") and file.mean is not None
        return (WRONG, str(error)) if must_be_read else (REFUSED, "")
    except Exception as error:  # noqa: BLE001
        return WRONG, f"{type(error).__name__}: {error}"
    is_picture = picture.ndim == 3 and len(picture) == 3 and str(picture.dtype) == "torch.uint8"
    if not is_picture or (file.mean is None and damage != "flipped"):
        return WRONG, f"{tuple(picture.shape)} {picture.dtype}"
    mean = picture.double().mean(dim=(1, 2)).numpy()
    is_whole = picture.shape[1:] == (HEIGHT, WIDTH) and file.mean is not None
    if is_whole and np.abs(mean - file.mean).max() < 4:
        return RIGHT, ""
    has_checksum = file.content[:8] == b"\x89PNG\r\n\x1a\n"
    if damage == "flipped" and not has_checksum:
        return ALTERED, ""
    return WRONG, f"mean {mean.round(1)}, expected {file.mean}, {tuple(picture.shape)}"


def files(n: int, seed: int) -> list[tuple[str, str, File]]:
    """Make n files of all kinds and damages: (kind, damage, file)."""
    rng = np.random.default_rng(seed)
    makers = kinds()
    cases = [(kind, damage) for damage in DAMAGES for kind in makers]
    chosen = [cases[i] for i in rng.permutation(len(cases))[:n]]
    while len(chosen) < n:  # more of the random damages
        chosen.append((str(rng.choice(list(makers))), str(rng.choice(["truncated", "flipped"]))))
    return [(kind, damage, damaged(makers[kind](rng), damage, rng)) for kind, damage in chosen]


def main() -> None:
    """Judge all files in a process of their own, and print a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    pool = ProcessPoolExecutor(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, damage, file) in enumerate(files(options.n, options.seed)):
            path = Path(folder, f"{number}{file.suffix}")
            path.write_bytes(file.content)
            try:
                found, why = pool.submit(judge, str(path), file, damage).result(60)
            except (BrokenProcessPool, TimeoutError) as error:
                found, why = WRONG, type(error).__name__
                pool = ProcessPoolExecutor(1)
            counts[damage, found] += 1
            if found == WRONG:
                print(f"{kind}, {damage}: {why}")  # noqa: T201
            path.unlink()
    outcomes = (RIGHT, REFUSED, ALTERED, WRONG)
    print(f"{'damage':14}" + "".join(f"{name:>9}" for name in outcomes))  # noqa: T201
    for damage in DAMAGES:
        print(f"{damage:14}" + "".join(f"{counts[damage, name]:9}" for name in outcomes))  # noqa: T201
    sys.exit(any(counts[damage, WRONG] for damage in DAMAGES))


if __name__ == "__main__":
    main()
