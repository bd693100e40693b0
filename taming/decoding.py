"""Picture files to 8-bit tensors: the one place that decodes them.

Each kind of file has one meaning, which the table in docs/data.md lists; a kind that has none is
refused. Axis letters: C channels, H rows, W columns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from taming.util import load_array

T = TypeVar("T")
File = str | os.PathLike[str] | IO[bytes]
Colour = str | Sequence[int]

MAX_PIXELS = 178_956_970  # above it, Pillow suspects a decompression bomb

# Pillow's formats of a picture in a known range of brightness, and pillow-heif's. EPS and WMF start
# other programs, FITS and the like hold measurements, and PCX turns dark if its end is lost.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF", "MPO", "QOI"),
    *("TGA", "DIB", "ICO", "ICNS", "PSD", "SGI", "DDS", "SUN", "XBM", "XPM", "MSP", "CUR"),
)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_LOCK = threading.Lock()


@cache
def picture_extensions(channels: int = 3) -> tuple[str, ...]:
    """Return the file name extensions of the formats that are decoded to a number of channels."""
    if channels not in MODES:
        return (".npy", ".tif", ".tiff")
    known = Image.registered_extensions()
    decoded = (ending for ending, kind in known.items() if kind in FORMATS)
    return tuple(dict.fromkeys((".jpg", ".jpeg", ".png", *decoded)))


def rgb_of(colour: Colour) -> tuple[int, ...]:
    """Return red, green and blue of a colour: a name, "#rrggbb", or three numbers to 255.

    Raises:
        ValueError: It is no colour.
    """
    try:
        if not isinstance(colour, str):
            red, green, blue = colour
            colour = f"#{red:02x}{green:02x}{blue:02x}"
        return ImageColor.getrgb(colour)[:3]
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a colour such as white or '#ffffff', got {colour!r}") from error


@contextmanager
def _naming(file: File, failure: str) -> Iterator[None]:
    """Turn any error into a ValueError that names the file, if it is a path, and the failure."""
    try:
        yield
    # A damaged file makes Pillow raise OSError, SyntaxError, struct.error, EOFError and others.
    except Exception as error:
        name = f"{file}: " if isinstance(file, (str, os.PathLike)) else ""
        raise ValueError(f"{name}{failure}: {error}") from error


def decode(file: File, convert: Callable[[Image.Image], T], max_pixels: int | None = None) -> T:
    """Open a picture file and convert it.

    Args:
        file: A path, or an open binary file.
        convert: Function of the opened, not yet loaded, PIL image; of several, the first.
        max_pixels: Refuse larger pictures before any pixel is read; None for TAMING_MAX_PIXELS.

    Raises:
        ValueError: The file is missing, damaged or too large, or not a picture; names a path.
    """
    with _naming(file, "cannot be decoded as an image"):
        source = os.path.expanduser(file) if isinstance(file, (str, os.PathLike)) else file
        if isinstance(source, str) and not os.path.isfile(source):  # a pipe would wait for ever
            raise ValueError("it is not a file" if os.path.exists(source) else "it does not exist")
        with _identify(source) as image:
            _check_format(image)
            check_size(image.width, image.height, max_pixels)
            _check_end(image)
            if image.format != "PNG":
                return convert(image)
            image.verify()  # the pixels' checksums, which Pillow does not compare while it decodes
        with _identify(source) as image:
            return convert(image)


def _identify(file: str | IO[bytes]) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:  # whose message repeats the path
        raise ValueError("it is no picture of a known kind, or damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        with _LOCK:  # the limit is global; max_pixels replaces it
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _check_format(image: Image.Image) -> None:
    """Refuse other formats than `FORMATS`; any bytes may pass for a TGA, which has no signature."""
    suffix = Path(getattr(image, "filename", "")).suffix.lower()
    is_named = image.format != "TGA" or Image.registered_extensions().get(suffix) == "TGA"
    if image.format not in FORMATS or not is_named:
        raise ValueError(f"{image.format} is not among the formats of pictures that are read")


def check_size(width: int, height: int, max_pixels: int | None) -> None:
    """Refuse a picture of more pixels than the limit, or where None, than TAMING_MAX_PIXELS."""
    if max_pixels is None:
        max_pixels = int(os.environ.get("TAMING_MAX_PIXELS", MAX_PIXELS))
    if width * height > max_pixels:
        raise ValueError(
            f"its {width} x {height} pixels exceed the limit of {max_pixels}; if you trust the "
            "file, raise max_pixels or the environment variable TAMING_MAX_PIXELS"
        )


def _check_end(image: Image.Image) -> None:
    """Refuse a JPEG 2000 file without a mark of its end: what is missing would decode to zeros."""
    if image.format == "JPEG2000" and (file := image.fp):  # type: ignore[attr-defined]
        place = file.tell()
        file.seek(0)
        is_whole = b"\xff\xd9" in file.read()  # which pixels cannot contain
        file.seek(place)
        if not is_whole:
            raise ValueError("it is cut off")


def raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the layout of a picture that is not yet loaded, such as "L;4"."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or "")


def _transparent_colour(image: Image.Image) -> dict[str, Any]:
    """Scale a PNG's transparent colour, which Pillow leaves at the depth of the file, to 8 bits."""
    colour, layout = image.info.get("transparency"), raw_mode(image)
    if isinstance(colour, tuple) and "16" in layout:
        return {"transparency": tuple(value >> 8 for value in colour)}
    if isinstance(colour, int) and layout in (scale := {"L;2": 85, "L;4": 17}):
        return {"transparency": colour * scale[layout]}
    return {}


