"""Batches follow from the seed: any can be read again, by any number of loader processes."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from taming.data.loader import Loader, is_stream
from taming.data.stream_loader import StreamLoader, make_loader
from taming.util import DataError


class Draws:
    """Items that draw from all generators."""

    def __init__(self, length=7):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        drawn = [float(torch.rand(())), np.random.rand(), random.random()]
        return {"number": index, "drawn": np.array(drawn)}


class Stream(IterableDataset):
    """The same items, only by iteration."""

    def __init__(self, length=7):
        self.items = Draws(length)

    def __iter__(self):
        for index in range(self.items.length):
            yield self.items[index]


class Sized(Stream):
    def __len__(self):
        return self.items.length


class Tape(Stream):
    """A stream with a state."""

    def __init__(self, length=7):
        super().__init__(length)
        self.place, self.read = 0, []

    def __iter__(self):
        while self.place < self.items.length:
            self.read.append(self.place)
            self.place += 1
            yield self.items[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Shards(Stream):
    """A stream that divides itself among loader processes."""

    is_sharded = True

    def __iter__(self):
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(number, self.items.length, of):
            yield self.items[index]


class Tapes(Tape):
    """One that divides itself among readers."""

    is_sharded = True

    def __len__(self):
        return self.items.length

    def begin(self, seed, epoch, lane, lanes):
        self.place, self.lane, self.lanes = 0, lane, lanes

    def __iter__(self):
        for index in range(self.lane, self.items.length, self.lanes)[self.place :]:
            self.read.append(index)
            self.place += 1
            yield self.items[index]


def contents(loader):
    """Numbers and draws of every batch."""
    return [(batch["number"].tolist(), batch["drawn"].tolist()) for batch in loader]


def numbers(loader):
    return [batch["number"].tolist() for batch in loader]


@pytest.mark.parametrize("data", [Draws(), Stream()], ids=["indices", "stream"])
def test_neither_loader_processes_nor_earlier_draws_make_a_difference(data):
    expected = contents(make_loader(data, 2, seed=5, shuffle=True))
    torch.manual_seed(8)
    before = torch.get_rng_state()
    for workers in (0, 1, 2):
        torch.rand(3), np.random.rand(), random.random()
        assert contents(make_loader(data, 2, workers, seed=5, shuffle=True)) == expected
    torch.manual_seed(8)
    assert contents(make_loader(data, 2, seed=6, shuffle=True)) != expected
    assert torch.equal(torch.get_rng_state(), before)  # nor does reading draw


@pytest.mark.parametrize("kind", [Draws, Stream, Sized, Tape])
@pytest.mark.parametrize("workers", [0, 2])
def test_reading_starts_where_training_is(kind, workers):
    def loader(position):
        return make_loader(kind(), 2, workers, seed=1, shuffle=True, position=lambda: position[0])

    whole = contents(loader([(3, 0)]))
    assert whole != contents(loader([(2, 0)]))
    assert contents(loader([(3, 2)])) == whole[2:]
    assert contents(loader([None])) == []


def test_a_stream_continues_from_its_state():
    at = [(0, 0)]
    first = StreamLoader(Tape(), 2, seed=1, position=lambda: at[0])
    whole, batches = contents(StreamLoader(Tape(), 2, seed=1)), iter(first)
    next(batches), next(batches), next(batches)
    at[0] = (0, 2)  # the third was fetched ahead
    tape = Tape()
    second = StreamLoader(tape, 2, seed=1, position=lambda: at[0])
    second.load_state_dict(first.state_dict())
    assert contents(second) == whole[2:]
    assert tape.read == [4, 5, 6]
    (state,) = first.state_dict()["streams"]
    assert state == {"states": {0: (4, {"place": 4})}, "next": 0, "workers": 1}


@pytest.mark.parametrize("length", [1, 7, 8])
@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_an_order(length, shuffle):
    shares = [
        numbers(Loader(Draws(length), 2, seed=2, shuffle=shuffle, share=(rank, 3)))
        for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == len(Loader(Draws(length), 2, share=(0, 3)))
    whole = numbers(Loader(Draws(length), 6, seed=2, shuffle=shuffle))
    for batches, batch in zip(zip(*shares, strict=True), whole, strict=True):
        together = [n for step in zip(*batches, strict=True) for n in step]
        assert together[: len(batch)] == batch  # then come some of the first again


@pytest.mark.parametrize("kind", [Stream, Sized])
@pytest.mark.parametrize("length", [7, 8, 12])
def test_processes_share_a_stream(kind, length):
    loaders = [StreamLoader(kind(length), 2, 2, share=(rank, 3)) for rank in range(3)]
    shares = [numbers(loader) for loader in loaders]
    seen = sorted(n for share in shares for batch in share for n in batch)
    assert seen == list(range(length // 3 * 3))
    assert len({tuple(map(len, share)) for share in shares}) == 1
    if kind is Sized:
        assert len(loaders[0]) == len(shares[0])


def test_a_stream_that_divides_itself_is_read_by_all_loader_processes():
    assert numbers(StreamLoader(Shards(), 2, 2)) == [[0, 2], [1, 3], [4, 6], [5]]


@pytest.mark.parametrize("workers, done", [(0, 3), (1, 2), (2, 1), (2, 4)])
def test_a_stream_that_divides_itself_continues_from_the_states_of_all_readers(workers, done):
    at = [(2, 0)]

    def loader(data):
        return StreamLoader(data, 2, workers, seed=1, position=lambda: at[0])

    whole, first = contents(loader(Tapes(11))), loader(Tapes(11))
    batches = iter(first)
    for _ in range(done):
        next(batches)
    at[0] = (2, done)
    tape = Tapes(11)
    second = loader(tape)
    second.load_state_dict(first.state_dict())
    assert contents(second) == whole[done:]
    if not workers:
        assert tape.read[0] == 2 * done  # nothing again
    with pytest.raises(DataError, match=f"resume with as many, not 1 with {workers + 2}"):
        StreamLoader(tape, 2, workers + 2).load_state_dict(first.state_dict())


def _resume(rank, folder):
    """Read as one of two training processes, stop, and go on from the state of the first."""
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder / 'meeting'}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    at = [(0, 0)]

    def loader():
        return StreamLoader(Tapes(16), 2, seed=1, share=(rank, 2), position=lambda: at[0])

    whole, first = contents(loader()), loader()
    batches = iter(first)
    next(batches), next(batches)
    at[0] = (0, 2)
    saved = [first.state_dict()]
    torch.distributed.broadcast_object_list(saved)  # as of a checkpoint, which the first saves
    second = loader()
    second.load_state_dict(saved[0])
    assert contents(second) == whole[2:] and second.data.read[0] == rank + 8
    torch.distributed.destroy_process_group()


def test_each_of_several_processes_continues_from_its_own_state(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_resume, args=(rank, tmp_path)) for rank in range(2)]
    with warnings.catch_warnings():  # about forks beside threads
        warnings.simplefilter("ignore")
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_streams_are_recognized():
    assert not is_stream([1]) and is_stream(Stream()) and is_stream(iter([1]))
    with pytest.raises(TypeError):
        len(StreamLoader(Stream(), 2))
    with pytest.raises(DataError, match="Stream gave no item"):
        list(StreamLoader(Stream(0), 2))


def test_a_stream_is_told_the_epoch():
    stream = Stream()
    stream.set_epoch = lambda epoch: setattr(stream, "epoch", epoch)
    numbers(StreamLoader(stream, 2, position=lambda: (4, 0)))
    assert stream.epoch == 4


def test_pairs_become_mappings():
    pairs = [(np.full((4, 4, 3), i), i) for i in range(3)]
    for data in (pairs, iter(pairs)):
        (batch, _) = make_loader(data, 2)
        assert batch["image"].shape == (2, 4, 4, 3) and batch["class_label"].tolist() == [0, 1]
    with pytest.raises(DataError, match="PIL picture .*transform"):
        list(Loader([(Image.new("RGB", (4, 4)), 1)], 1))


class Slow(Dataset):
    """Numbers, each with its process, slow enough to be sent a signal before they are read."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.1)
        return {"number": np.int64(index), "process": np.int64(os.getpid())}


@pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="this system cannot wait for signals"
)
def test_only_its_parent_ends_a_loader_process():
    batches = Loader(Slow(), 1, num_workers=1)._read(Slow(), multiprocessing_context="fork")
    process = int(next(batches)["process"])
    for name in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(process)], check=True)  # another process
    assert [int(next(batches)["process"]) for _ in range(3)] == [process] * 3
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0
