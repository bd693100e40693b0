"""Cache of token sequences, computed once by `taming.scale` and read instead of pictures.

A cache is a folder of Arrow files (`taming.data.token_files`) with one row per picture: its tokens,
key and size, and its labels. The files are memory-mapped, so processes share their pages and
nothing is decoded. ``checksums.json``, which is saved last, has the CRC-32 and the number of
pictures of every file: a cache that is still written has none. One of an earlier version may have
none either; of that, only what Arrow and the values themselves show is checked.

Axis letters: N pictures, L tokens, h w grid.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from taming.data.token_files import (
    AGAIN,
    CHECKSUMS,
    check_files,
    check_table,
    grids_of,
    list_files,
    named,
    open_file,
    properties_of,
)
from taming.data.utils import stackable


class TokenCache(Dataset[dict[str, Any]]):
    """Data set over the pictures of a cache.

    Items have ``tokens`` (L,) int64, -1 after the end of the sequence, with L the length of the
    longest one; ``grid`` (2,) int64; ``pixels``; ``fingerprint``; ``key``, ``height`` and ``width``
    unless an earlier version wrote the cache; and the labels, such as ``class_label``, vectors as
    int64 or float32 tensors. In a prior's configuration it replaces the data set of images:

    .. code-block:: yaml

        train:
          target: taming.data.tokens.TokenCache
          params: {path: cache/train}

    Args:
        path: Folder of the cache.

    Every file is read once and checked when the data set is built, not in loader processes.

    Attributes:
        about: Properties that all files share.

    Raises:
        FileNotFoundError: The folder contains no cache.
        ValueError: A file is missing or damaged, the files belong to different caches, or the cache
            is not finished.
    """

    def __init__(self, path: str) -> None:
        folder = Path(path).expanduser()
        files = list_files(folder)
        if not files:
            raise FileNotFoundError(f"{path} holds no token cache; `taming encode` makes one")
        images = check_files(folder, [file.name for file in files])
        schemas, about, self.files = [], [], list[Path]()
        for file in files:
            with named(file):
                table = open_file(file).read_all()
                about.append(properties_of(table.schema))
                check_table(table, about[-1], images.get(file.name))
            if table.num_rows:  # else all pictures of the shard were unreadable
                self.files.append(file)
                schemas.append(table.schema)
        same = all(schema.equals(schemas[0]) for schema in schemas)
        if not (schemas and same and all(one == about[0] for one in about)):
            raise ValueError(f"{path} holds files of different token caches; encode it again")
        if not images and "vocab_size" in about[0]:
            raise ValueError(f"{path} has lost its {CHECKSUMS}; {AGAIN}")
        self.about = about[0]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer that wrote the cache."""
        return self.about["fingerprint"]

    @cached_property
    def table(self) -> pa.Table:
        """All rows, memory-mapped."""
        tables = (open_file(file).read_all() for file in self.files)
        return pa.concat_tables([table.replace_schema_metadata() for table in tables])

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence in tokens."""
        ends = (chunk.offsets.to_numpy() for chunk in self.table["tokens"].chunks)
        return max(int(np.diff(end).max()) for end in ends)

    @cached_property
    def buckets(self) -> np.ndarray:
        """Number of each picture's grid, (N,) int64; pictures of one batch share it."""
        if "grid" in self.about:
            return np.zeros(len(self), np.int64)
        h, w = self._grids(*(self.table[side].to_numpy() for side in ("height", "width")))
        return np.unique(h.astype(np.int64) << 32 | w, return_inverse=True)[1]

    def _grids(self, height: Any, width: Any) -> tuple[Any, Any]:
        return grids_of(height, width, self.about["site"])

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
        names = [name for name in row.column_names if name != "tokens"]
        labels = {name: stackable(row[name][0].as_py()) for name in names}
        return {"tokens": tokens, **self._size_of(labels), **labels}

    def _size_of(self, labels: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of a picture that a prior needs, beside its tokens."""
        if "grid" in self.about:
            grid, pixels = self.about["grid"], self.about["pixels"]
        else:
            height, width = labels["height"], labels["width"]
            grid, pixels = self._grids(height, width), height * width
        return {
            "grid": torch.tensor(grid),
            "pixels": pixels,
            "fingerprint": self.fingerprint,
        }
