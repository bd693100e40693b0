"""Public image sets: from Parquet files in the Hugging Face layout, or by download."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.crops import SquareCrop
from taming.data.preprocessing import decode_image, error_context, to_unit_range
from taming.data.roots import cache_folder, data_root

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class LabelledRows(Protocol):
    """Numbered pairs of a picture, (3, H, W) uint8, and its class, None if there are no classes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Tensor, int | None]: ...


class ArrayRows:
    """Pictures in memory: (N, H, W, 3) uint8, or (N, H, W, 1) in grey, and N classes."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = torch.from_numpy(self.images[index]).permute(2, 0, 1)
        return picture.expand(3, -1, -1), self.labels[index]


class ParquetRows:
    """Pictures of a Parquet file, held as encoded bytes and decoded one by one.

    Args:
        path: The file.
        image_column: Column of structs with the encoded image in ``bytes``.
        label_column: Column of class numbers, or None.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no Parquet file or lacks a column.
    """

    def __init__(self, path: str, image_column: str, label_column: str | None) -> None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the Parquet file {path} does not exist")
        try:
            self.schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file: {error}") from error
        self.path = path
        self.image_column = image_column
        self.label_column = label_column
        self.columns = [name for name in (image_column, label_column) if name is not None]
        for name in self.columns:
            if name not in self.schema.names:
                raise ValueError(f"{path} has no column {name!r}, only {self.schema.names}")
        kind = self.schema.field(image_column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise ValueError(
                f"column {image_column!r} of {path} must hold structs with encoded images in "
                f"'bytes', found {kind}"
            )

    @cached_property
    def table(self) -> pa.Table:
        """The columns needed; images stay encoded."""
        return pq.read_table(self.path, columns=self.columns, memory_map=True)

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes open the file themselves: cheaper than sending them all its bytes.
        return {name: value for name, value in vars(self).items() if name != "table"}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        row = self.table.slice(index, 1)
        with error_context(f"{self.path}, row {index}"):
            image = decode_image(io.BytesIO(row[self.image_column][0]["bytes"].as_py()))
        return image, None if self.label_column is None else row[self.label_column][0].as_py()

    def class_names(self) -> list[str]:
        """Return the class names that Hugging Face wrote into the file; none if it did not."""
        metadata = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        return features.get(self.label_column, {}).get("names", [])


class LabelledImages(Dataset[dict[str, Any]]):
    """Turns labelled pictures into items.

    An item has ``image``, (H, W, 3) float32 in [-1, 1]; where there are classes, ``class_label``
    (int64) and ``human_label`` (its name, or its number as text).

    Args:
        rows: The pictures and their classes.
        class_names: Names by class number; may be empty.
        crop: How to rescale, cut and mirror.
    """

    def __init__(self, rows: LabelledRows, class_names: Sequence[str], crop: SquareCrop) -> None:
        self.rows = rows
        self.class_names = class_names
        self.crop = crop

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, label = self.rows[range(len(self))[index]]
        view = self.crop.draw(*picture.shape[-2:])
        item: dict[str, Any] = {"image": to_unit_range(view.apply(picture))}
        if label is not None:
            item["class_label"] = np.int64(label)
            item["human_label"] = self.class_names[label] if self.class_names else str(label)
        return item


class ParquetImages(LabelledImages):
    """Images of a Parquet file in the Hugging Face layout.

    Args:
        path: The file.
        image_column: Column of structs with the encoded image in ``bytes``.
        label_column: Column of class numbers, or None.
        size: Side of the square crops in pixels; None leaves images whole.
        random_crop: Cut anywhere instead of from the middle.
        random_flip: Mirror every other image.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no Parquet file or lacks a column.
    """

    def __init__(
        self,
        path: str,
        image_column: str = "img",
        label_column: str | None = "label",
        size: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
    ) -> None:
        rows = ParquetRows(path, image_column, label_column)
        super().__init__(rows, rows.class_names(), SquareCrop(size, random_crop, random_flip))


class CIFAR10(LabelledImages):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes.

    Args:
        split: "train" or "test".
        path: Parquet file of this split with the columns ``img`` and ``label``; None takes the
            original archive instead.
        root: Folder of the original archive; by default TAMING_DATA, or ``taming/data`` in the
            user's cache.
        download: Fetch the archive if it is not in ``root``.
        size: Side of the images in pixels; they are enlarged if it is above 32.
        random_flip: Mirror every other image.

    Raises:
        ConnectionError: The archive cannot be downloaded.
        FileNotFoundError: Neither the file nor the archive exists, and ``download`` is off.
        ValueError: There is no such split, or the file is not as described.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        path: str | None = None,
        root: str | None = None,
        download: bool = True,
        size: int = 32,
        random_flip: bool = False,
    ) -> None:
        rows = _split_rows(torchvision.datasets.CIFAR10, split, path, root, download, "img")
        super().__init__(rows, CIFAR10_CLASSES, SquareCrop(size, random_flip=random_flip))


class MNIST(LabelledImages):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 pixels in grey.

    Items have three equal channels, as those of every data set.

    Args:
        split: "train" or "test".
        path: Parquet file of this split with the columns ``image`` and ``label``; None takes the
            original files instead.
        root: See `CIFAR10`, as ``download``.
        size: Side of the images in pixels; they are enlarged if it is above 28.

    Raises:
        ConnectionError: The files cannot be downloaded.
        FileNotFoundError: Neither the Parquet file nor the original files exist, and ``download``
            is off.
        ValueError: There is no such split, or the file is not as described.
    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        path: str | None = None,
        root: str | None = None,
        download: bool = True,
        size: int = 32,
    ) -> None:
        rows = _split_rows(torchvision.datasets.MNIST, split, path, root, download, "image")
        super().__init__(rows, (), SquareCrop(size))


Source = type[torchvision.datasets.CIFAR10] | type[torchvision.datasets.MNIST]


def _split_rows(
    source: Source,
    split: str,
    path: str | None,
    root: str | None,
    download: bool,
    image_column: str,
) -> LabelledRows:
    """Rows of a split, from a Parquet file or else from the files that torchvision reads."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if path is not None:
        return ParquetRows(path, image_column, "label")
    folder = data_root(root, cache_folder() / "taming" / "data")
    return _archive(source, split, folder, download)


def _archive(source: Source, split: str, root: Path, download: bool) -> ArrayRows:
    name, files, place = _origin(source, root)
    remedy = f"put {files} into {place}, or pass a Parquet file as path"
    try:
        archive = source(str(root), train=split == "train", download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise ConnectionError(f"cannot download {name} ({error}); {remedy}") from error
        raise FileNotFoundError(f"{name} is not in {root}; set download: true, {remedy}") from error
    images = np.asarray(archive.data)
    if images.ndim == 3:
        images = images[..., None]
    return ArrayRows(images, [int(target) for target in archive.targets])


def _origin(source: Source, root: Path) -> tuple[str, str, Path]:
    """Name of a data set, its files and where they come from, and the folder they belong in."""
    if issubclass(source, torchvision.datasets.CIFAR10):
        return "CIFAR-10", f"{source.filename} from {source.url}", root
    names = ", ".join(name for name, _ in source.resources)
    return "MNIST", f"{names} from {source.mirrors[0]}", root / "MNIST" / "raw"
