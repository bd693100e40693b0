"""Images that a model is evaluated on: where they come from, their order, their hash.

Axis letters: B images, C channels, H W image.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from taming.data.datamodule import DataModuleFromConfig
from taming.data.loader import is_stream, length_of
from taming.data.preprocessing import error_context
from taming.data.utils import Readable
from taming.downloads import HUB_NAME
from taming.pictures import Picture, to_tensor
from taming.run.folder import SavedRun
from taming.util import DataError, IncompleteError

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
OnError = Literal["skip", "raise"]
# Groups of pictures of one size wait for each other; more than so many batches of them do not.
_WAITING = 8
# Feature networks take some hundred times the memory of the pixels that they see together.
_PIXELS = 1 << 20


@dataclass(frozen=True)
class ImageSet:
    """Images in batches, which can be read again in the same order.

    Attributes:
        load: Returns the batches from the first on; ``unreadable`` in one lists the reasons why
            images that belong there cannot be read.
        length: Number of images, None if it is not known before.
        about: What stands in the protocol: source, resize and crop.
        on_error: "skip" images that cannot be read, or "raise" an error that names the first.
        unreadable: Why images were skipped so far.
    """

    load: Callable[[], Iterable[Batch]]
    length: int | None
    about: Mapping[str, Any]
    on_error: OnError = "raise"
    unreadable: list[str] = field(default_factory=list)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches from the first on, of what can be read.

        Raises:
            DataError: An image cannot be read and ``on_error`` is "raise".
            IncompleteError: None can.
        """
        is_empty = True
        for batch in self.load():
            images = dict(batch)
            for reason in images.pop("unreadable", ()):
                self._skip(reason)
            if images:
                is_empty = False
                yield images
        if is_empty and self.unreadable:
            number, first = len(self.unreadable), self.unreadable[0]
            raise IncompleteError(f"none of the {number} pictures can be read; the first: {first}")

    def _skip(self, reason: str) -> None:
        if self.on_error == "raise":
            raise DataError(reason)
        if reason not in self.unreadable:  # the images may be read again
            logger.warning("skipped: %s", reason)
            self.unreadable.append(reason)

    def images(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Yield name and image (C, H, W) float32 in [-1, 1] of each item, in order."""
        number = 0
        for batch in self.batches():
            images: Tensor = batch[key]
            images = images[..., None] if images.ndim == 3 else images  # (B, H, W, C)
            names = batch.get("file_path_") or [""] * len(images)
            for name, image in zip(names, images, strict=True):
                yield name or f"image {number}", image.permute(2, 0, 1).float()
                number += 1


def by_shape(
    images: Iterable[tuple[str, Tensor]], most: int
) -> Iterator[tuple[list[int], list[str], Tensor]]:
    """Put images of one size together.

    Args:
        images: Name and image (C, H, W) of each.
        most: Largest number in a group; fewer of more than a megapixel together.

    Yields:
        Positions of the images of a group, from 0; their names; images (B, C, H, W).
    """
    groups: dict[torch.Size, list[tuple[int, str, Tensor]]] = {}
    for position, (name, image) in enumerate(images):
        groups.setdefault(image.shape, []).append((position, name, image))
        full = len(groups[image.shape]) == max(min(most, _PIXELS // image[0].numel()), 1)
        if full or sum(map(len, groups.values())) >= _WAITING * most:
            largest = image.shape if full else max(groups, key=lambda shape: len(groups[shape]))
            yield _together(groups.pop(largest))
    yield from map(_together, groups.values())


def _together(group: Sequence[tuple[int, str, Tensor]]) -> tuple[list[int], list[str], Tensor]:
    positions, names, images = zip(*group, strict=True)
    return [*positions], [*names], torch.stack(images)


class Digest:
    """SHA-256 over the content of images, whatever their order; a pixel changes it."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._sizes: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._digests)

    def update(self, levels: Tensor) -> None:
        """Add images (B, C, H, W) uint8."""
        shape = tuple(levels.shape[1:])
        self._sizes += [(shape[-1], shape[-2])] * len(levels)
        for image in levels.cpu():
            content = repr(shape).encode() + image.contiguous().numpy().tobytes()
            self._digests.append(hashlib.sha256(content).digest())

    def about(self) -> dict[str, Any]:
        """Return number, hash and sizes of the images, for the protocol."""
        small, large = (f(self._sizes, key=lambda s: s[0] * s[1]) for f in (min, max))
        sizes = [f"{width}x{height}" for width, height in (small, large)]
        return {
            "images": len(self._digests),
            "sha256": hashlib.sha256(b"".join(sorted(self._digests))).hexdigest(),
            "resolution": sizes[0] if small == large else " to ".join(sizes),
        }


def of_pictures(
    pictures: Sequence[Picture], key: str, channels: int, on_error: OnError = "raise"
) -> ImageSet:
    """Return the set of pictures of any kind and size, whole; files alone can be unreadable."""

    def image_of(picture: Picture) -> Tensor:
        is_file = isinstance(picture, str | os.PathLike)
        with error_context(f"image {picture}") if is_file else nullcontext():
            return to_tensor(picture, channels).permute(1, 2, 0)[None]

    def batches() -> Iterator[Batch]:
        for picture in pictures:
            try:
                yield {key: image_of(picture)}
            except DataError as error:
                yield {"unreadable": [str(error)]}

    about = {"source": "pictures in memory", "resize": "none", "crop": "none"}
    return ImageSet(batches, len(pictures), about, on_error)


def of_run(saved: SavedRun, on_error: OnError = "raise") -> ImageSet:
    """Return the validation set of a run.

    Raises:
        ValueError: The run has none, or its configuration asks for what it may not.
    """
    data = saved.validation()
    block = saved.config.block("data")
    own = (block.get("params") or {}).get("validation") or block
    about = {"source": f"validation set of {saved.folder}", "resize": "as configured"}
    about |= {"crop": "as configured", "configuration": own}
    datasets = getattr(data, "datasets", {})
    dataset = datasets.get("validation")
    if dataset is None or is_stream(dataset):
        about["unreadable"] = "as configured"
    else:
        datasets["validation"] = Readable(dataset)
    return ImageSet(data.val_dataloader, length_of(dataset), about, on_error)


def of_files(
    source: str | os.PathLike[str],
    key: str,
    channels: int,
    size: int | None,
    batch_size: int,
    classes: int | None = None,
    split: str = "test",
    on_error: OnError = "raise",
) -> ImageSet:
    """Return the images of a folder, a text file that lists them, a Parquet file, or of the hub.

    Args:
        source: Path of the folder or file; a list has one path in each line. Or, where there is
            none, the name of a data set of the hub, ``owner/name``.
        key: Key of the image in a batch.
        channels: C.
        size: Side of the square crops in pixels; None keeps images whole.
        batch_size: Largest number of images of a batch.
        classes: Number of classes that the items must name; None for no classes.
        split: Split of a data set of the hub.
        on_error: "skip" images that cannot be read, or "raise" an error that names the first.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It has no images, or no such classes; or the hub has no such data set.
    """
    path = Path(source).expanduser()
    block = _block_of(path, {"size": size, "channels": channels}, classes is not None, split)
    data = DataModuleFromConfig(batch_size if size else 1, validation=block)
    data.setup("validate")
    dataset = data.datasets["validation"]
    if classes is not None:
        _check_classes(path, dataset, classes)
    about: dict[str, Any] = {"source": str(path), "resize": "none", "crop": "none"}
    if block["target"] == _STREAM:
        dataset.on_error = on_error
        about |= {"source": f"{path} of the hub, split {split}", "unreadable": "named in the log"}
    else:
        data.datasets["validation"] = Readable(dataset)
    if size:
        smoothed = "with" if block["target"] != _PARQUET else "without"
        about["resize"] = f"short side to {size} pixels, bilinear {smoothed} antialiasing"
        about["crop"] = f"square of {size} pixels at the centre"

    def batches() -> Iterator[Batch]:
        for batch in data.val_dataloader():
            yield {**batch, key: batch["image"]} if "image" in batch else batch

    return ImageSet(batches, length_of(dataset), about, on_error)


_PARQUET = "taming.data.hub.ParquetImages"
_STREAM = "taming.data.streams.StreamedImages"


def _block_of(path: Path, params: dict[str, Any], labels: bool, split: str) -> dict[str, Any]:
    """Return the ``{target, params}`` block of the data set in a folder or file, or of the hub."""
    if path.is_dir():
        own = {"root": str(path), "allow_upscale": True, "labels": labels}
        return {"target": "taming.data.custom.ImageFolder", "params": params | own}
    if not path.is_file():
        name = path.as_posix()
        if HUB_NAME.fullmatch(name) and path.suffix not in (".txt", ".parquet"):
            return {"target": _STREAM, "params": params | {"data": name, "split": split}}
        kinds = "folder, list of images or Parquet file"
        raise FileNotFoundError(f"there is no {kinds} {path}; names on the hub are owner/name")
    if path.suffix.lower() == ".parquet":
        params |= {"path": str(path), **_columns_of(path, labels)}
        return {"target": _PARQUET, "params": params}
    own = {"test_images_list_file": str(path), "antialias": True}
    return {"target": "taming.data.custom.CustomTest", "params": params | own}


def _columns_of(path: Path, labels: bool) -> dict[str, str | None]:
    """Name the columns of pictures and, if wanted, classes, as the usual sets have them."""
    try:
        names = pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    image = next((name for name in ("image", "img") if name in names), "image")
    return {"image_column": image, "label_column": "label" if labels and "label" in names else None}


def _check_classes(path: Path, dataset: Any, classes: int) -> None:
    """Refuse data without the classes that a class-conditional prior needs."""
    found = getattr(dataset, "classes", None) or getattr(dataset, "class_names", None)
    items = (
        iter(dataset) if is_stream(dataset) else (Readable(dataset)[i] for i in range(len(dataset)))
    )
    first = next((item for item in items if isinstance(item, Mapping)), {"class_label": 0})
    if "class_label" not in first or (found and len(found) != classes):
        number = f"has {len(found)}" if found else "has none"
        raise ValueError(
            f"this prior is conditional on {classes} classes, and {path} {number}: give a folder "
            "with one folder for each class, or a table with a column label"
        )
