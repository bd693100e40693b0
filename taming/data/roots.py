"""Where data sets lie, and what to say about those that are not there."""

from __future__ import annotations

import os
from pathlib import Path

UPSTREAM_LISTS = "https://github.com/CompVis/taming-transformers/tree/master/data"


def cache_folder() -> Path:
    """Return the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def data_root(root: str | os.PathLike[str] | None = None, default: str | Path = "data") -> Path:
    """Return the folder of the data sets: ``root``, else TAMING_DATA, else ``default``."""
    return Path(root or os.environ.get("TAMING_DATA") or default)


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the place of a path in a configuration: ``data/...`` lies below the data root."""
    parts = Path(path).parts
    return data_root().joinpath(*parts[1:]) if parts[:1] == ("data",) else Path(path)


def require(path: str | os.PathLike[str], what: str, source: str) -> Path:
    """Return a path if it exists.

    Args:
        path: A file or folder of a data set.
        what: What belongs there.
        source: Where to get it.

    Raises:
        FileNotFoundError: It does not exist; says what to get, from where, and where to put it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: get {what} from {source} and put it there, or name the "
            f"folder where it is in the configuration or the environment variable TAMING_DATA"
        )
    return path


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ValueError: It is not in UTF-8; PowerShell's ``>`` may write UTF-16.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: save it so") from error


def read_list(path: str | os.PathLike[str], source: str = UPSTREAM_LISTS) -> list[str]:
    """Read a text file that names one thing per line; blank lines are ignored.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It names nothing.
    """
    text = read_text(require(path, f"the list {Path(path).name}", source))
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if not lines:
        raise ValueError(f"the list {path} is empty")
    return lines
