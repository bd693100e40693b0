"""Your own images: a folder of them, or a text file that lists them."""

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
    """Read a text file that names one image per line.

    Blank lines are ignored. A relative path is looked for below the working directory first,
    then below the folder of the list.

    Raises:
        FileNotFoundError: The list, or files that it names, do not exist.
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
            f"{paths.count(None)} of the {len(paths)} files that {list_path} names do not exist, "
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
        random_crop: Cut anywhere instead of from the middle.
        random_flip: Mirror every other image.
        random_scale: [lo, hi]: draw the short side between lo * size and hi * size before the cut.
        allow_upscale: Enlarge images smaller than ``size``, as the original does; or refuse them.
        antialias: Rescale with antialiasing; off, results are as in the original.
        on_error: "raise", or "skip" images that cannot be read or are too small.
    """

    def __init__(
        self,
        size: int,
        training_images_list_file: str,
        *,
        random_crop: bool = False,
        random_flip: bool = False,
        random_scale: Sequence[float] | None = None,
        allow_upscale: bool = True,
        antialias: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(
            read_path_list(training_images_list_file),
            size,
            random_crop,
            random_flip=random_flip,
            random_scale=random_scale,
            allow_upscale=allow_upscale,
            antialias=antialias,
            on_error=on_error,
        )


class CustomTest(ImagePaths):
    """Images named by a text file, cut from the middle, for validation and tests.

    Args:
        size: Side of the square crops in pixels.
        test_images_list_file: Text file, one path per line.
        allow_upscale: Enlarge images smaller than ``size``, as the original does; or refuse them.
        antialias: Rescale with antialiasing; off, results are as in the original.
        on_error: "raise", or "skip" images that cannot be read or are too small.
    """

    def __init__(
        self,
        size: int,
        test_images_list_file: str,
        *,
        allow_upscale: bool = True,
        antialias: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(
            read_path_list(test_images_list_file),
            size,
            allow_upscale=allow_upscale,
            antialias=antialias,
            on_error=on_error,
        )


def find_images(
    root: str | os.PathLike[str],
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    recursive: bool = True,
) -> list[Path]:
    """List the images below a folder, sorted, without hidden files.

    Args:
        root: The folder; links to folders are followed.
        extensions: File name endings to look for, in any case.
        recursive: Look into subfolders too.

    Returns:
        Paths relative to ``root``.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no such file.
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
    """List the image files that paths of files and folders name.

    Raises:
        FileNotFoundError: One of them does not exist, or a folder has no image.
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
    """Say whether a file belongs to the validation split, by its relative path alone."""
    digest = hashlib.md5(path.as_posix().encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class ImageFolder(ImagePaths):
    """All images in a folder and its subfolders, or a fixed share of them.

    Which split an image belongs to follows from its path below ``root``: adding images never
    moves another one from training to validation.

    Args:
        root: The folder.
        size: Side of the square crops in pixels; None leaves images whole.
        split: "train", "validation", or None for all.
        validation_fraction: Share of the images held out for "validation", between 0 and 1.
        labels: Take the folders directly below ``root`` as classes: items get ``class_label``
            (int64, by sorted folder name, the same in both splits) and ``human_label`` (the name).
        extensions: File name endings to look for.
        recursive: Look into subfolders too.
        random_crop: Cut anywhere instead of from the middle.
        random_flip: Mirror every other image.
        random_scale: [lo, hi]: draw the short side between lo * size and hi * size before the cut.
        allow_upscale: Enlarge images smaller than ``size`` instead of refusing them.
        antialias: Rescale with antialiasing, which large photographs need.
        on_error: "raise", or "skip" images that cannot be read or are too small.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no image.
        ValueError: An option is out of range, the split is empty, or an image is in no class.
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
        random_crop: bool = False,
        random_flip: bool = False,
        random_scale: Sequence[float] | None = None,
        allow_upscale: bool = False,
        antialias: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        found = find_images(root, extensions, recursive)
        self.classes = _class_names(root, found) if labels else []
        paths = _select_split(root, found, split, validation_fraction)
        super().__init__(
            [Path(root, path) for path in paths],
            size,
            random_crop,
            _class_labels(paths, self.classes) if labels else None,
            random_flip=random_flip,
            random_scale=random_scale,
            allow_upscale=allow_upscale,
            antialias=antialias,
            on_error=on_error,
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
            f"none of the {len(paths)} images below {root} falls into the {split} split at "
            f"validation_fraction={validation_fraction}; change the fraction or add images"
        )
    return selected


def _class_names(root: str, paths: list[Path]) -> list[str]:
    for path in paths:
        if len(path.parts) == 1:
            raise ValueError(f"labels need a subfolder per class, but {path} is directly in {root}")
    return sorted({path.parts[0] for path in paths})


def _class_labels(paths: list[Path], classes: list[str]) -> dict[str, Any]:
    names = [path.parts[0] for path in paths]
    index = {name: number for number, name in enumerate(classes)}
    return {
        "class_label": np.array([index[name] for name in names], dtype=np.int64),
        "human_label": names,
    }
