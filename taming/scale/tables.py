"""Folders, lists, Parquet files, tars and data sets of the hub as sources of pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from taming.data.base import ImagePaths
from taming.data.crops import SquareCrop
from taming.data.custom import ImageFolder, read_path_list
from taming.data.paths import Texts
from taming.data.rows import Columns, Decoder, columns_of, find_shards, open_stream
from taming.data.token_files import RESERVED
from taming.scale.sources import Items, Sample, Source, encodable, shard_size_of
from taming.util import at_least

_LISTS = (".txt", ".lst")
_ROWS = 64  # that are read at a time


class ParquetFiles(Source):
    """Pictures of Parquet files, in ranges of rows.

    Args:
        files: The files.
        shard_size: Largest number of rows of a shard; None chooses it.
        decode: Decoder of the pictures.
        columns: Column of encoded pictures and columns of labels, as for `Columns`.

    Raises:
        ValueError: A file is not a Parquet file, or has no such column or others than the first.
    """

    def __init__(
        self,
        files: Sequence[str],
        shard_size: int | None,
        decode: Decoder,
        columns: tuple[str | None, Sequence[str] | None] = (None, None),
    ) -> None:
        rows, schemas = [], []
        for file in files:
            try:
                opened = pq.ParquetFile(file)
            except Exception as error:  # damaged bytes may raise anything in the reader
                raise ValueError(f"{file} is not a Parquet file: {error}") from error
            rows.append(opened.metadata.num_rows)
            schemas.append(opened.schema_arrow)
            if schemas[-1].names != schemas[0].names:
                raise ValueError(f"{file} has other columns than {files[0]}")
        self.files, self.names, self.decode = list(files), _names_of(files), decode
        self.columns = Columns(schemas[0], columns[0], files[0], columns[1])
        self.pictures = sum(rows)
        size = shard_size or shard_size_of(self.pictures)
        self.ranges = [
            (number, first, min(first + size, length))
            for number, length in enumerate(rows)
            for first in range(0, length, size)
        ]
        self.shards = len(self.ranges)
        self.identity = repr((self.names, self.ranges, vars(self.columns), decode.crop))

    def read(self, shard: int) -> Iterator[Callable[[], Sample]]:
        """Yield functions that read the pictures of a shard, in order."""
        number, first, end = self.ranges[shard]
        file, stem = pq.ParquetFile(self.files[number]), self.names[number]
        lengths = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        starts = [0, *accumulate(lengths)]
        groups = [g for g in range(len(lengths)) if starts[g] < end and starts[g + 1] > first]
        names = [self.columns.image, *self.columns.labels]
        row = starts[groups[0]]
        for batch in file.iter_batches(_ROWS, groups, names):
            for values in batch.to_pylist():
                if first <= row < end:
                    yield partial(_sample_of, f"{stem}/{row}", values, self.columns, self.decode)
                row += 1


class Stream(Source):
    """Pictures of tars or of a data set of the hub; a shard is one of theirs.

    Args:
        data: As for `open_stream`.
        files: Those that it names; none for a data set of the hub.
        split: Split of a data set of the hub.
        decode: Decoder of the pictures.
        columns: Column of encoded pictures and columns of labels, as for `Columns`.

    Raises:
        ValueError: The data cannot be opened.
    """

    pictures = None

    def __init__(
        self,
        data: str | Sequence[str],
        files: Sequence[str],
        split: str,
        decode: Decoder,
        columns: tuple[str | None, Sequence[str] | None] = (None, None),
    ) -> None:
        self.stream, self.decode = open_stream(data, split), decode
        self.columns = columns_of(self.stream, columns[0], str(data), columns[1])
        self.shards: int = self.stream.num_shards
        names = _names_of(files)
        self.names = names if len(names) == self.shards else [f"{n:05}" for n in range(self.shards)]
        self.identity = repr((data, split, self.names, vars(self.columns), decode.crop))

    def read(self, shard: int) -> Iterator[Callable[[], Sample]]:
        """Yield functions that read the pictures of a shard, in order."""
        for number, row in enumerate(self.stream.shard(self.shards, shard)):
            key = f"{self.names[shard]}/{row.get('__key__', number)}"
            yield partial(_sample_of, key, row, self.columns, self.decode)


def _sample_of(key: str, row: Mapping[str, Any], columns: Columns, decode: Decoder) -> Sample:
    found = columns.labels_of(row)
    labels = {name: value for name, value in found.items() if name not in RESERVED}
    try:
        return Sample(key, decode(row[columns.image], key), labels)
    except ValueError as error:
        return Sample(key, None, labels, str(error))


def open_source(
    data: str | Sequence[str],
    *,
    channels: int = 3,
    size: int | None = None,
    labels: bool = False,
    split: str = "train",
    image_column: str | None = None,
    columns: Sequence[str] | None = None,
    shard_size: int | None = None,
    max_pixels: int | None = None,
) -> Source:
    """Find the pictures that a text names.

    Args:
        data: A folder of pictures; a list of them (``.txt``, one path per line); a Parquet file, a
            tar in WebDataset's form, or a folder of either; the URLs of such; several of them; or
            the name of a data set of the hub.
        channels: C, channels of the images.
        size: Side of square crops at the centre in pixels; None keeps the sizes of the pictures.
        labels: Take the folders directly below a folder of pictures for classes.
        split: Split of a data set of the hub.
        image_column: Column of encoded pictures of a table; None takes the only one.
        columns: Columns of a table to keep as labels; None keeps all numbers, vectors and texts.
        shard_size: Number of pictures of a shard where files do not set it; None chooses it.
        max_pixels: Refuse larger pictures, as `taming.decoding.decode_image` does.

    Raises:
        FileNotFoundError: A file does not exist, or a folder holds no pictures.
        ValueError: Nothing of that kind, or an option does not fit it.
    """
    at_least(1, channels=channels, size=size, shard_size=shard_size, max_pixels=max_pixels)
    options: dict[str, Any] = {"channels": channels, "max_pixels": max_pixels}
    is_one = isinstance(data, str | os.PathLike)
    data = _plain(data) if is_one else [_plain(name) for name in data]
    path = data if isinstance(data, str) else ""
    files = find_shards(data, [".tar", ".parquet"])
    is_folder = not files and os.path.isdir(path)
    is_list = Path(path).suffix in _LISTS
    if labels and not is_folder:
        raise ValueError(f"the labels of subfolders need a folder of pictures, not {data}")
    if (is_folder or is_list) and (image_column is not None or columns is not None):
        raise ValueError(f"image_column and columns are of tables, and {data} is none: omit them")
    if (is_folder or is_list or files) and split != "train":
        raise ValueError(f"split is of a data set of the hub, and {data} is none: omit it")
    if is_folder:
        folder = ImageFolder(path, size, labels=labels, allow_upscale=True, **options)
        root = os.path.join(path, "")
        names = Texts(name.removeprefix(root) for name in folder.labels["file_path_"])
        return Items(folder, shard_size, names=names, identity=f"{size} {labels}", threads=True)
    if is_list:
        paths = read_path_list(path)
        if len(set(paths)) < len(paths):
            raise ValueError(f"{path} names {Counter(paths).most_common(1)[0][0]} more than once")
        pictures = ImagePaths(paths, size, antialias=True, **options)
        return Items(pictures, shard_size, names=Texts(paths), identity=str(size), threads=True)
    decode = Decoder(SquareCrop(size), channels, "white", max_pixels)
    is_local = not any("://" in file for file in files)
    if files and is_local and files[0].endswith(".parquet"):
        return ParquetFiles(files, shard_size, decode, (image_column, columns))
    return Stream(data, files, split, decode, (image_column, columns))


def _names_of(files: Sequence[str]) -> list[str]:
    """Name files by their stems, or by their paths if two have one stem."""
    stems = [encodable(Path(file).stem) for file in files]
    return stems if len(set(stems)) == len(stems) else [encodable(file) for file in files]


def _plain(name: str | os.PathLike[str]) -> str:
    """Spell a path that exists in one way, on which keys and the identity depend."""
    path = os.path.expanduser(name)
    return str(Path(path)) if os.path.exists(path) else str(name)
