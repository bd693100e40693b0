"""Locations of data sets, and errors that name what is missing."""

from __future__ import annotations

import os
from pathlib import Path

UPSTREAM_LISTS = "https://github.com/CompVis/taming-transformers/tree/master/data"


def cache_folder() -> Path:
    """Return the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def data_root(root: str | os.PathLike[str] | None = None, default: str | Path = "data") -> Path:
    """Return the folder of the data sets: ``root``, else TAMING_DATA, else ``default``."""
    return Path(root or os.environ.get("TAMING_DATA") or default).expanduser()


def resolve(path: str | os.PathLike[str]) -> Path:
    """Resolve a path of a configuration: ``data/...`` lies below the data root."""
    parts = Path(path).parts
    inside = parts[:1] == ("data",)
    return data_root().joinpath(*parts[1:]) if inside else Path(path).expanduser()


def require(path: str | os.PathLike[str], what: str, source: str) -> Path:
    """Return a path if it exists.

    Args:
        path: A file or folder of a data set.
        what: Name of its content, for the error.
        source: Address of its content, for the error.

    Raises:
        FileNotFoundError: The path does not exist; names what to get, from where and where to.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: get {what} from {source} and put it there, or name its "
            f"folder in the configuration or in the environment variable TAMING_DATA"
        )
    return path


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        ValueError: The encoding differs; PowerShell's ``>`` may write UTF-16.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: save it in this encoding") from error


def read_list(path: str | os.PathLike[str], source: str = UPSTREAM_LISTS) -> list[str]:
    """Read the non-blank lines of a text file.

    Args:
        path: The file.
        source: Address of the file, for the error.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: All lines are blank.
    """
    text = read_text(require(path, f"the list {Path(path).name}", source))
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if not lines:
        raise ValueError(f"the list {path} is empty")
    return lines
