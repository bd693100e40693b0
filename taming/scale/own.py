"""The pictures of a run's own data, as its training saw them."""

from __future__ import annotations

from typing import Any

from taming.data.loader import is_stream
from taming.run.folder import SavedRun
from taming.scale.sources import Items
from taming.util import at_least, nearest


class Split:
    """A split of a run's own data, built in each process when its first item is read.

    Args:
        saved: The run.
        name: Name of the split.

    Raises:
        ValueError: There is no such split, or it is a stream.
    """

    def __init__(self, saved: SavedRun, name: str) -> None:
        self.saved, self.name = saved, name
        self._items: Any = None
        self._length = len(self._built())

    def _built(self) -> Any:
        if self._items is None:
            found = self.saved.data().datasets
            if self.name not in found:
                raise ValueError(
                    f"--splits: unknown split {self.name!r}{nearest(self.name, found)}"
                )
            if is_stream(found[self.name]):
                raise ValueError(
                    f"the {self.name} data of {self.saved.folder} is a stream: name its pictures "
                    "by --data"
                )
            self._items = found[self.name]
        return self._items

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_items": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._built()[index]


def splits_of(saved: SavedRun) -> list[str]:
    """List the splits of a run's own data."""
    return [name for name in ("train", "validation", "test") if name in saved.data().datasets]


def own_source(saved: SavedRun, split: str, passes: int = 1, seed: int = 0) -> Items:
    """Return the pictures of a split of a run's own data.

    Args:
        saved: The run, with what the user has changed in its data.
        split: Name of the split.
        passes: Number of passes, each with other random crops.
        seed: Seed of the random crops.

    Raises:
        ValueError: There is no such split, it is a stream, or a number is too small.
    """
    at_least(1, passes=passes)
    at_least(0, seed=seed)
    key = (saved.config.block("model").get("params") or {}).get("image_key", "image")
    identity = repr(saved.config.block("data"))
    options: dict[str, Any] = {"image_key": key, "passes": passes, "seed": seed}
    return Items(Split(saved, split), identity=identity, **options)
