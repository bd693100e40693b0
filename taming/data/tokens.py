"""Token sequences of images, computed once by ``scripts/encode.py`` and read instead of the images.

A cache is a folder of Arrow files (the IPC format, which pandas calls feather), each with one row
per image: its ragged ``tokens`` and whatever the data set said of it, such as its class. The files
also name the tokenizer, by its fingerprint. Reading maps them into memory: processes share what is
read, and nothing is decoded. The folder gets its name when all files are there, so that what was
interrupted cannot be taken for a cache.

Axis letters: B images, L tokens, h w grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

_KEY = b"taming.tokens"  # of the metadata
_OWN = {"tokens", "grid", "pixels", "fingerprint"}  # what a cache gives of every image


class CacheInfo(NamedTuple):
    """What all images of a cache have in common.

    Attributes:
        fingerprint: The tokenizer's, in hexadecimal.
        grid: [h, w].
        pixels: H W of an image.
    """

    fingerprint: str
    grid: list[int]
    pixels: int


def free_for_cache(folder: Path) -> Path:
    """Return where a cache is written before it gets its name.

    Raises:
        ValueError: The folder holds a cache already, or an unfinished one stands beside it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} already holds a token cache, or other files; remove it, or name another"
        )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if unfinished.exists():
        raise ValueError(
            f"{unfinished} is of a token cache that is still being written, or never was to its "
            "end; if nothing writes to it, remove it"
        )
    return unfinished


class TokenCacheWriter:
    """Writes a cache, a file for every so many images.

    Until `close`, the files are in ``<folder>.unfinished``.

    Args:
        folder: Where; it must not exist yet, or be empty.
        info: What all images have in common.
        vocab_size: Number of different tokens.
        images_per_file: How many images go into one file.

    Raises:
        ValueError: See `free_for_cache`.
    """

    def __init__(
        self, folder: Path, info: CacheInfo, vocab_size: int, images_per_file: int = 100_000
    ) -> None:
        self.unfinished = free_for_cache(folder)
        self.unfinished.mkdir(parents=True)
        self.folder = folder
        self.info = info
        self.type = pa.list_(pa.uint16() if vocab_size <= 1 << 16 else pa.int32())
        self.images_per_file = images_per_file
        self.rows: list[dict[str, Any]] = []
        self.files = 0

    def add(self, tokens: Tensor, columns: Mapping[str, Sequence[Any]]) -> None:
        """Append images.

        Args:
            tokens: (B, L) int64, -1 after each sequence's end.
            columns: B values each: numbers, texts, or lists of numbers.

        Raises:
            ValueError: A column has the name of one of the cache's own.
        """
        if taken := _OWN & columns.keys():
            raise ValueError(f"a token cache has {min(taken)!r} of its own: rename the data set's")
        sequences = [row[row >= 0].numpy() for row in tokens.cpu()]
        for number, sequence in enumerate(sequences):
            values = {name: column[number] for name, column in columns.items()}
            self.rows.append({"tokens": sequence, **values})
        while len(self.rows) >= self.images_per_file:
            self._write_file(self.rows[: self.images_per_file])
            self.rows = self.rows[self.images_per_file :]

    def close(self) -> None:
        """Write the rest; from now on, the folder is a cache."""
        if self.rows:
            self._write_file(self.rows)
        self.unfinished.rename(self.folder)

    def _write_file(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        tokens = pa.array(columns.pop("tokens"), self.type)
        batch = pa.RecordBatch.from_pydict({"tokens": tokens, **columns})
        batch = batch.replace_schema_metadata({_KEY: json.dumps(self.info._asdict())})
        file = self.unfinished / f"{self.files:05}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        self.files += 1


class TokenCache(Dataset[dict[str, Any]]):
    """The images of a cache.

    An item has ``tokens`` (L,) int64, -1 after the sequence's end, with L that of the longest
    sequence; ``grid`` (2,) int64; ``pixels``; ``fingerprint``; and the data set's own values, such
    as ``class_label``, of which vectors are int64 or float32 tensors. A prior's configuration names
    it in the place of images:

    .. code-block:: yaml

        train:
          target: taming.data.tokens.TokenCache
          params: {path: cache/train}

    Args:
        path: Folder of the cache.

    Raises:
        FileNotFoundError: There is no cache.
        ValueError: A file is damaged, or the files are of different caches.
    """

    def __init__(self, path: str) -> None:
        self.files = sorted(Path(path).glob("*.arrow"))
        if not self.files:
            raise FileNotFoundError(f"{path} holds no token cache; scripts/encode.py writes one")
        infos = [_info_of(file, _open(file).schema) for file in self.files]
        if any(info != infos[0] for info in infos):
            raise ValueError(f"{path} holds files of different token caches; write it anew")
        self.info = infos[0]

    @cached_property
    def table(self) -> pa.Table:
        """All rows; they stay on the disk until they are read."""
        return pa.concat_tables([_open(file).read_all() for file in self.files])

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence."""
        ends = (chunk.offsets.to_numpy() for chunk in self.table["tokens"].chunks)
        return max(int(np.diff(end).max()) for end in ends)

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes map the files themselves, which sends them nothing.
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
    """A number or a text; a tensor of a vector, which batches stack."""
    value = scalar.as_py()
    return torch.tensor(value) if isinstance(value, list) else value


def _open(file: Path) -> Any:
    """Map a file into memory."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(file)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no whole Arrow file: {error}") from error


def _info_of(file: Path, schema: pa.Schema) -> CacheInfo:
    """What a file says of its cache."""
    if _KEY not in (schema.metadata or {}):
        raise ValueError(f"{file} is no file of a token cache")
    return CacheInfo(**json.loads(schema.metadata[_KEY]))
