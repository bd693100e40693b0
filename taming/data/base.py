"""Data sets over lists of picture files.

Items are dictionaries with ``image``, (H, W, C) float32 in [-1, 1], and ``file_path_``.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from taming.data.crops import SquareCrop
from taming.data.paths import Texts, compact
from taming.data.preprocessing import error_context, to_unit_range
from taming.data.utils import refuse_text
from taming.decoding import Colour, decode_image, rgb_of
from taming.util import load_array

logger = logging.getLogger(__name__)


class ConcatDatasetWithIndex(ConcatDataset[Any]):
    """Concatenated data sets with items (item, index of the data set that it comes from)."""

    def __getitem__(self, idx: int) -> tuple[Any, int]:
        idx = range(len(self))[idx]
        return super().__getitem__(idx), bisect_right(self.cumulative_sizes, idx)


class PicturePaths(Dataset[dict[str, Any]], ABC):
    """Rescaled and cropped pictures from a list of files; subclasses implement `read`.

    Args:
        paths: The files; "~" stands for the user's folder.
        size: Side of the square crops in pixels; None keeps pictures whole.
        random_crop: Crop at random instead of at the centre.
        labels: Item key -> one value per file.
        random_flip: Mirror pictures with probability 1/2.
        random_scale: [lo, hi]: sample the short side from [lo * size, hi * size] before cropping.
        allow_upscale: Enlarge pictures smaller than the crop instead of refusing them.
        antialias: Rescale with antialiasing; the original does not.
        on_error: For a picture that cannot be read or is too small: "raise" a ValueError that
            names it, or "skip" it with a warning and use the next one.
        channels: C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; more are the bands of ``.npy`` and
            TIFF files.
        background: Colour under what is transparent, as for `decode_image`.
        max_pixels: Refuse larger files, as `decode_image` does.

    Attributes:
        skipped: Positions of the files skipped so far in this process.

    Raises:
        ValueError: An option is out of range, or a label does not have one value per file.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        size: int | None = None,
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,
        *,
        random_flip: bool = False,
        random_scale: Sequence[float] | None = None,
        allow_upscale: bool = True,
        antialias: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        channels: int = 3,
        background: Colour = "white",
        max_pixels: int | None = None,
    ) -> None:
        refuse_text("paths", paths)
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.crop = SquareCrop(size, random_crop, random_flip, random_scale, allow_upscale)
        self.antialias = antialias
        self.on_error = on_error
        self.channels, self.max_pixels, self.background = channels, max_pixels, rgb_of(background)
        self.labels = {name: compact(name, values) for name, values in (labels or {}).items()}
        self.labels["file_path_"] = Texts(os.path.expanduser(path) for path in paths)
        self._length = len(paths)
        self.skipped: set[int] = set()
        for name, values in self.labels.items():
            if len(values) != len(paths):
                raise ValueError(f"label {name!r} has {len(values)} values for {len(paths)} files")

    @abstractmethod
    def read(self, path: str) -> Tensor:
        """Read a file into (C, H, W) uint8.

        Raises:
            ValueError: The file cannot be read.
        """

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = range(len(self))[index]
        for position in chain(range(start, len(self)), range(start)):
            if position in self.skipped:
                continue
            try:
                return self._item(position)
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                self.skipped.add(position)
                logger.warning(
                    "skipped %d pictures so far; the latest: %s", len(self.skipped), error
                )
        raise ValueError(f"all {len(self)} pictures were skipped")

    def labels_of(self, position: int) -> dict[str, Any]:
        """Return the path and the labels of a picture without reading it."""
        return {name: values[position] for name, values in self.labels.items()}

    def _item(self, position: int) -> dict[str, Any]:
        path = self.labels["file_path_"][position]
        with error_context(f"image {path}"):
            picture = self.read(path)
            view = self.crop.view(*picture.shape[-2:])
        image = to_unit_range(view.apply(picture, antialias=self.antialias))
        return {"image": image, **self.labels_of(position)}


class ImagePaths(PicturePaths):
    """Pictures from image files such as JPEG and PNG."""

    def read(self, path: str) -> Tensor:
        """Decode an image file into (C, H, W) uint8."""
        return decode_image(path, True, self.channels, self.background, self.max_pixels)


class NumpyPaths(PicturePaths):
    """Pictures from ``.npy`` files, each (1, C, H, W) uint8."""

    def read(self, path: str) -> Tensor:
        """Load an array into (C, H, W) uint8."""
        array, channels = load_array(path), self.channels
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[:2] != (1, channels):
            raise ValueError(
                f"expected uint8 (1, {channels}, H, W), found {array.dtype} {array.shape}"
            )
        return torch.from_numpy(array[0])
