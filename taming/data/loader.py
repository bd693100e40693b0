"""Batches of a data set that follow from a seed alone, so that any of them can be read again.

The order of an epoch follows from (seed, epoch), and the random numbers that item i draws from
(seed, epoch, i). The number of loader processes and what was read before make no difference.

Axis letter: B items of a batch.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from taming.data.utils import custom_collate
from taming.util import DataError, outlive_signals

# Uses of random numbers, which get different ones from the same seed.
ORDER, ITEM, EPOCH, TRAINING, VALIDATION = range(5)


def random_words(seed: int, *key: int) -> np.ndarray:
    """Return random numbers (4,) uint64 for a use, an epoch and so on of a seed."""
    return np.random.SeedSequence(seed, spawn_key=key).generate_state(4, np.uint64)


def seed_generators(seed: int, *key: int, devices: bool = False) -> None:
    """Seed the global generators of torch, NumPy and Python by `random_words`.

    Args:
        seed: Non-negative seed.
        *key: Use, epoch and so on.
        devices: Seed torch's generators of all devices, not only of the CPU.
    """
    _seed_by(random_words(seed, *key), devices)


def _seed_by(words: np.ndarray, devices: bool = False) -> None:
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    random.seed(int(words[3]))


def is_stream(dataset: Any) -> bool:
    """Return True for data that can only be iterated, such as torch's ``IterableDataset``."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def length_of(dataset: Any) -> int | None:
    """Return the number of items; None for a stream that has none."""
    with suppress(TypeError, NotImplementedError):
        return len(dataset)
    return None


def _as_mapping(item: Any) -> Any:
    """Name the parts of a pair (image, label), as torchvision's data sets give them."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        return item
    image, label = item
    if isinstance(image, Image.Image):
        raise DataError(
            "the data set gives pairs of a PIL picture and a label: give it a transform that makes "
            "arrays (H, W, C) float32 in [-1, 1] of the pictures"
        )
    return (
        {"image": image, "class_label": label} if isinstance(image, np.ndarray | Tensor) else item
    )


class _Items(Dataset[Any]):
    """Items of one epoch, each with random numbers of its own."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitems__(self, indices: list[int]) -> list[Any]:
        # First of all, since reading an item takes NumPy's code out of the processor's cache.
        words = [random_words(self.seed, ITEM, self.epoch, index) for index in indices]
        # A loader process has no other use of random numbers.
        with nullcontext() if get_worker_info() else isolate_rng(include_cuda=False):
            return [self._item(*item) for item in zip(indices, words, strict=True)]

    def _item(self, index: int, words: np.ndarray) -> Any:
        _seed_by(words)
        return _as_mapping(self.dataset[index])


