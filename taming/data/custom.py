"""Your own images, from a folder or from a text file that lists them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from taming.data.base import ImagePaths
from taming.data.roots import read_text

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def read_path_list(list_file: str | os.PathLike[str]) -> list[str]:
    """Read a text file with one image path per line, ignoring blank lines.

    Relative paths are resolved against the working directory first, then against the folder of
    the list.

    Raises:
        FileNotFoundError: The list, or a file that it names, does not exist.
        ValueError: The list is empty.
    """
    list_path = Path(list_file)
    if not list_path.is_file():
        raise FileNotFoundError(f"the list of images {list_path} does not exist")
    lines = enumerate(read_text(list_path).splitlines(), start=1)
    names = [(name, number) for number, line in lines if (name := line.strip())]
    paths = [_locate(name, list_path.parent) for name, _ in names]
    if not paths:
        raise ValueError(f"the list of images {list_path} is empty")
    if None in paths:
        name, number = names[paths.index(None)]
        raise FileNotFoundError(
            f"{paths.count(None)} of the {len(paths)} files that {list_path} names do not exist; "
            f"the first is {name} (line {number})"
        )
    return [path for path in paths if path is not None]


def _locate(name: str, folder: Path) -> str | None:
    return next((str(path) for path in (Path(name), folder / name) if path.is_file()), None)


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


def find_images(
    root: str | os.PathLike[str],
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    recursive: bool = True,
) -> list[Path]:
    """List the images below a folder in sorted order, skipping hidden files and folders.

    Args:
        root: The folder; links to folders are followed.
        extensions: File name extensions to include; case is ignored.
        recursive: Include subfolders.

    Returns:
        Paths relative to ``root``.

    Raises:
        FileNotFoundError: The folder does not exist or contains no image.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"the image folder {root} does not exist")
    endings = tuple(extension.lower() for extension in extensions)
    paths = sorted(path for path in _walk(root, recursive) if path.name.lower().endswith(endings))
    if not paths:
        where = "in or below" if recursive else "directly in"
        raise FileNotFoundError(f"no image ({', '.join(endings)}) was found {where} {root}")
    return paths


def find_files(paths: Sequence[str]) -> list[Path]:
    """List the given image files, replacing each folder by the images below it.

    Raises:
        FileNotFoundError: A path does not exist, or a folder contains no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [path / name for name in find_images(path)]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no image or folder {path}")
    return files


def _walk(root: str | os.PathLike[str], recursive: bool) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(folder, name).relative_to(root)


def is_held_out(path: Path, fraction: float) -> bool:
    """Return True if a file belongs to the validation split, which only its path decides."""
    digest = hashlib.md5(path.as_posix().encode(), usedforsecurity=False).digest()
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
        extensions: File name extensions to include.
        recursive: Include subfolders.
        allow_upscale: Enlarge images smaller than ``size`` instead of refusing them.
        antialias: Rescale with antialiasing, which large photographs need.
        **options: Other options of `PicturePaths`.

    Raises:
        FileNotFoundError: The folder does not exist or contains no image.
        ValueError: An option is out of range, the split is empty, or ``labels`` is on and an image
            lies directly in ``root``.
    """

    def __init__(
        self,
        root: str,
        size: int | None = None,
        split: Literal["train", "validation"] | None = None,
        *,
        validation_fraction: float = 0.05,
        labels: bool = False,
        extensions: Sequence[str] = IMAGE_EXTENSIONS,
        recursive: bool = True,
        allow_upscale: bool = False,
        antialias: bool = True,
        **options: Any,
    ) -> None:
        found = find_images(root, extensions, recursive)
        self.classes = _class_names(root, found) if labels else []
        paths = _select_split(root, found, split, validation_fraction)
        super().__init__(
            [Path(root, path) for path in paths],
            size,
            labels=_class_labels(paths, self.classes) if labels else None,
            allow_upscale=allow_upscale,
            antialias=antialias,
            **options,
        )


def _select_split(
    root: str, paths: list[Path], split: str | None, validation_fraction: float
) -> list[Path]:
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
            f"validation_fraction={validation_fraction}; change the fraction or add images"
        )
    return selected


def _class_names(root: str, paths: list[Path]) -> list[str]:
    if loose := [path for path in paths if len(path.parts) == 1]:
        raise ValueError(f"labels needs a folder per class, but {loose[0]} is directly in {root}")
    return sorted({path.parts[0] for path in paths})


def _class_labels(paths: list[Path], classes: list[str]) -> dict[str, Any]:
    names = [path.parts[0] for path in paths]
    number = {name: number for number, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], dtype=np.int64)
    return {"class_label": labels, "human_label": names}
