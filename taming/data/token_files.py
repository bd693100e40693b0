"""Files of a token cache: what is checked before their rows are used."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

logger = logging.getLogger(__name__)

KEY = b"taming.tokens"  # of the schema's metadata
CHECKSUMS = "checksums.json"
AGAIN = "copy the cache again, or encode it anew with scripts/encode.py"


class CacheInfo(NamedTuple):
    """Properties shared by all images of a cache.

    Attributes:
        fingerprint: The tokenizer's fingerprint in hexadecimal.
        grid: [h, w], the latent grid in sites.
        pixels: Number of pixels of an image.
    """

    fingerprint: str
    grid: list[int]
    pixels: int


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
    """Read a cache's properties from the schema of a file: those of CacheInfo, and vocab_size.

    Raises:
        ValueError: They are missing or out of range. Earlier versions lack ``vocab_size`` alone.
    """
    if KEY not in (schema.metadata or {}):
        raise ValueError("it does not belong to a token cache")
    about = json.loads(schema.metadata[KEY])
    numbers = [about["pixels"], about.get("vocab_size", 1), *about["grid"]]
    right = len(about["grid"]) == 2 and isinstance(about["fingerprint"], str)
    known = {*CacheInfo._fields, "vocab_size"}
    if not right or about.keys() - known or any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError(f"its properties are out of range: {about}")
    return about


def check_table(table: pa.Table, about: Mapping[str, Any], images: int | None) -> None:
    """Check the rows of a file.

    Raises:
        ValueError: They are damaged, are not as many as written, or hold other types or values.
    """
    table.validate(full=True)
    if table.num_rows == 0 or table.num_rows != (images or table.num_rows):
        raise ValueError(f"it holds {table.num_rows} images, expected {images or 'some'}")
    types = {field.name: field.type for field in table.schema}
    if types.get("tokens") not in (pa.list_(pa.uint16()), pa.list_(pa.int32())):
        raise ValueError(f"it holds tokens of type {types.get('tokens')}")
    if len(types) != table.num_columns or not all(map(_is_plain, types.values())):
        raise ValueError(f"it holds columns other than numbers, vectors and texts: {types}")
    columns = table.combine_chunks().to_batches()[0]  # whole, without a copy if it was one batch
    for name, column in zip(types, columns.columns, strict=True):
        if column.null_count or (pa.types.is_list(column.type) and column.flatten().null_count):
            raise ValueError(f"its column {name!r} has gaps")
    tokens, (h, w) = columns["tokens"], about["grid"]
    if (shortest := int(np.diff(tokens.offsets.to_numpy()).min())) < h * w:
        raise ValueError(f"it has a sequence of {shortest} tokens for {h} x {w} sites")
    values = tokens.flatten().to_numpy()
    if values.min() < 0 or values.max() >= about.get("vocab_size", 1 << 31):
        raise ValueError(f"it has tokens outside 0..{about.get('vocab_size', 1 << 31) - 1}")


def _is_plain(kind: pa.DataType) -> bool:
    """Return True for the types of columns that the writer makes."""
    value = kind.value_type if pa.types.is_list(kind) else kind
    is_number = pa.types.is_integer(value) or pa.types.is_floating(value)
    return is_number or pa.types.is_boolean(value) or pa.types.is_string(kind)
