"""Paths of pictures: found in folders, each file once, and kept in one buffer."""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice
from typing import Any, overload

import numpy as np

from taming.data.utils import refuse_text
from taming.decoding import picture_extensions
from taming.util import DataError

logger = logging.getLogger(__name__)

PLACEHOLDER = "path/to/images"  # folder in the recipes, for the user to replace


class Texts(Sequence[str]):
    """An immutable list of texts in one buffer, which worker processes share.

    Reading a list of Python strings changes their reference counts, so that each worker would
    slowly copy the memory of all of them.

    Args:
        texts: The texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._buffer, lengths, rest = bytearray(), array("q", [0]), iter(texts)
        # File names may hold bytes that are no UTF-8, as lone surrogates.
        while part := [text.encode("utf-8", "surrogatepass") for text in islice(rest, 1 << 16)]:
            self._buffer += b"".join(part)
            lengths.extend(map(len, part))
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[number] for number in place]
        text = self._buffer[self._ends[place] : self._ends[place + 1]]
        return text.decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} texts>"


def compact(name: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of a label, a list of texts as `Texts`.

    Raises:
        ValueError: The values are a text; names the label.
    """
    refuse_text(f"label {name!r}", values)
    is_texts = isinstance(values, list) and all(type(value) is str for value in values)
    return Texts(values) if is_texts else values


def find_images(
    root: str | os.PathLike[str],
    extensions: Sequence[str] | None = None,
    recursive: bool = True,
    channels: int = 3,
) -> list[str]:
    """List the images below a folder in sorted order, skipping hidden files and folders.

    Links are followed, but no file or folder is taken twice: the path without links counts, or
    else the first. One warning names what was left out.

    Args:
        root: The folder.
        extensions: File name extensions to include; case is ignored. None includes those of all
            formats that are decoded to ``channels``.
        recursive: Include subfolders.
        channels: Channels of the images.

    Returns:
        Paths relative to ``root``.

    Raises:
        FileNotFoundError: The folder does not exist or contains no image.
        DataError: A folder cannot be read.
        ValueError: ``extensions`` is a text.
    """
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        remedy = "; set data.params.train.params.root" if root == PLACEHOLDER else ""
        raise FileNotFoundError(f"the image folder {root} does not exist{remedy}")
    endings = picture_extensions(channels) if extensions is None else _endings(extensions)
    found, left_out = _Files(), Counter[str]()
    for path, entry, is_linked in _walk(root, recursive):
        if not path.lower().endswith(endings):
            left_out[os.path.splitext(path)[1].lower() or "without an ending"] += 1
        elif entry.is_symlink() or entry.is_file():
            found.add(path, entry, is_linked)
        else:
            left_out["pipes and devices"] += 1
    if not found.paths:
        where = "in or below" if recursive else "directly in"
        more = f" and {len(endings) - 8} more" if len(endings) > 8 else ""
        named = f"{', '.join(endings[:8])}{more}"
        what = "image" if extensions is None else "file"
        raise FileNotFoundError(f"no {what} ({named}) was found {where} {root}")
    paths = found.distinct(root)
    if extensions is not None:
        left_out.clear()
    if again := len(found.paths) - len(paths):
        left_out["that link to others"] = again
    if left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
        logger.warning("files below %s that are left out: %s", root, counts)
    return paths


def _endings(extensions: Sequence[str]) -> tuple[str, ...]:
    refuse_text("extensions", extensions)
    lower = [extension.lower() for extension in extensions]
    return tuple(e if "." in e or not e else f".{e}" for e in lower)


def _walk(root: str, recursive: bool) -> Iterator[tuple[str, os.DirEntry[str], bool]]:
    """Yield relative path, entry, and True below a linked folder, of all files below a folder.

    Each folder is entered once; links come last, so that a path without links is preferred.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [("", False)], list[str]()
    while folders or links:
        if not folders:
            folders.append((heappop(links), True))
        relative, is_linked = folders.pop()
        folder = os.path.join(root, relative)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = os.path.join(relative, entry.name)
                    if not _is_folder(entry):
                        yield path, entry, is_linked
                    elif recursive and entry.is_symlink():
                        heappush(links, path)
                    elif recursive:
                        folders.append((path, is_linked))
        except OSError as error:
            raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that cannot be searched
        return False


class _Files:
    """Files of a folder: their paths, numbers on the disk, and whether a link leads to them."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.inodes, self.linked = array("Q"), bytearray()

    def add(self, path: str, entry: os.DirEntry[str], is_linked: bool) -> None:
        """Add a file; the number of a link is that of its target, 0 if there is none."""
        inode = entry.inode()
        if entry.is_symlink():
            try:
                inode = entry.stat().st_ino
            except OSError:
                inode = 0
        self.paths.append(path)
        self.inodes.append(inode)
        self.linked.append(is_linked or entry.is_symlink())

    def distinct(self, root: str) -> list[str]:
        """Return the sorted paths, without those that lead to a file of another one."""
        names = [path.replace(os.sep, "\0") for path in self.paths]  # sorts folder by folder
        order = sorted(range(len(names)), key=names.__getitem__)
        _, group, counts = np.unique(self.inodes, return_inverse=True, return_counts=True)
        repeated = counts[group] > 1
        seen: set[tuple[int, int]] = set()
        left_out: set[int] = set()
        for number in sorted((n for n in order if repeated[n]), key=self.linked.__getitem__):
            try:
                status = os.stat(os.path.join(root, self.paths[number]))
            except OSError:  # reading it will name it
                continue
            # Some file systems give one number to several files, which then have one name each.
            is_shared = self.linked[number] or status.st_nlink > 1
            if is_shared and (status.st_dev, status.st_ino) in seen:
                left_out.add(number)
            seen.add((status.st_dev, status.st_ino))
        return [self.paths[number] for number in order if number not in left_out]
