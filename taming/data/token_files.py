"""Files of a token cache: how one is saved, and what is checked before its rows are used.

A file is in Arrow's IPC format (which pandas calls feather), with one row per picture: its ragged
``tokens`` (list of uint16 or uint32), its ``key``, ``height`` and ``width`` in pixels, and its
labels. The schema's metadata holds the properties that all files share, and the keys of pictures
that could not be read. Files of the earlier version have one grid for all pictures in their
metadata, and no keys and sizes.

Axis letters: N pictures, h w grid.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from taming.util import replacing

logger = logging.getLogger(__name__)

KEY = b"taming.tokens"  # of the schema's metadata
UNREADABLE = b"taming.unreadable"  # likewise: the keys of pictures that are not in the file, why
CHECKSUMS = "checksums.json"
PLAN = "plan.json"  # of a cache that is or was written shard by shard
AGAIN = "copy the cache again, or encode it anew with `taming encode`"
OWN = ("tokens", "key", "height", "width")  # columns that each file has
RESERVED = {*OWN, "grid", "pixels", "fingerprint"}  # item keys that are no labels

_TOKENS = [pa.list_(kind) for kind in (pa.uint16(), pa.uint32(), pa.int32())]  # the last: earlier
_EARLIER = {"fingerprint", "grid", "pixels"}  # properties of the earlier versions


class CacheInfo(NamedTuple):
    """Properties shared by all pictures of a cache.

    Attributes:
        fingerprint: The tokenizer's fingerprint in hexadecimal.
        vocab_size: Number of different tokens; decides their integer type.
        site: Side of a site in pixels.
    """

    fingerprint: str
    vocab_size: int
    site: int


def grids_of(height: Any, width: Any, site: int) -> tuple[Any, Any]:
    """Return rows and columns of sites of pictures, extended to whole sites; ints or arrays."""
    return -(-height // site), -(-width // site)


def save_file(
    file: Path,
    info: CacheInfo,
    columns: Mapping[str, Sequence[Any]],
    unreadable: Sequence[tuple[str, str]] = (),
) -> None:
    """Save a file of a cache: written beside, flushed to the disk, and renamed.

    Args:
        file: The file; another one of its name is replaced.
        info: Properties of the cache.
        columns: Those of `OWN`, with ``tokens`` (L,) of integers; and labels: numbers, texts, or
            lists of numbers. All have N values.
        unreadable: (key, reason) of pictures that are left out.

    Raises:
        ValueError: A label has no value for a picture, or a token is outside the vocabulary.
        WriteError: The file cannot be saved.
    """
    for name, values in columns.items():
        if any(value is None for value in values):
            raise ValueError(f"the label {name!r} has no value for some pictures: leave it out")
    tokens = [np.asarray(sequence) for sequence in columns["tokens"]]
    for sequence in tokens:
        if len(outside := sequence[(sequence < 0) | (sequence >= info.vocab_size)]):
            raise ValueError(f"token {outside[0]} is outside 0..{info.vocab_size - 1}")
    kind = pa.uint16() if info.vocab_size <= 1 << 16 else pa.uint32()
    batch = pa.RecordBatch.from_pydict(
        {
            **columns,
            "tokens": pa.array(tokens, pa.list_(kind)),
            "key": pa.array(columns["key"], pa.string()),
            **{side: pa.array(columns[side], pa.int32()) for side in ("height", "width")},
        }
    )
    about = {KEY: json.dumps(info._asdict()), UNREADABLE: json.dumps([*unreadable])}
    batch = batch.replace_schema_metadata(about)
    with replacing(file) as part:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        flush(part)
    flush(file.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # which opens no folder, and flushes only what can be written
        return
    opened = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def name_of(number: int) -> str:
    """Return the name of a cache's file by its number."""
    return f"{number:05}.arrow"


def list_files(folder: Path) -> list[Path]:
    """List the files of a cache by their numbers."""
    return sorted(folder.glob("*.arrow"), key=lambda file: (len(file.name), file.name))


def seal(folder: Path) -> None:
    """Save the checksums of all files of a folder, which make it a complete cache.

    Raises:
        ValueError: The folder has no pictures, or the columns of two files differ.
        WriteError: The checksums cannot be saved.
    """
    files, schema, about = list_files(folder), None, {}
    for file in files:
        with named(file):
            opened = open_file(file)
            images = sum(opened.get_batch(i).num_rows for i in range(opened.num_record_batches))
        about[file.name] = {"images": images, "crc32": crc32_of(file)}
        schema = opened.schema if schema is None and images else schema
        if images and (changed := {*opened.schema} ^ {*(schema or ())}):
            names = ", ".join(sorted({field.name for field in changed}))
            raise ValueError(
                f"the labels {names} of {file} are missing in, or have other types than those of, "
                "earlier pictures: leave them out"
            )
    if schema is None:
        raise ValueError(f"{folder} holds no pictures' tokens")
    with replacing(folder / CHECKSUMS) as part:
        part.write_text(json.dumps(about, indent=1))
        flush(part)


def open_file(file: Path) -> Any:
    """Memory-map a file."""
    return pa.ipc.open_file(pa.memory_map(str(file)))


