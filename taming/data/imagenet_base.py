"""ImageNet (ILSVRC2012) from its folder, with class labels.

Below the data root, for each of ``ILSVRC2012_train`` and ``ILSVRC2012_validation``:
``data/<synset>/*.JPEG``, optionally ``filelist.txt`` with all of these paths below ``data``,
``synset_human.txt`` (synset and its name per line) and, for ``sub_indices``,
``index_synset.yaml`` (class number: synset). The last two are fetched if they are missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.utils.data import Dataset

from taming.data.base import ImagePaths
from taming.data.roots import cache_folder, data_root, read_list, require
from taming.util import download

SOURCE = "https://image-net.org/download-images (ILSVRC2012, one subfolder per synset)"
NAMES_URL = "https://heibox.uni-heidelberg.de/f/9f28e956cd304264bb82/?dl=1"
NUMBERS_URL = "https://heibox.uni-heidelberg.de/f/d835d5b6ceda4d3aa910/?dl=1"

CONFIG_KEYS = {"size", "sub_indices", "root", "ImageNetTrain", "ImageNetValidation"}

# Left out by the original, so that class counts agree.
IGNORED = {"n06596364_9591.JPEG"}


def str_to_indices(string: str) -> list[int]:
    """Read class numbers from text such as "32-123, 256, 280-321"; ranges include their ends.

    Returns:
        The numbers, sorted, each of them once.

    Raises:
        ValueError: The text cannot be read so.
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
    """Look up the synsets of class numbers.

    Args:
        indices: Class numbers, 0 to 999.
        path_to_yaml: File that maps class numbers to synsets.

    Raises:
        ValueError: The file has no such class number.
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
    """List ``synset/name.JPEG`` for all images; ImageNet has too many for anything slower."""
    synsets = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [
        f"{synset}/{name}"
        for synset in synsets
        for name in sorted(os.listdir(folder / synset))
        if name.endswith(".JPEG")
    ]


class ImageNetBase(Dataset[dict[str, Any]]):
    """One split of ImageNet.

    An item has ``image``, (H, W, 3) float32 in [-1, 1]; ``class_label`` (int64), the number of
    its synset among the sorted synsets in use; ``human_label``, ``synsets``, ``relpath`` and
    ``file_path_``.

    Args:
        name: "ILSVRC2012_train" or "ILSVRC2012_validation".
        random_crop: Cut anywhere instead of from the middle.
        config: ``size``: side of the square crops in pixels (absent or 0: whole images);
            ``sub_indices``: class numbers to take, see :func:`str_to_indices`; ``root``: folder of
            the data sets, by default TAMING_DATA, or ``autoencoders/data`` in the user's cache.

    Raises:
        FileNotFoundError: The folder is not there.
        ConnectionError: A label file is missing and cannot be fetched.
        ValueError: A key of ``config`` is unknown, or no image is left.
    """

    def __init__(self, name: str, random_crop: bool, config: Mapping[str, Any]) -> None:
        if unknown := set(config) - CONFIG_KEYS:
            raise ValueError(f"config has unknown keys {unknown}; valid: {sorted(CONFIG_KEYS)}")
        default = cache_folder() / "autoencoders" / "data"
        self.root = data_root(config.get("root"), default) / name
        folder = require(self.root / "data", f"the images of {name}", SOURCE)
        filelist = self.root / "filelist.txt"
        found = read_list(filelist) if filelist.exists() else _find_images(folder)
        relpaths = self._select(found, config.get("sub_indices"))
        if not relpaths:
            raise ValueError(f"none of the {len(found)} images in {folder} belongs to the classes")
        self.data = ImagePaths(
            [os.path.join(folder, path) for path in relpaths],
            config.get("size"),
            random_crop,
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
        names = {synset: name for synset, name in (line.split(maxsplit=1) for line in lines)}
        synsets, labels = np.unique([p.partition("/")[0] for p in relpaths], return_inverse=True)
        known = [str(synset) for synset in synsets]  # shared by all images of a class
        return {
            "relpath": relpaths,
            "synsets": [known[label] for label in labels],
            "class_label": labels.astype(np.int64),
            "human_label": [names[known[label]] for label in labels],
        }

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]


def _option(config: Mapping[str, Any], name: str, default: bool) -> bool:
    return (config.get(name) or {}).get("random_crop", default)


class ImageNetTrain(ImageNetBase):
    """The training images, cut anywhere unless ``config`` has ``ImageNetTrain.random_crop: false``.

    Args:
        config: See :class:`ImageNetBase`.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        super().__init__("ILSVRC2012_train", _option(config, "ImageNetTrain", True), config)


class ImageNetValidation(ImageNetBase):
    """The validation images, cut in the middle unless ``ImageNetValidation.random_crop`` is true.

    Args:
        config: See :class:`ImageNetBase`.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        random_crop = _option(config, "ImageNetValidation", False)
        super().__init__("ILSVRC2012_validation", random_crop, config)
