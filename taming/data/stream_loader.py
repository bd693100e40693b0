"""Batches of a stream, which is data that can only be iterated.

Axis letter: B items of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import IterableDataset, get_worker_info

from taming.data.loader import ITEM, Loader, as_mapping, is_stream, length_of, seed_generators
from taming.data.utils import custom_collate
from taming.util import DataError


class StreamLoader(Loader):
    """Batches of one process's share of a stream, which is data that can only be iterated.

    It keeps its order, and one loader process at most reads it. A position within an epoch is
    reached by reading again what comes before, unless the stream has ``state_dict`` and
    ``load_state_dict``. ``set_epoch(epoch)`` is called if it is there. Several processes take every
    n-th item; up to n - 1 items at the end are left out, so that all have equally many.

    If the stream's attribute ``is_sharded`` is true, it divides itself: every loader process of
    every process takes all that it gets. Then their numbers must stay the same. In place of
    ``set_epoch``, ``begin(seed, epoch, lane, lanes)`` is called if it is there: with the number of
    this loader process among all those of all processes, and no seed where order is kept.
    """

    _saved: dict[str, Any] | None = None  # what to continue from

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.is_sharded = bool(getattr(self.data, "is_sharded", False))
        self._reached: dict[tuple[int, int], dict[str, Any]] = {}
        if not self.is_sharded:
            self.num_workers = min(self.num_workers, 1)
        elif self.share[1] > 1 and length_of(dataset) is None and hasattr(dataset, "begin"):
            raise DataError(
                f"the stream {type(dataset).__name__} needs a length (data.params.train.params."
                "length=...), since the parts of several training processes may differ in theirs"
            )

    @property
    def workers(self) -> int:
        """Number of processes that read for this one, itself included if it does."""
        return max(self.num_workers, 1)

    def __len__(self) -> int:
        length = length_of(self.data)
        if length is None:
            raise TypeError("the stream has no length")
        _, processes = self.share
        if self.is_sharded:
            return self.workers * -(-(length // (processes * self.workers)) // self.batch_size)
        whole, rest = divmod(length, processes * self.batch_size)
        return whole + (rest >= processes)

    def __iter__(self) -> Iterator[Any]:
        position, saved, self._saved = self._begin(), self._saved, None
        if position is None:
            return
        epoch, done = position
        saved = saved if done else None
        reached = saved or {"states": {}, "next": 0, "workers": self.workers}
        read = self._read(_StreamBatches(self, epoch, reached), batch_size=None, collate_fn=_same)
        count = done if saved else 0
        for batch, number, state in read:
            before, count = reached, count + 1
            states = {**before["states"], number: state}
            reached = {**before, "states": states, "next": (number + 1) % self.workers}
            # Lightning may have fetched one batch ahead of the one that it trains on.
            self._reached = {(epoch, count - 1): before, (epoch, count): reached}
            if count > done:
                yield batch
        if not count:
            raise DataError(f"the stream {type(self.data).__name__} gave no item")

    def state_dict(self) -> dict[str, Any]:
        """Return the states of a stream at the present position, if it has states."""
        own = self._reached.get((self.position and self.position()) or (0, 0))
        if not hasattr(self.data, "state_dict") or (own is None and not self.is_sharded):
            return {}
        states = [own]
        if (
            self.is_sharded
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            states *= self.share[1]
            torch.distributed.all_gather_object(states, own)
        return {} if None in states else {"streams": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a stream's states in the next iteration.

        Raises:
            DataError: The stream divides itself among another number of processes.
        """
        states = state_dict.get("streams")
        if not states:
            return
        numbers = (len(states), states[0]["workers"])
        if self.is_sharded and numbers != (self.share[1], self.workers):
            raise DataError(
                f"the stream {type(self.data).__name__} was divided among {numbers[0]} processes "
                f"with {numbers[1]} loader processes each (num_workers): resume with as many, not "
                f"{self.share[1]} with {self.workers}"
            )
        self._saved = states[self.share[0] if self.is_sharded else 0]


def _same(batch: Any) -> Any:
    return batch


class _StreamBatches(IterableDataset[Any]):
    """Batches of one process of a stream, with the number of the loader process that read them.

    Each comes with the number of items before the next, and the stream's state, if it has one.

    Args:
        loader: The loader.
        epoch: Number of the epoch.
        reached: Where to begin: states by loader process, and the one that comes next.
    """

    def __init__(self, loader: StreamLoader, epoch: int, reached: Mapping[str, Any]) -> None:
        self.stream, self.batch_size, self.seed = loader.data, loader.batch_size, loader.seed
        self.share, self.epoch, self.reached = loader.share, epoch, reached
        self.is_sharded, self.shuffle = loader.is_sharded, loader.shuffle

    def __iter__(self) -> Iterator[tuple[Any, int, Any]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        number = (number + self.reached["next"]) % workers  # torch begins with its first
        (rank, processes), lane = self.share, 0
        lanes = processes * workers
        if self.is_sharded:  # all that comes is this loader process's
            rank, processes, lane = 0, 1, rank * workers + number
        index, state = self.reached["states"].get(number) or (0, None)
        self._prepare(lane, lanes, state)
        items = iter(self.stream)
        while True:
            # All processes read the same items, so that they are equally far.
            with isolate_rng(include_cuda=False):
                group = list(self._items(items, index, lane, processes * self.batch_size))
            share = group[: len(group) // processes * processes][rank::processes]
            if not share:
                return
            index += len(group)
            has_state = hasattr(self.stream, "state_dict")
            state = (index, self.stream.state_dict()) if has_state else None
            yield custom_collate(share), number, state

    def _prepare(self, lane: int, lanes: int, state: Any) -> None:
        if hasattr(self.stream, "begin"):
            self.stream.begin(self.seed if self.shuffle else None, self.epoch, lane, lanes)
        elif hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(self.epoch)
        if state is not None:
            self.stream.load_state_dict(state)

    def _items(self, items: Iterator[Any], index: int, lane: int, number: int) -> Iterator[Any]:
        for i in range(index, index + number):
            seed_generators(self.seed, ITEM, self.epoch, i, lane)
            try:
                yield as_mapping(next(items))
            except StopIteration:
                return


def make_loader(dataset: Any, *args: Any, **kwargs: Any) -> Loader:
    """Return the loader for a data set with indices or for a stream; arguments as for `Loader`."""
    return (StreamLoader if is_stream(dataset) else Loader)(dataset, *args, **kwargs)