def crc32_of(file: Path) -> int:
    """Compute the CRC-32 of a file's bytes."""
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Re-raise what a damaged file makes Arrow raise as a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}; {AGAIN}") from error


def check_files(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Check names and checksums of a cache's files: name -> images; {} for an earlier version.

    Raises:
        ValueError: A file is missing, was added, or differs from what was written.
    """
    checksums = folder / CHECKSUMS
    images: dict[str, int] = {}
    expected = [f"{number:05}.arrow" for number in range(len(names))]
    if checksums.exists():
        with named(checksums):
            stated = json.loads(checksums.read_bytes())
            images = {name: int(about["images"]) for name, about in stated.items()}
            crcs = {name: about["crc32"] for name, about in stated.items()}
        expected = sorted(images)
    elif (folder / PLAN).exists():
        raise ValueError(f"{folder} is not finished: repeat the command that began it")
    else:
        logger.info("%s has no %s: it is of an earlier version", folder, CHECKSUMS)
    if wrong := sorted({*expected} ^ {*names}):
        what = "is missing from" if wrong[0] in expected else "does not belong to"
        raise ValueError(f"{folder / wrong[0]} {what} the token cache; {AGAIN}")
    if images:
        with ThreadPoolExecutor() as pool:  # zlib lets other threads run
            found = pool.map(crc32_of, (folder / name for name in names))
            for name, crc in zip(names, found, strict=True):
                if crc != crcs[name]:
                    raise ValueError(f"{folder / name} is damaged: its checksum differs; {AGAIN}")
    return images


def properties_of(schema: pa.Schema) -> dict[str, Any]:
    """Read a cache's properties from the schema of a file: those of `CacheInfo`.

    Raises:
        ValueError: They are missing or out of range. Earlier versions have ``grid`` and ``pixels``
            in place of ``site``, and the earliest no ``vocab_size``.
    """
    if KEY not in (schema.metadata or {}):
        raise ValueError("it does not belong to a token cache")
    about = json.loads(schema.metadata[KEY])
    is_earlier = about.keys() in (_EARLIER, _EARLIER | {"vocab_size"})
    grid = about["grid"] if is_earlier else [1, 1]
    numbers = [*grid, *(about[name] for name in ("pixels", "vocab_size", "site") if name in about)]
    right = len(grid) == 2 and isinstance(about["fingerprint"], str)
    known = is_earlier or about.keys() == {*CacheInfo._fields}
    if not right or not known or any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError(f"its properties are out of range: {about}")
    return about


def check_table(table: pa.Table, about: Mapping[str, Any], images: int | None) -> None:
    """Check the rows of a file.

    Raises:
        ValueError: They are damaged, are not as many as written, or hold other types or values.
    """
    table.validate(full=True)
    is_counted = images is not None
    if table.num_rows != images if is_counted else table.num_rows == 0:
        raise ValueError(f"it holds {table.num_rows} images, expected {images or 'some'}")
    types = {field.name: field.type for field in table.schema}
    if types.get("tokens") not in _TOKENS:
        raise ValueError(f"it holds tokens of type {types.get('tokens')}")
    if len(types) != table.num_columns or not all(map(_is_plain, types.values())):
        raise ValueError(f"it holds columns other than numbers, vectors and texts: {types}")
    if table.num_rows == 0:
        return
    columns = table.combine_chunks().to_batches()[0]  # whole, without a copy if it was one batch
    for name, column in zip(types, columns.columns, strict=True):
        if column.null_count or (pa.types.is_list(column.type) and column.flatten().null_count):
            raise ValueError(f"its column {name!r} has gaps")
    tokens, sites = columns["tokens"], _sites(columns, types, about)
    lengths = np.diff(tokens.offsets.to_numpy())
    if len(short := np.flatnonzero(lengths < sites)):
        few, many = lengths[short[0]], np.broadcast_to(sites, lengths.shape)[short[0]]
        raise ValueError(f"it has a sequence of {few} tokens for {many} sites")
    values = tokens.flatten().to_numpy()
    if values.min() < 0 or values.max() >= about.get("vocab_size", 1 << 31):
        raise ValueError(f"it has tokens outside 0..{about.get('vocab_size', 1 << 31) - 1}")


def _sites(columns: pa.RecordBatch, types: Mapping[str, Any], about: Mapping[str, Any]) -> Any:
    """Return the numbers of sites of all pictures of a file, or of each, (N,) int64."""
    if "site" not in about:
        return about["grid"][0] * about["grid"][1]
    if [types.get(name) for name in OWN[1:]] != [pa.string(), pa.int32(), pa.int32()]:
        raise ValueError(f"it lacks some of the columns {', '.join(OWN)}")
    sizes = np.stack([columns[side].to_numpy().astype(np.int64) for side in ("height", "width")])
    if sizes.min() < 1:
        raise ValueError(f"it has a picture of {sizes.min()} pixels")
    h, w = grids_of(sizes[0], sizes[1], about["site"])
    return h * w


def _is_plain(kind: pa.DataType) -> bool:
    """Return True for the types of columns that the writer makes."""
    value = kind.value_type if pa.types.is_list(kind) else kind
    is_number = pa.types.is_integer(value) or pa.types.is_floating(value)
    return is_number or pa.types.is_boolean(value) or pa.types.is_string(kind)
