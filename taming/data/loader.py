"""Batches of a data set that follow from a seed alone, so that any of them can be read again.

The order of an epoch follows from (seed, epoch), and the random numbers that item i draws from
(seed, epoch, i). The number of loader processes and what was read before make no difference.

Axis letters: B items of a batch, N items of a data set.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from taming.data.utils import custom_collate
from taming.util import DataError

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


def as_mapping(item: Any) -> Any:
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
        return as_mapping(self.dataset[index])


class Loader:
    """Batches of one process's share of a data set with indices.

    Each iteration starts at the position that training has reached. Several processes take every
    n-th item of the same order; so that all have equally many, some get one of the first again.

    A data set's attribute ``buckets``, numbers (N,) int64, names the items that may share a batch:
    those of one number. Then the order of an epoch is one of batches.

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
        lengths = [len(self.data)] if self._buckets is None else self._buckets.bincount().tolist()
        return sum(-(-length // (processes * self.batch_size)) for length in lengths)

    @cached_property
    def _buckets(self) -> Tensor | None:
        buckets = getattr(self.data, "buckets", None)
        return None if buckets is None else torch.as_tensor(buckets)

    def __iter__(self) -> Iterator[Any]:
        # A generator: it begins with the first batch, after Lightning has restored its counters.
        position = self._begin()
        if position is None:
            return
        epoch, done = position
        batches = (batch.tolist() for batch in self._batches(epoch)[done:])
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

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Return the indices of this process's batches of an epoch, each in one bucket."""
        rank, processes = self.share
        order = torch.arange(len(self.data))
        generator = torch.Generator().manual_seed(int(random_words(self.seed, ORDER, epoch)[0]))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator)
        groups = [order]
        if self._buckets is not None:
            bucket = self._buckets[order]
            by_bucket = bucket.argsort(stable=True)
            groups = order[by_bucket].split(bucket.bincount().tolist())
        batches: list[Tensor] = []
        for group in groups:
            length = len(group)
            filled = torch.arange(-(-length // processes) * processes) % max(length, 1)
            batches += group[filled][rank::processes].split(self.batch_size) if length else ()
        if self.shuffle and len(groups) > 1:  # alike in all processes, which have as many
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return batches

    def _read(self, dataset: Dataset[Any], **options: Any) -> Iterator[Any]:
        # Its own generator: torch would draw from the global one for each iteration.
        options |= {"pin_memory": torch.cuda.is_available(), "generator": torch.Generator()}
        options |= {"worker_init_fn": _start_worker}
        return iter(DataLoader(dataset, num_workers=self.num_workers, **options))


def _start_worker(number: int) -> None:
    """Let a loader process serve on after a signal to a whole group of processes.

    Its parent ends after the batch, and then ends it, or goes on. Threads that began before, such
    as those of imports in a process that was not forked, do not block the signals.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_obey_parent, daemon=True).start()
    gc.freeze()  # the collector would otherwise copy pages of modules that processes share


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