class Loader:
    """Batches of one process's share of a data set with indices.

    Each iteration starts at the position that training has reached. Several processes take every
    n-th item of the same order; so that all have equally many, some get one of the first again.

    Args:
        dataset: Data set with indices. Items are mappings, or pairs (image, label), which become
            ``{"image": ..., "class_label": ...}``.
        batch_size: Items per batch and process.
        num_workers: Number of loader processes; 0 reads in this one.
        seed: Non-negative seed.
        shuffle: Use another order in each epoch.
        share: (number of this process, number of processes).
        position: Returns (epoch, number of its batches that are done), None after the last. By
            default, each iteration is an epoch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        num_workers: int = 0,
        *,
        seed: int = 0,
        shuffle: bool = False,
        share: tuple[int, int] = (0, 1),
        position: Callable[[], tuple[int, int] | None] | None = None,
    ) -> None:
        self.data, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.seed, self.shuffle, self.share, self.position = seed, shuffle, share, position
        self._iterations = 0

    def __len__(self) -> int:
        _, processes = self.share
        return -(-len(self.data) // (processes * self.batch_size))

    def __iter__(self) -> Iterator[Any]:
        # A generator: it begins with the first batch, after Lightning has restored its counters.
        position = self._begin()
        if position is None:
            return
        epoch, done = position
        order = self._order(epoch)[done * self.batch_size :]
        batches = (part.tolist() for part in order.split(self.batch_size) if len(part))
        items = _Items(self.data, self.seed, epoch)
        yield from self._read(items, batch_sampler=batches, collate_fn=custom_collate)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, since Lightning restores the position, by its own counters."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing; with this method, Lightning takes the loader for one that can resume."""

    def _begin(self) -> tuple[int, int] | None:
        """Return the position at which an iteration starts."""
        if self.position is not None:
            return self.position()
        self._iterations += self.shuffle
        return max(self._iterations - 1, 0), 0

    def _order(self, epoch: int) -> Tensor:
        """Return the indices of this process's items in an epoch."""
        (rank, processes), length = self.share, len(self.data)
        order = torch.arange(-(-length // processes) * processes) % length
        if self.shuffle:
            word = int(random_words(self.seed, ORDER, epoch)[0])
            generator = torch.Generator().manual_seed(word)
            order = torch.randperm(length, generator=generator)[order]
        return order[rank::processes]

    def _read(self, dataset: Dataset[Any], **options: Any) -> Iterator[Any]:
        # Its own generator: torch would draw from the global one for each iteration.
        options |= {"pin_memory": torch.cuda.is_available(), "generator": torch.Generator()}
        options |= {"worker_init_fn": _start_worker}
        return iter(DataLoader(dataset, num_workers=self.num_workers, **options))


def _start_worker(number: int) -> None:
    outlive_signals(number)
    gc.freeze()  # the collector would otherwise copy pages of modules that processes share


class StreamLoader(Loader):
    """Batches of one process's share of a stream, which is data that can only be iterated.

    It keeps its order, and one loader process at most reads it. A position within an epoch is
    reached by reading again what comes before, unless the stream has ``state_dict`` and
    ``load_state_dict``. ``set_epoch(epoch)`` is called if it is there. Several processes take every
    n-th item; up to n - 1 items at the end are left out, so that all have equally many.

    If the stream's attribute ``is_sharded`` is true, it divides itself: every loader process of
    every process takes all that it gets. Then their numbers must stay the same.
    """

    _state: Any = None  # to continue from

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: dict[tuple[int, int], Any] = {}
        if not getattr(self.data, "is_sharded", False):
            self.num_workers = min(self.num_workers, 1)

    def __len__(self) -> int:
        length = length_of(self.data)
        if length is None or getattr(self.data, "is_sharded", False):
            raise TypeError("the stream has no length")
        _, processes = self.share
        whole, rest = divmod(length, processes * self.batch_size)
        return whole + (rest >= processes)

    def __iter__(self) -> Iterator[Any]:
        position, state, self._state = self._begin(), self._state, None
        if position is None:
            return
        epoch, done = position
        start = done if state is not None else 0
        batches = _StreamBatches(self, epoch, start, state if done else None)
        read = self._read(batches, batch_size=None, collate_fn=_same)
        for batch, state in islice(read, done - start, None):
            before, done = (epoch, done), done + 1
            # Lightning may have fetched one batch ahead of the one that it trains on.
            self._states = {before: self._states.get(before), (epoch, done): state}
            yield batch
        if not done:
            raise DataError(f"the stream {type(self.data).__name__} gave no item")

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state at the present position, if it has one."""
        state = self._states.get((self.position and self.position()) or (0, 0))
        return {} if state is None else {"stream": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a stream's state in the next iteration."""
        self._state = state_dict.get("stream")


def _same(batch: Any) -> Any:
    return batch


class _StreamBatches(IterableDataset[Any]):
    """Batches of one process of a stream, each with the stream's state after it.

    Args:
        loader: The loader.
        epoch: Number of the epoch.
        start: Number of batches before the state.
        state: State of the stream to start from, None for its beginning.
    """

    def __init__(self, loader: StreamLoader, epoch: int, start: int, state: Any) -> None:
        self.stream, self.batch_size, self.seed = loader.data, loader.batch_size, loader.seed
        self.share, self.epoch, self.start, self.state = loader.share, epoch, start, state

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        rank, processes = self.share
        lane, worker = 0, get_worker_info()
        if getattr(self.stream, "is_sharded", False):  # all that comes is this loader process's
            workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
            rank, processes, lane = 0, 1, rank * workers + number
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(self.epoch)
        if self.state is not None:
            self.stream.load_state_dict(self.state)
        items, index = iter(self.stream), self.start * processes * self.batch_size
        while True:
            # All processes read the same items, so that they are equally far.
            with isolate_rng(include_cuda=False):
                group = list(self._items(items, index, lane, processes * self.batch_size))
            share = group[: len(group) // processes * processes][rank::processes]
            if not share:
                return
            index += len(group)
            has_state = hasattr(self.stream, "state_dict") and not lane
            yield custom_collate(share), self.stream.state_dict() if has_state else None

    def _items(self, items: Iterator[Any], index: int, lane: int, number: int) -> Iterator[Any]:
        for i in range(index, index + number):
            seed_generators(self.seed, ITEM, self.epoch, i, lane)
            try:
                yield _as_mapping(next(items))
            except StopIteration:
                return


def make_loader(dataset: Any, *args: Any, **kwargs: Any) -> Loader:
    """Return the loader for a data set with indices or for a stream; arguments as for `Loader`."""
    return (StreamLoader if is_stream(dataset) else Loader)(dataset, *args, **kwargs)