def to_mode(
    image: Image.Image, channels: int = 3, upright: bool = True, background: Colour = "white"
) -> Image.Image:
    """Convert a PIL image of any mode to L, LA, RGB or RGBA of 8 bits.

    Args:
        image: Grey, palette, CMYK, transparent, ... of 8 bits; 16 bits, scaled from their whole
            range; or floats in [0, 1].
        channels: 1 grey, 2 grey and alpha, 3 RGB, or 4 RGBA.
        upright: Apply the EXIF orientation.
        background: Colour under what is transparent; with alpha, under what is wholly so.

    Raises:
        ValueError: The values have no stated range, or leave it.
    """
    bounds, hidden = _range_of(image), _transparent_colour(image)
    if upright and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if hidden:
        image = image.copy()  # a caller's own stays as it is
        image.info |= hidden
    if bounds is not None:
        image = _eight_bits(image, *bounds)
    if image.mode in ("La", "RGBa"):  # alpha is multiplied into the colours
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        colour = rgb_of(background)
        if channels in (2, 4):
            unseen = image.getchannel("A").point(lambda alpha: 255 * (alpha == 0))
            image.paste((*colour, 0), mask=unseen)
            return image.convert(MODES[channels])
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    # Of two steps, since grey is defined by RGB; converting to the same mode would copy.
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if channels == 3 else image.convert(MODES[channels])


