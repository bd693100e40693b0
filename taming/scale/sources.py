"""Pictures to encode, divided into shards that any process can read alone.

Axis letters: C channels, H W picture.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from taming.data.loader import ITEM, seed_generators
from taming.util import DataError

_PICTURES, _PIXELS = 64, 1 << 25  # most of a group, whose last picture may be larger
_FEW, _MANY, _SHARDS = 64, 10_000, 64  # bounds of a shard's pictures, and shards aimed at


class Sample(NamedTuple):
    """A picture to encode.

    Attributes:
        key: Name of the picture, which no other one of the source has.
        image: (H, W, C) float32 in the model's range; None if it cannot be read.
        labels: Numbers, texts and vectors of numbers.
        error: The reason why it cannot be read.
    """

    key: str
    image: Any
    labels: dict[str, Any]
    error: str = ""


class Source(ABC):
    """Pictures in shards. It is sent to other processes by pickle.

    Attributes:
        shards: Number of shards.
        pictures: Number of pictures, None if it is not known.
        identity: Text that differs if the pictures or their shards do.
        image_key: Item key of the images, for errors.
        threads: True if several threads may read at once.
    """

    shards: int
    pictures: int | None
    identity: str
    image_key = "image"
    threads = True

    @abstractmethod
    def read(self, shard: int) -> Iterator[Callable[[], Sample]]:
        """Yield functions that read the pictures of a shard, in order."""


def groups_of(source: Source, shard: int, threads: int) -> Iterator[list[Sample]]:
    """Read the pictures of a shard in order, in groups that fit a memory, and ahead of their use.

    Args:
        source: The pictures.
        shard: Number of the shard.
        threads: Number of threads that read, if the source allows several.
    """
    threads = threads if source.threads else 1
    samples: list[Sample] = []
    pixels = 0
    with ThreadPoolExecutor(threads) as pool:
        for sample in _ahead(source.read(shard), pool, 2 * threads):
            samples.append(sample)
            pixels += 0 if sample.image is None else math.prod(sample.image.shape[:2])
            if len(samples) >= _PICTURES or pixels >= _PIXELS:
                yield samples
                samples, pixels = [], 0
    if samples:
        yield samples


def _ahead(
    tasks: Iterable[Callable[[], Sample]], pool: ThreadPoolExecutor, number: int
) -> Iterator[Sample]:
    """Call functions in threads, a number of them before their results are used, in order."""
    waiting: deque[Future[Sample]] = deque()
    for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) > number:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def shard_size_of(pictures: int) -> int:
    """Return the default number of pictures of a shard: some shards for each process."""
    return min(max(-(-pictures // _SHARDS), _FEW), _MANY)


def labels_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the numbers, texts and vectors of numbers of an item."""
    labels = {}
    for key, value in item.items():
        if isinstance(value, np.ndarray | Tensor | np.generic):
            if value.ndim <= 1 and not isinstance(value, np.str_):
                labels[key] = value.tolist()
        elif isinstance(value, str | int | float):
            labels[key] = encodable(value) if isinstance(value, str) else value
    return labels


def encodable(text: str) -> str:
    """Return a text that UTF-8 can hold, with an escape for each other byte of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode()


class Items(Source):
    """Items of a data set with indices, pass after pass.

    Args:
        dataset: The data set.
        shard_size: Number of pictures of a shard; None chooses it.
        names: Keys of the pictures; by default, number of the pass and index.
        identity: Text that differs if the data set does.
        image_key: Item key of the images.
        passes: Number of passes, each with other random numbers.
        seed: Seed of the random numbers of each item, by pass and index.
        threads: Let several threads read; then items must not draw random numbers.
    """

    def __init__(
        self,
        dataset: Any,
        shard_size: int | None = None,
        *,
        names: Sequence[str] | None = None,
        identity: str = "",
        image_key: str = "image",
        passes: int = 1,
        seed: int = 0,
        threads: bool = False,
    ) -> None:
        self.dataset, self.names, self.image_key = dataset, names, image_key
        self.passes, self.seed, self.threads = passes, seed, threads
        self.length = len(dataset)
        self.shard_size = shard_size or shard_size_of(self.length)
        self.pictures = passes * self.length
        self.shards = passes * -(-self.length // self.shard_size)
        digest = hashlib.sha256(f"{self.length} {self.shard_size} {passes} {seed}".encode())
        digest.update(identity.encode())
        for name in names or ():
            digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
        self.identity = digest.hexdigest()

    def read(self, shard: int) -> Iterator[Callable[[], Sample]]:
        """Yield functions that read the pictures of a shard, in order."""
        number, part = divmod(shard, self.shards // self.passes)
        indices = range(self.length)[part * self.shard_size : (part + 1) * self.shard_size]
        return (partial(self._load, number, index) for index in indices)

    def _load(self, number: int, index: int) -> Sample:
        key = f"{number}/{index}" if self.names is None else encodable(self.names[index])
        if not self.threads:
            seed_generators(self.seed, ITEM, number, index)
        try:
            item = self.dataset[index]
        except ValueError as error:
            return Sample(key, None, {}, str(error))
        labels = labels_of(item) if self.names is None else _without_paths(labels_of(item))
        if self.names is None:
            if taken := {"image_number", "pass_number"} & labels.keys():
                raise ValueError(f"a token cache has its own {min(taken)}: rename the data set's")
            labels |= {"image_number": index, "pass_number": number}
        if self.image_key not in item:
            raise DataError(f"the items have no {self.image_key!r}, only {', '.join(item)}")
        return Sample(key, item[self.image_key], labels)


def _without_paths(labels: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in labels.items() if name != "file_path_"}
