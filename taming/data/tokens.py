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
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.token_files import (
    AGAIN,
    CHECKSUMS,
    KEY,
    CacheInfo,
    check_files,
    check_table,
    crc32_of,
    named,
    open_file,
    properties_of,
)
from taming.util import replacing

_OWN = {"tokens", "grid", "pixels", "fingerprint"}  # keys that the cache adds to every item


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
        with replacing(self.unfinished / CHECKSUMS) as part:
            part.write_text(json.dumps(self.checksums, indent=1))
        self.unfinished.rename(self.folder)

    def _save_file(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        tokens = pa.array(columns.pop("tokens"), self.type)
        batch = pa.RecordBatch.from_pydict({"tokens": tokens, **columns})
        about = {**self.info._asdict(), "vocab_size": self.vocab_size}
        batch = batch.replace_schema_metadata({KEY: json.dumps(about)})
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
        self.checksums[file.name] = {"images": len(rows), "crc32": crc32_of(file)}


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
        images = check_files(Path(path), [file.name for file in self.files])
        schemas = []
        for file in self.files:
            with named(file):
                table = open_file(file).read_all()
                check_table(table, properties_of(table.schema), images.get(file.name))
            schemas.append(table.schema)
        if not all(schema.equals(schemas[0], check_metadata=True) for schema in schemas):
            raise ValueError(f"{path} holds files of different token caches; encode it again")
        about = properties_of(schemas[0])
        if not images and "vocab_size" in about:
            raise ValueError(f"{path} has lost its {CHECKSUMS}; {AGAIN}")
        self.info = CacheInfo(*(about[name] for name in CacheInfo._fields))

    @cached_property
    def table(self) -> pa.Table:
        """All rows, memory-mapped."""
        return pa.concat_tables([open_file(file).read_all() for file in self.files])

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
