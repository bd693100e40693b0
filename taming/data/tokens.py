"""Cache of token sequences, computed once by ``scripts/encode.py`` and read instead of images.

A cache is a folder of Arrow files (the IPC format, which pandas calls feather) with one row per
image: its ragged ``tokens`` and other values of the data set's item, such as the class. The files
also contain the tokenizer's fingerprint. They are memory-mapped, so processes share their pages
and nothing is decoded. The folder is renamed to its final name when all files are complete, so an
interrupted cache cannot be mistaken for a complete one. ``checksums.json`` has the CRC-32 and the
number of images of every file; a cache without it is of an earlier version, and only what Arrow
and the values themselves show is checked.

Axis letters: B images, L tokens, h w grid.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.util import replacing

logger = logging.getLogger(__name__)

_KEY = b"taming.tokens"  # of the schema's metadata
_CHECKSUMS = "checksums.json"
_AGAIN = "copy the cache again, or encode it anew with scripts/encode.py"
_OWN = {"tokens", "grid", "pixels", "fingerprint"}  # keys that the cache adds to every item


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


def free_for_cache(folder: Path) -> Path:
    """Return the temporary folder in which a cache is built.

    Raises:
        ValueError: The folder is not empty, or its temporary folder already exists.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} already holds a token cache or other files; remove it or name another folder"
        )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if unfinished.exists():
        raise ValueError(
            f"{unfinished} belongs to an unfinished token cache; remove it, unless another process "
            "is still writing to it"
        )
    return unfinished


class TokenCacheWriter:
    """Writer of a cache in files of a fixed number of images.

    Until `close`, the files are in ``<folder>.unfinished``.

    Args:
        folder: The cache's folder; it must be empty or not exist.
        info: Properties shared by all images.
        vocab_size: Number of different tokens; decides the integer type.
        images_per_file: Number of images per file.

    Raises:
        ValueError: The folder is not empty, or ``<folder>.unfinished`` already exists.
    """

    def __init__(
        self, folder: Path, info: CacheInfo, vocab_size: int, images_per_file: int = 100_000
    ) -> None:
        self.unfinished = free_for_cache(folder)
        self.unfinished.mkdir(parents=True)
        self.folder = folder
        self.info = info
        self.vocab_size = vocab_size
        self.type = pa.list_(pa.uint16() if vocab_size <= 1 << 16 else pa.int32())
        self.schema: pa.Schema | None = None  # of the first file, and so of all
        self.images_per_file = images_per_file
        self.rows: list[dict[str, Any]] = []
        self.checksums: dict[str, dict[str, int]] = {}

    def add(self, tokens: Tensor, columns: Mapping[str, Sequence[Any]]) -> None:
        """Append images.

        Args:
            tokens: (B, L) int64, -1 after the end of a sequence.
            columns: Item key -> B values: numbers, strings, or lists of numbers.

        Raises:
            ValueError: A column has the name of one of the cache's own keys or changes its type, or
                a token is outside the vocabulary.
            WriteError: A file cannot be saved.
        """
        if taken := _OWN & columns.keys():
            raise ValueError(
                f"the key {min(taken)!r} is reserved in a token cache: rename it in the data set"
            )
        if len(outside := tokens[(tokens < -1) | (tokens >= self.vocab_size)]):
            raise ValueError(f"token {int(outside[0])} is outside 0..{self.vocab_size - 1}")
        sequences = [row[row >= 0].numpy() for row in tokens.cpu()]
        for number, sequence in enumerate(sequences):
            values = {name: column[number] for name, column in columns.items()}
            self.rows.append({"tokens": sequence, **values})
        while len(self.rows) >= self.images_per_file:
            self._save_file(self.rows[: self.images_per_file])
            self.rows = self.rows[self.images_per_file :]

    def close(self) -> None:
        """Save the remaining images and the checksums, and rename the folder to its final name."""
        if self.rows:
            self._save_file(self.rows)
        with replacing(self.unfinished / _CHECKSUMS) as part:
            part.write_text(json.dumps(self.checksums, indent=1))
        self.unfinished.rename(self.folder)

    def _save_file(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        tokens = pa.array(columns.pop("tokens"), self.type)
        batch = pa.RecordBatch.from_pydict({"tokens": tokens, **columns})
        about = {**self.info._asdict(), "vocab_size": self.vocab_size}
        batch = batch.replace_schema_metadata({_KEY: json.dumps(about)})
        schema = self.schema = self.schema or batch.schema
        if changed := [field for field in batch.schema if field not in schema]:
            raise ValueError(f"the columns {changed} have other types than in earlier images")
        file = self.unfinished / f"{len(self.checksums):05}.arrow"
        with (
            replacing(file) as part,
            pa.OSFile(str(part), "wb") as sink,
            pa.ipc.new_file(sink, batch.schema) as writer,
        ):
            writer.write_batch(batch)
        self.checksums[file.name] = {"images": len(rows), "crc32": _crc32(file)}


class TokenCache(Dataset[dict[str, Any]]):
    """Data set over the images of a cache.

    Items have ``tokens`` (L,) int64, -1 after the end of the sequence, with L the length of the
    longest one; ``grid`` (2,) int64; ``pixels``; ``fingerprint``; and the original item's other
    values, such as ``class_label``, vectors as int64 or float32 tensors. In a prior's
    configuration it replaces the data set of images:

    .. code-block:: yaml

        train:
          target: taming.data.tokens.TokenCache
          params: {path: cache/train}

    Args:
        path: Folder of the cache.

    Every file is read once and checked when the data set is built, not in loader processes.

    Raises:
        FileNotFoundError: The folder contains no cache.
        ValueError: A file is missing or damaged, or the files belong to different caches.
    """

    def __init__(self, path: str) -> None:
        self.files = sorted(Path(path).glob("*.arrow"))
        if not self.files:
            raise FileNotFoundError(f"{path} holds no token cache; scripts/encode.py makes one")
        images = _check_files(Path(path), [file.name for file in self.files])
        schemas = []
        for file in self.files:
            with _named(file):
                table = _open(file).read_all()
                _check_table(table, _about(table.schema), images.get(file.name))
            schemas.append(table.schema)
        if not all(schema.equals(schemas[0], check_metadata=True) for schema in schemas):
            raise ValueError(f"{path} holds files of different token caches; encode it again")
        about = _about(schemas[0])
        if not images and "vocab_size" in about:
            raise ValueError(f"{path} has lost its {_CHECKSUMS}; {_AGAIN}")
        self.info = CacheInfo(*(about[name] for name in CacheInfo._fields))

    @cached_property
    def table(self) -> pa.Table:
        """All rows, memory-mapped."""
        return pa.concat_tables([_open(file).read_all() for file in self.files])

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence in tokens."""
        ends = (chunk.offsets.to_numpy() for chunk in self.table["tokens"].chunks)
        return max(int(np.diff(end).max()) for end in ends)

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes map the files again, which avoids pickling the rows.
        return {name: value for name, value in vars(self).items() if name != "table"}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table.slice(range(len(self))[index], 1)
        sequence = row["tokens"][0].values.to_numpy()
        tokens = np.full(self.longest, -1, np.int64)
        tokens[: len(sequence)] = sequence
        return {
            "tokens": tokens,
            "grid": torch.tensor(self.info.grid),
            "pixels": self.info.pixels,
            "fingerprint": self.info.fingerprint,
            **{name: _value(row[name][0]) for name in row.column_names if name != "tokens"},
        }


def _value(scalar: pa.Scalar) -> Any:
    """Convert to a number or a string, or a vector to a tensor, which collation stacks."""
    value = scalar.as_py()
    return torch.tensor(value) if isinstance(value, list) else value


def _open(file: Path) -> Any:
    """Memory-map a file."""
    return pa.ipc.open_file(pa.memory_map(str(file)))


def _crc32(file: Path) -> int:
    """Compute the CRC-32 of a file's bytes."""
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Re-raise what a damaged file makes Arrow raise as a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}; {_AGAIN}") from error


