"""Rows of tables of encoded pictures: tars, Parquet files and data sets of the hub.

A row is a mapping; one of its columns holds the bytes of a picture, others its labels.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from taming.data.crops import SquareCrop
from taming.data.preprocessing import error_context, to_unit_range
from taming.data.utils import stackable
from taming.decoding import Colour, decode_image, rgb_of
from taming.downloads import HUB_NAME

logger = logging.getLogger(__name__)

_BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}
_LABELS = {"label": "class_label", "cls": "class_label"}  # of the hub, and of WebDataset


class Columns:
    """Meaning of the columns of a table of pictures.

    Args:
        schema: The table's schema.
        image_column: Column of encoded pictures; None takes the only one.
        what: Name of the table, for errors.
        keep: Columns of labels; None takes all.

    Attributes:
        image: Name of that column.
        labels: Column -> item key, for numbers, vectors and texts; ``label`` and ``cls`` become
            ``class_label``.

    Raises:
        ValueError: There is no such column, or several.
    """

    def __init__(
        self,
        schema: pa.Schema,
        image_column: str | None,
        what: str,
        keep: Sequence[str] | None = None,
    ) -> None:
        found = [field.name for field in schema if _holds_pictures(field.type)]
        if image_column is not None and image_column not in found:
            raise ValueError(
                f"{what} has no column {image_column!r} of encoded pictures, only "
                f"{', '.join(found) or 'others'}"
            )
        if image_column is None and len(found) != 1:
            raise ValueError(
                f"{what} has {len(found)} columns of encoded pictures, {', '.join(found)}: name "
                f"one by image_column, of {', '.join(schema.names)}"
            )
        self.image = found[0] if image_column is None else image_column
        plain = [str(field.name) for field in schema if _is_label(field)]
        if keep is not None and (unknown := [name for name in keep if name not in plain]):
            raise ValueError(
                f"{what} has no column {unknown[0]!r} of numbers or texts, only {', '.join(plain)}"
            )
        kept = plain if keep is None else keep
        self.labels = {name: _LABELS.get(name, name) for name in kept}

    def labels_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the labels of a row, by item key."""
        return {key: row[name] for name, key in self.labels.items()}

    def values_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the labels of a row, by item key, in the form that batches are made of.

        Raises:
            ValueError: A label has no value; names the column.
        """
        for name in self.labels:
            if row[name] is None or (isinstance(row[name], list) and None in row[name]):
                raise ValueError(f"the column {name!r} has no value: leave it out of columns")
        return {key: stackable(value) for key, value in self.labels_of(row).items()}


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(field: pa.Field) -> bool:
    kind = field.type
    value = kind.value_type if pa.types.is_list(kind) else kind
    is_number = pa.types.is_integer(value) or pa.types.is_floating(value)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return (is_number or is_text or pa.types.is_boolean(kind)) and not field.name.startswith("__")


class Decoder:
    """Decodes the picture of a row as the data sets of files do.

    Args:
        crop: Rescaling, cropping and mirroring.
        channels: C, channels of the images, as for `decode_image`.
        background: Colour under what is transparent, as for `decode_image`.
        max_pixels: Refuse larger pictures, as `decode_image` does.
    """

    def __init__(
        self, crop: SquareCrop, channels: int, background: Colour, max_pixels: int | None
    ) -> None:
        self.crop, self.channels, self.max_pixels = crop, channels, max_pixels
        self.background = rgb_of(background)

    def __call__(self, value: Any, key: str) -> np.ndarray:
        """Decode bytes, or a mapping of ``bytes`` or ``path``, to (H, W, C) float32 in [-1, 1].

        Raises:
            DataError: It is no picture; names the key.
        """
        with error_context(f"image {key}"):
            options = (True, self.channels, self.background, self.max_pixels)
            picture = decode_image(io.BytesIO(_bytes_of(value)), *options)
            view = self.crop.view(*picture.shape[-2:])
            return to_unit_range(view.apply(picture, antialias=True))


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            import fsspec  # comes with datasets

            try:
                with fsspec.open(path, "rb") as file:
                    return file.read()  # type: ignore[union-attr]
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, bytes):
        raise ValueError("it has no bytes")
    return value


def find_shards(data: str | Sequence[str], endings: Sequence[str]) -> list[str]:
    """List the files that a file, URL, folder or several of them name.

    Returns:
        Paths and URLs; empty if ``data`` is none of a file, a URL, or a folder of such files.

    Raises:
        FileNotFoundError: A file does not exist, or one of several names is none of these.
        ValueError: They have several endings.
    """
    names = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    found: list[str] = []
    strays: list[str] = []
    for name in (os.path.expanduser(name) for name in names):
        own = [name] if Path(name).suffix in endings else []
        if os.path.isdir(name):
            own = sorted(str(file) for file in Path(name).iterdir() if file.suffix in endings)
        elif own and "://" not in name and not os.path.isfile(name):
            raise FileNotFoundError(f"the file {name} does not exist")
        found += own
        strays += [] if own else [name]
    if found and strays:
        raise FileNotFoundError(f"{strays[0]} is no {' or '.join(endings)} file or folder of such")
    if len(kinds := sorted({Path(name).suffix for name in found})) > 1:
        raise ValueError(f"{data} names files of several kinds, {', '.join(kinds)}: give one kind")
    return found


def _is_folder(data: str | Sequence[str]) -> bool:
    """Return True if data without shards is a folder; otherwise it names a data set of the hub.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: It is a file of another kind, or several folders.
    """
    names = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    there = [name for name in map(os.path.expanduser, names) if os.path.exists(name)]
    if there and (len(names) > 1 or not os.path.isdir(there[0])):
        kinds = " or ".join(_BUILDERS)
        raise ValueError(f"{there[0]} is no {kinds} file or folder of such: name one, or a folder")
    name = str(data)
    if not there and not HUB_NAME.fullmatch(name if "/" in name else f"owner/{name}"):
        raise FileNotFoundError(f"{data} does not exist, and is no name of a data set of the hub")
    return bool(there)


def open_stream(data: str | Sequence[str], split: str, name: str | None = None) -> Any:
    """Open tars, Parquet files, or a data set of the hub, as an ``IterableDataset``.

    Args:
        data: A file, URL or folder of ``.tar`` or ``.parquet`` files, or several; or the name of a
            data set of the hub.
        split: Split of a data set of the hub.
        name: Configuration of a data set of the hub.

    Returns:
        A ``datasets.IterableDataset`` whose pictures stay encoded.

    Raises:
        ValueError: The package ``datasets`` is missing, or the data cannot be opened.
        FileNotFoundError: A file does not exist.
    """
    files = find_shards(data, [*_BUILDERS])
    where = "" if files or _is_folder(data) else f"no file or folder {data} is here; "
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{where}streams of pictures, and data sets of the hub, need the package datasets: "
            "pip install 'loopy-taming[data]'"
        ) from error
    if where:
        logger.info("%slooking for a data set of this name on the hub", where)
    try:
        if files:
            builder = _BUILDERS[Path(files[0]).suffix]
            stream = datasets.load_dataset(
                builder, data_files={split: files}, split=split, streaming=True
            )
        else:
            stream = datasets.load_dataset(str(data), name, split=split, streaming=True)
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of the library, of the network and of the file systems
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the data {data} cannot be opened: {reason}") from error
    return stream


def columns_of(
    stream: Any, image_column: str | None, what: str, keep: Sequence[str] | None = None
) -> Columns:
    """Return the meaning of the columns of a stream of ``datasets``."""
    if stream.features is not None:
        schema = stream.features.arrow_schema
    else:  # it does not state them: those of the first row
        schema = pa.Table.from_pylist(list(stream.take(1))).schema
    return Columns(schema, image_column, what, keep)