def _range_of(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white; None for a picture of 8 bits."""
    if image.mode == "F":
        top = 1.0
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        top = 4095.0 if raw_mode(image) == "I;12" else 65535.0
    elif image.mode == "I":
        raise ValueError("integers of 32 bits, or with signs, have no white: save 8 or 16 bits")
    else:
        return None
    # Pillow inverts a TIFF whose white is 0 only if it has at most 8 bits.
    is_inverted = getattr(image, "tag_v2", {}).get(262) == 0
    return (top, 0.0) if is_inverted else (0.0, top)


def _eight_bits(image: Image.Image, black: float, white: float) -> Image.Image:
    """Scale a grey picture of more than 8 bits; a transparent value becomes alpha."""
    values = np.asarray(image)
    grey = Image.fromarray(_to_levels(values, black, white))
    if (hidden := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _to_levels(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Scale numbers in [black, white] to levels from 0 to 255, uint8; refuse others."""
    levels = (values.astype(np.float64) - black) / (white - black) * 255
    if not ((levels >= 0) & (levels <= 255)).all():  # False for NaN as well
        raise ValueError(
            f"the values of a picture of {values.dtype} must lie in [{min(black, white):g}, "
            f"{max(black, white):g}], got {values.min():.4g} to {values.max():.4g}"
        )
    return levels.round().astype(np.uint8)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Copy the levels of a PIL image of 8 bits: (C, H, W) uint8."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def _is_numpy(file: File) -> bool:
    return isinstance(file, (str, os.PathLike)) and Path(file).suffix.lower() == ".npy"


def _load_tiff(file: File, max_pixels: int | None) -> np.ndarray:
    """Load a TIFF (H, W, C) whose channels are bands, or pages of one size."""
    import tifffile  # for pictures of many channels alone

    path: Any = os.path.expanduser(file) if isinstance(file, (str, os.PathLike)) else file
    with _naming(file, "cannot be decoded as a TIFF"), tifffile.TiffFile(path) as opened:
        series = opened.series[0]
        axes = series.axes if len(series.shape) == 3 else ""
        if not {"Y", "X"} < {*axes}:
            raise ValueError(f"expected one picture of several bands, found {series.shape}")
        check_size(series.shape[axes.index("X")], series.shape[axes.index("Y")], max_pixels)
        band = next(place for place, axis in enumerate(axes) if axis not in "YX")
        return np.moveaxis(series.asarray(), band, -1)


def _levels_of(array: np.ndarray) -> np.ndarray:
    """Scale an array (H, W) or (H, W, C) to levels (H, W, C) uint8."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"expected a picture (H, W) or (H, W, C), found {array.shape}")
    array = np.array(array, array.dtype.newbyteorder("="), order="C")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" and array.dtype not in (np.bool_, np.uint16):
        raise ValueError(f"numbers must be uint8, uint16 or floats in [0, 1], not {array.dtype}")
    return _to_levels(array, 0, 65535 if array.dtype == np.uint16 else 1)


def decode_image(
    file: File,
    upright: bool = True,
    channels: int = 3,
    background: Colour = "white",
    max_pixels: int | None = None,
) -> Tensor:
    """Decode a picture file; docs/data.md states what each kind becomes.

    Args:
        file: A path, or an open binary file.
        upright: Apply the EXIF orientation. Masks, depth maps and boxes refer to the stored
            image, so an image that goes with them must not be rotated.
        channels: C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; another number is that of the bands
            of an ``.npy`` or TIFF file, which are not converted.
        background: Colour under what is transparent: a name, "#rrggbb", or three numbers.
        max_pixels: Refuse larger pictures; None for the environment variable TAMING_MAX_PIXELS, by
            default `MAX_PIXELS`.

    Returns:
        (C, H, W) uint8.

    Raises:
        ValueError: The file is missing, damaged, too large or not a picture, has other bands, or
            values that have no meaning as brightness; names a path.
    """

    def convert(image: Image.Image) -> Tensor:
        return pil_to_tensor(to_mode(image, channels, upright, background))

    if channels in MODES and not _is_numpy(file):
        return decode(file, convert, max_pixels)
    if _is_numpy(file):
        with _naming(file, "cannot be decoded as an image"):
            array = load_array(os.path.expanduser(file))  # type: ignore[arg-type]
    else:
        array = _load_tiff(file, max_pixels)
    with _naming(file, "has no meaning as a picture"):
        levels = _levels_of(array)
        if channels in MODES and levels.shape[-1] in MODES:
            return convert(Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels))
        if levels.shape[-1] != channels:
            raise ValueError(f"expected {channels} channels, found {levels.shape[-1]}")
        return torch.from_numpy(levels).movedim(-1, 0).contiguous()