def _check_files(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Check names and checksums of a cache's files: name -> images; {} for an earlier version.

    Raises:
        ValueError: A file is missing, was added, or differs from what was written.
    """
    checksums = folder / _CHECKSUMS
    images: dict[str, int] = {}
    expected = [f"{number:05}.arrow" for number in range(len(names))]
    if checksums.exists():
        with _named(checksums):
            stated = json.loads(checksums.read_bytes())
            images = {name: int(about["images"]) for name, about in stated.items()}
            crcs = {name: about["crc32"] for name, about in stated.items()}
        expected = sorted(images)
    else:
        logger.info("%s has no %s: it is of an earlier version", folder, _CHECKSUMS)
    if wrong := sorted({*expected} ^ {*names}):
        what = "is missing from" if wrong[0] in expected else "does not belong to"
        raise ValueError(f"{folder / wrong[0]} {what} the token cache; {_AGAIN}")
    if images:
        with ThreadPoolExecutor() as pool:  # zlib lets other threads run
            found = pool.map(_crc32, (folder / name for name in names))
            for name, crc in zip(names, found, strict=True):
                if crc != crcs[name]:
                    raise ValueError(f"{folder / name} is damaged: its checksum differs; {_AGAIN}")
    return images


def _about(schema: pa.Schema) -> dict[str, Any]:
    """Read a cache's properties from the schema of a file: those of CacheInfo, and vocab_size.

    Raises:
        ValueError: They are missing or out of range. Earlier versions lack ``vocab_size`` alone.
    """
    if _KEY not in (schema.metadata or {}):
        raise ValueError("it does not belong to a token cache")
    about = json.loads(schema.metadata[_KEY])
    numbers = [about["pixels"], about.get("vocab_size", 1), *about["grid"]]
    right = len(about["grid"]) == 2 and isinstance(about["fingerprint"], str)
    known = {*CacheInfo._fields, "vocab_size"}
    if not right or about.keys() - known or any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError(f"its properties are out of range: {about}")
    return about


def _check_table(table: pa.Table, about: Mapping[str, Any], images: int | None) -> None:
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
