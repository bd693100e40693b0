"""Public image sets, from Parquet files in the Hugging Face layout or by download."""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.crops import SquareCrop
from taming.data.preprocessing import error_context, to_unit_range
from taming.data.roots import cache_folder, data_root
from taming.data.utils import refuse_text
from taming.decoding import decode_image
from taming.util import DataError

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class LabelledRows(Protocol):
    """Sequence of pairs: a picture, (C, H, W) uint8, and its class number or None."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Tensor, int | None]: ...


class ArrayRows:
    """Pictures in memory.

    Args:
        images: (N, H, W, 3) uint8, or (N, H, W) or (N, H, W, 1) for grey pictures.
        labels: N class numbers.
    """

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images = images if images.ndim == 4 else images[..., None]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = torch.from_numpy(self.images[index]).permute(2, 0, 1)  # (3 or 1, H, W)
        return picture.expand(3, -1, -1), int(self.labels[index])


class ParquetRows:
    """Pictures of a Parquet file, decoded on access.

    Args:
        path: The file.
        image_column: Column of structs with the encoded image in ``bytes``.
        label_column: Column of class numbers, or None.
        channels: Channels of the pictures, as for `decode_image`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a Parquet file, or a column is missing or of another type.
    """

    def __init__(
        self, path: str, image_column: str, label_column: str | None, channels: int = 3
    ) -> None:
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the Parquet file {path} does not exist")
        try:
            self.schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        self.path, self.channels = path, channels
        self.image_column = image_column
        self.label_column = label_column
        self.columns = [name for name in (image_column, label_column) if name is not None]
        for name in self.columns:
            if name not in self.schema.names:
                raise ValueError(
                    f"{path} has no column {name!r}, only {', '.join(self.schema.names)}"
                )
        kind = self.schema.field(image_column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise ValueError(
                f"column {image_column!r} of {path} must hold structs with encoded images in "
                f"'bytes', found {kind}"
            )

    @cached_property
    def table(self) -> pa.Table:
        """The two columns; images stay encoded."""
        return pq.read_table(self.path, columns=self.columns, memory_map=True)

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes reopen the file, which is cheaper than pickling its bytes.
        return {name: value for name, value in vars(self).items() if name != "table"}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        row = self.table.slice(index, 1)
        with error_context(f"{self.path}, row {index}"):
            file = io.BytesIO(row[self.image_column][0]["bytes"].as_py())
            image = decode_image(file, channels=self.channels)
            if self.label_column is None:
                return image, None
            if (label := row[self.label_column][0].as_py()) is None:
                raise ValueError("it has no label: leave it out, or set label_column to null")
        return image, label

    def class_names(self) -> list[str]:
        """Return the class names in the Hugging Face metadata of the file, or an empty list."""
        metadata = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        return features.get(self.label_column, {}).get("names", [])


class LabelledImages(Dataset[dict[str, Any]]):
    """Data set over labelled pictures.

    Items have ``image``, (H, W, 3) float32 in [-1, 1], and, if the picture has a class,
    ``class_label`` (int64) and ``human_label`` (the class's name, or its number as text).

    Args:
        rows: The pictures and their classes.
        class_names: Names by class number; may be empty.
        crop: Rescaling, cropping and mirroring.
    """

    def __init__(self, rows: LabelledRows, class_names: Sequence[str], crop: SquareCrop) -> None:
        refuse_text("class_names", class_names)
        self.rows = rows
        self.class_names = class_names
        self.crop = crop

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]
        picture, label = self.rows[row]
        view = self.crop.view(*picture.shape[-2:])
        item: dict[str, Any] = {"image": to_unit_range(view.apply(picture))}
        if label is not None:
            if not 0 <= label < (len(self.class_names) or label + 1):
                raise DataError(
                    f"row {row} has the label {label}, which is no class: leave such rows out, or "
                    "set label_column to null"
                )
            item["class_label"] = np.int64(label)
            item["human_label"] = self.class_names[label] if self.class_names else str(label)
        return item


class ParquetImages(LabelledImages):
    """Images of a Parquet file in the Hugging Face layout.

    Args:
        path: The file.
        image_column: Column of structs with the encoded image in ``bytes``.
        label_column: Column of class numbers, or None.
        size: Side of the square crops in pixels; None keeps images whole.
        random_crop: Crop at random instead of at the centre.
        random_flip: Mirror images with probability 1/2.
        channels: Channels of the images, as for `decode_image`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a Parquet file, or a column is missing or of another type.
    """

    def __init__(
        self,
        path: str,
        image_column: str = "img",
        label_column: str | None = "label",
        size: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        channels: int = 3,
    ) -> None:
        rows = ParquetRows(path, image_column, label_column, channels)
        super().__init__(rows, rows.class_names(), SquareCrop(size, random_crop, random_flip))


class DownloadedImages(LabelledImages, ABC):
    """Images of a set that torchvision can download; subclasses name it.

    Args:
        split: "train" or "test".
        path: Parquet file of this split with the columns ``image_column`` and ``label``; None uses
            the original files.
        root: Folder of the original files; by default TAMING_DATA, or ``taming/data`` in the user's
            cache.
        download: Download the original files if they are not in ``root``.
        size: Side of the images in pixels; smaller images are enlarged.
        random_flip: Mirror images with probability 1/2.

    Raises:
        ConnectionError: The original files cannot be downloaded.
        FileNotFoundError: The Parquet file does not exist, or the original files do not and
            ``download`` is off.
        ValueError: The split is unknown, or the Parquet file lacks a column.
    """

    source: Any  # the class of torchvision.datasets
    image_column: ClassVar[str]
    names: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        path: str | None = None,
        root: str | None = None,
        download: bool = True,
        size: int = 32,
        random_flip: bool = False,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if path is None:
            folder = data_root(root, cache_folder() / "taming" / "data")
            rows: LabelledRows = self._original(split, folder, download)
        else:
            rows = ParquetRows(path, self.image_column, "label")
        super().__init__(rows, self.names, SquareCrop(size, random_flip=random_flip))

    def _original(self, split: str, root: Path, download: bool) -> ArrayRows:
        name, remedy = type(self).__name__, f"{self.remedy(root)}, or pass a Parquet file as path"
        try:
            archive = self.source(str(root), train=split == "train", download=download)
        except (OSError, RuntimeError) as error:
            if download:
                raise ConnectionError(f"cannot download {name} ({error}); {remedy}") from error
            message = f"{name} is not in {root}; set download: true, {remedy}"
            raise FileNotFoundError(message) from error
        return ArrayRows(np.asarray(archive.data), archive.targets)

    @abstractmethod
    def remedy(self, root: Path) -> str:
        """Return the address of the original files and the folder for them."""


class CIFAR10(DownloadedImages):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes."""

    source = torchvision.datasets.CIFAR10
    image_column = "img"
    names = CIFAR10_CLASSES

    def remedy(self, root: Path) -> str:
        """Name the archive, its address and the root."""
        return f"put {self.source.filename} from {self.source.url} into {root}"


class MNIST(DownloadedImages):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 grey pixels.

    Items have three equal channels, so that all data sets agree.
    """

    source = torchvision.datasets.MNIST
    image_column = "image"

    def remedy(self, root: Path) -> str:
        """Name the four files, their address and torchvision's folder for them."""
        files = ", ".join(name for name, _ in self.source.resources)
        return f"put {files} from {self.source.mirrors[0]} into {root / 'MNIST' / 'raw'}"
