"""Your own images, from a folder or from a text file that lists them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from taming.data.base import ImagePaths
from taming.data.paths import find_images
from taming.data.roots import read_text
from taming.data.utils import refuse_text


def read_path_list(list_file: str | os.PathLike[str]) -> list[str]:
    """Read a text file with one image path per line, ignoring blank lines.

    Relative paths are resolved against the working directory first, then against the folder of
    the list.

    Raises:
        FileNotFoundError: The list, or a file that it names, does not exist.
        ValueError: The list is empty.
    """
    list_path = Path(list_file).expanduser()
    if not list_path.is_file():
        raise FileNotFoundError(f"the list of images {list_path} does not exist")
    folder, lines = str(list_path.parent), read_text(list_path).splitlines()
    names = [(name, number) for number, line in enumerate(lines, 1) if (name := line.strip())]
    paths = [_locate(name, folder) for name, _ in names]
    if not paths:
        raise ValueError(f"the list of images {list_path} is empty")
    if None in paths:
        name, number = names[paths.index(None)]
        raise FileNotFoundError(
            f"{paths.count(None)} of the {len(paths)} files that {list_path} names do not exist; "
            f"the first is {name} (line {number})"
        )
    return [path for path in paths if path is not None]


def _locate(name: str, folder: str) -> str | None:
    name = os.path.expanduser(name)
    if os.path.isfile(name):
        return name
    beside = os.path.join(folder, name)
    return beside if os.path.isfile(beside) else None


class CustomTrain(ImagePaths):
    """Images named by a text file, for training.

    Args:
        size: Side of the square crops in pixels.
        training_images_list_file: Text file, one path per line.
        **options: Options of `PicturePaths`, such as ``random_crop``.
    """

    def __init__(self, size: int, training_images_list_file: str, **options: Any) -> None:
        super().__init__(read_path_list(training_images_list_file), size, **options)


class CustomTest(ImagePaths):
    """Images named by a text file, cropped at the centre, for validation and tests.

    Args:
        size: Side of the square crops in pixels.
        test_images_list_file: Text file, one path per line.
        **options: Options of `PicturePaths`, such as ``antialias``.
    """

    def __init__(self, size: int, test_images_list_file: str, **options: Any) -> None:
        super().__init__(read_path_list(test_images_list_file), size, **options)


def find_files(paths: Sequence[str], extensions: Sequence[str] | None = None) -> list[Path]:
    """List the given files, replacing each folder by the images, or other files, below it.

    A file that several of the paths lead to is listed once, by the first.

    Args:
        paths: Files and folders.
        extensions: As for `find_images`, of the files below folders.

    Raises:
        FileNotFoundError: A path does not exist, or a folder contains no such file.
        ValueError: A folder cannot be read, or ``paths`` is a text.
    """
    refuse_text("paths", paths)
    files: list[Path] = []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            files += [path / name for name in find_images(path, extensions)]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    first: dict[Path, Path] = {}
    for file in files:
        first.setdefault(file.resolve(), file)
    return [*first.values()]


def unique_names(paths: Sequence[Path], endings: Sequence[str]) -> list[str]:
    """Name the results of each file by its stem, numbered where several files share it.

    Args:
        paths: The files.
        endings: What a name is followed by in the names of its results.

    Returns:
        A name for each file, so that all results differ, also where case is ignored.
    """
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        for number in count(1):
            name = f"{path.stem}_{number}" if number > 1 else path.stem
            results = {f"{name}{ending}".casefold() for ending in endings}
            if taken.isdisjoint(results):
                break
        names.append(name)
        taken |= results
    return names


def is_held_out(path: str, fraction: float) -> bool:
    """Return True if a file belongs to the validation split, which only its path decides."""
    name = path.replace(os.sep, "/").encode("utf-8", "surrogateescape")
    digest = hashlib.md5(name, usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class ImageFolder(ImagePaths):
    """Images in a folder and its subfolders, or one split of them.

    The split of an image depends only on its path below ``root``, so adding images never moves
    another image between training and validation.

    Args:
        root: The folder.
        size: Side of the square crops in pixels; None keeps images whole.
        split: "train", "validation", or None for all.
        validation_fraction: Share of the images held out for "validation", in (0, 1).
        labels: Use the folders directly below ``root`` as classes: items get ``class_label``
            (int64, rank of the sorted folder name, equal in both splits) and ``human_label``
            (the folder name).
        extensions: File name extensions to include; None includes all formats that are decoded.
        recursive: Include subfolders.
        allow_upscale: Enlarge images smaller than ``size`` instead of refusing them.
        antialias: Rescale with antialiasing, which large photographs need.
        channels: C, channels of the images.
        **options: Other options of `PicturePaths`.

    Raises:
        FileNotFoundError: The folder does not exist or contains no image.
        ValueError: A folder cannot be read, an option is out of range, the split is empty, or
            ``labels`` is on and an image lies directly in ``root``.
    """

    def __init__(
        self,
        root: str,
        size: int | None = None,
        split: Literal["train", "validation"] | None = None,
        *,
        validation_fraction: float = 0.05,
        labels: bool = False,
        extensions: Sequence[str] | None = None,
        recursive: bool = True,
        allow_upscale: bool = False,
        antialias: bool = True,
        channels: int = 3,
        **options: Any,
    ) -> None:
        found = find_images(root, extensions, recursive, channels)
        self.classes = _class_names(root, found) if labels else []
        paths = _select_split(root, found, split, validation_fraction)
        folder = "" if (name := str(Path(root).expanduser())) == "." else name
        super().__init__(
            [os.path.join(folder, path) for path in paths],
            size,
            labels=_class_labels(paths, self.classes) if labels else None,
            allow_upscale=allow_upscale,
            antialias=antialias,
            channels=channels,
            **options,
        )


def _select_split(
    root: str, paths: list[str], split: str | None, validation_fraction: float
) -> list[str]:
    if split not in (None, "train", "validation"):
        raise ValueError(f"split must be 'train', 'validation' or none, got {split!r}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if split is None:
        return paths
    held_out = split == "validation"
    selected = [path for path in paths if is_held_out(path, validation_fraction) == held_out]
    if not selected:
        raise ValueError(
            f"the {split} split of the {len(paths)} images below {root} is empty with "
            f"validation_fraction={validation_fraction}, since a hash of its name decides where an "
            f"image goes; try {_fraction(paths, held_out):.2f} in both data sets, or add images"
        )
    return selected


def _fraction(paths: list[str], held_out: bool) -> float:
    """Return a fraction, in hundredths, with which a split has one image or more."""
    shares = [n / 100 for n in (range(1, 100) if held_out else range(99, 0, -1))]
    return next(
        (s for s in shares if any(is_held_out(p, s) == held_out for p in paths)), shares[-1]
    )


def _class_names(root: str, paths: list[str]) -> list[str]:
    if loose := [path for path in paths if os.sep not in path]:
        raise ValueError(f"labels needs a folder per class, but {loose[0]} is directly in {root}")
    return sorted({path.partition(os.sep)[0] for path in paths})


def _class_labels(paths: list[str], classes: list[str]) -> dict[str, Any]:
    number = {name: number for number, name in enumerate(classes)}
    labels = np.array([number[path.partition(os.sep)[0]] for path in paths], dtype=np.int64)
    return {"class_label": labels, "human_label": [classes[label] for label in labels]}
