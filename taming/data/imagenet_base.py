"""ImageNet (ILSVRC2012) from its folder, with class labels.

Files in each of ``ILSVRC2012_train`` and ``ILSVRC2012_validation`` below the data root:
``data/<synset>/*.JPEG``; optionally ``filelist.txt``, the paths of these images below ``data``;
``synset_human.txt`` (a synset and its name per line); and, for ``sub_indices``,
``index_synset.yaml`` (class number: synset). The last two are downloaded if missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from taming.data.base import ImagePaths
from taming.data.roots import cache_folder, data_root, read_list, require
from taming.downloads import download

SOURCE = "https://image-net.org/download-images (ILSVRC2012, one subfolder per synset)"
NAMES_URL = "https://heibox.uni-heidelberg.de/f/9f28e956cd304264bb82/?dl=1"
NUMBERS_URL = "https://heibox.uni-heidelberg.de/f/d835d5b6ceda4d3aa910/?dl=1"

CONFIG_KEYS = {"size", "sub_indices", "root", "ImageNetTrain", "ImageNetValidation"}

# The original leaves this image out; class counts agree only without it.
IGNORED = {"n06596364_9591.JPEG"}


def str_to_indices(string: str) -> list[int]:
    """Parse class numbers such as "32-123, 256, 280-321"; ranges include their ends.

    Returns:
        The distinct numbers in ascending order.

    Raises:
        ValueError: The text does not have this form.
    """
    indices: set[int] = set()
    for part in string.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"expected numbers and ranges like '32-123, 256', got {string!r}")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise ValueError(f"the range {part.strip()} in {string!r} runs backwards")
        indices.update(numbers)
    return sorted(indices)


def give_synsets_from_indices(
    indices: Iterable[int], path_to_yaml: str | os.PathLike[str]
) -> list[str]:
    """Look up the synsets of class numbers (0 to 999) in a file that maps numbers to synsets.

    Raises:
        ValueError: A class number is missing from the file.
    """
    synsets = yaml.safe_load(Path(path_to_yaml).read_text(encoding="utf-8"))
    unknown = [index for index in indices if index not in synsets]
    if unknown:
        raise ValueError(f"{path_to_yaml} has no class {unknown[0]}; it has {len(synsets)} classes")
    return [str(synsets[index]) for index in indices]


def _fetched(path: Path, url: str) -> Path:
    if not path.exists():
        download(url, path)
    return path


def _find_images(folder: Path) -> list[str]:
    """List ``synset/name.JPEG`` of all images, without a stat call for each of the 1.3 million."""
    synsets = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [
        f"{synset}/{name}"
        for synset in synsets
        for name in sorted(os.listdir(folder / synset))
        if name.endswith(".JPEG")
    ]


class ImageNetBase(ImagePaths):
    """One split of ImageNet; subclasses name it.

    Items have ``image``, (H, W, 3) float32 in [-1, 1]; ``class_label`` (int64), the rank of the
    image's synset among the sorted synsets in use; ``human_label``, ``synsets``, ``relpath`` and
    ``file_path_``.

    Args:
        config: ``size``: side of the square crops in pixels (absent or 0: whole images);
            ``sub_indices``: class numbers to keep, such as "30-32, 80"; ``root``: folder of the
            data sets, by default TAMING_DATA, or ``autoencoders/data`` in the user's cache;
            ``random_crop`` in a block of the class's name: crop at random, not at the centre.

    Raises:
        FileNotFoundError: The folder of the split does not exist.
        ConnectionError: A label file is missing and cannot be downloaded.
        ValueError: A key of ``config`` is unknown, or no image is left.
    """

    folder: ClassVar[str]
    block: ClassVar[str]
    random_crop: ClassVar[bool]

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        if unknown := set(config) - CONFIG_KEYS:
            raise ValueError(f"config has unknown keys {unknown}; valid: {sorted(CONFIG_KEYS)}")
        default = cache_folder() / "autoencoders" / "data"
        self.root = data_root(config.get("root"), default) / self.folder
        images = require(self.root / "data", f"the images of {self.folder}", SOURCE)
        filelist = self.root / "filelist.txt"
        found = read_list(filelist) if filelist.exists() else _find_images(images)
        relpaths = self._select(found, config.get("sub_indices"))
        if not relpaths:
            raise ValueError(
                f"sub_indices {config.get('sub_indices')!r} selects no class of the {len(found)} "
                f"images in {images}"
            )
        super().__init__(
            [os.path.join(images, path) for path in relpaths],
            config.get("size"),
            (config.get(self.block) or {}).get("random_crop", self.random_crop),
            self._labels(relpaths),
        )

    def _select(self, relpaths: list[str], sub_indices: str | None) -> list[str]:
        relpaths = [path for path in relpaths if path.rpartition("/")[2] not in IGNORED]
        if sub_indices is None:
            return relpaths
        numbers = _fetched(self.root / "index_synset.yaml", NUMBERS_URL)
        chosen = set(give_synsets_from_indices(str_to_indices(sub_indices), numbers))
        return [path for path in relpaths if path.partition("/")[0] in chosen]

    def _labels(self, relpaths: list[str]) -> dict[str, Any]:
        lines = read_list(_fetched(self.root / "synset_human.txt", NAMES_URL), NAMES_URL)
        parts = (line.split(maxsplit=1) for line in lines)
        names = {own[0]: own[-1] for own in parts}  # a synset without a name is its own
        synsets, labels = np.unique([p.partition("/")[0] for p in relpaths], return_inverse=True)
        known = [str(synset) for synset in synsets]  # one object for all images of a class
        return {
            "relpath": relpaths,
            "synsets": [known[label] for label in labels],
            "class_label": labels.astype(np.int64),
            "human_label": [names.get(known[label], known[label]) for label in labels],
        }


class ImageNetTrain(ImageNetBase):
    """Training images, cropped at random unless ``ImageNetTrain.random_crop`` is false."""

    folder, block, random_crop = "ILSVRC2012_train", "ImageNetTrain", True


class ImageNetValidation(ImageNetBase):
    """Validation images, cropped at random only if ``ImageNetValidation.random_crop`` is true."""

    folder, block, random_crop = "ILSVRC2012_validation", "ImageNetValidation", False
