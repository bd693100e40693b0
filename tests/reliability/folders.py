"""Data sets of a million pictures: seconds to start, and memory of the loader's processes.

python -m tests.reliability.folders --n 1000000 --files 50000

A list file names n pictures (of 1000 files), and a folder holds 50,000 empty files. Two loader
processes then read all paths in a random order; the memory that each does not share must stay.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from taming.data.custom import CustomTrain, ImageFolder

MOST_SECONDS, MOST_GROWTH = 30.0, 16.0  # MiB


def private_memory() -> float:
    """Return the memory in MiB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
    return kilobytes / 1024


class Probe(Dataset[Any]):
    """Reads texts, and measures the memory of the loader's process now and then.

    Args:
        texts: The texts.
        every: Number of items between two measurements.
    """

    def __init__(self, texts: Sequence[str], every: int) -> None:
        self.texts, self.every = texts, every
        self.read = 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[int, float]:
        """Read a text; return the number of the process, and its memory or -1."""
        len(self.texts[index * 611_953 % len(self.texts)])  # a prime: all of them, far apart
        self.read += 1
        info = get_worker_info()
        due = self.read % self.every == 1000
        return (info.id if info else 0), private_memory() if due else -1.0


def _freeze(worker: int) -> None:
    """Keep the garbage collector from copying some 80 MiB of imported modules, once."""
    gc.freeze()


def growth(texts: Sequence[str], workers: int) -> float:
    """Read all texts once in loader processes; return the largest growth of one in MiB."""
    probe = Probe(texts, max(len(texts) // workers // 8, 2000))
    loader = DataLoader(
        probe,
        batch_size=1000,
        num_workers=workers,
        multiprocessing_context="fork",
        worker_init_fn=_freeze,
    )
    seen: dict[int, list[float]] = {}
    for numbers, memories in loader:
        for number, memory in zip(numbers.tolist(), memories.tolist(), strict=True):
            if memory >= 0:
                seen.setdefault(number, []).append(memory)
    return max(memories[-1] - memories[0] for memories in seen.values())


def write_list(folder: Path, n: int) -> Path:
    """Write a list of n lines over 1000 files, with paths as long as usual."""
    files = [
        folder / "photos" / f"{i % 30:04}" / f"picture_of_something_{i:07}.jpg" for i in range(1000)
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    lines = "\n".join(map(str, files))
    (folder / "list.txt").write_text("\n".join([lines] * (n // 1000)) + "\n")
    return folder / "list.txt"


def main() -> None:
    """Build both data sets, read all paths, and print times and memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "walk")
        for i in range(options.files):
            if i % 500 == 0:
                (folder / f"{i // 500:03}").mkdir(parents=True)
            (folder / f"{i // 500:03}" / f"{i:06}.png").touch()
        builds = {
            f"list of {options.n}": lambda: CustomTrain(64, str(listed)),
            f"folder of {options.files}": lambda: ImageFolder(str(folder), 64, split="train"),
        }
        listed = write_list(Path(name), options.n)
        print(f"{'data set':22}{'start s':>9}{'own MiB':>9}{'growth of a worker MiB':>24}")  # noqa: T201
        for what, build in builds.items():
            before, start = private_memory(), time.perf_counter()
            data = build()
            seconds, own = time.perf_counter() - start, private_memory() - before
            grown = growth(data.labels["file_path_"], options.workers)
            failed |= seconds > MOST_SECONDS or grown > MOST_GROWTH
            print(f"{what:22}{seconds:9.1f}{own:9.1f}{grown:24.1f}")  # noqa: T201
        texts = list(CustomTrain(64, str(listed)).labels["file_path_"])
        print(f"{'the same as strings':22}{'':18}{growth(texts, options.workers):24.1f}")  # noqa: T201
    sys.exit(failed)


if __name__ == "__main__":
    main()
