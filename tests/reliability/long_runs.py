"""Train a very small model for many steps and watch memory, open files and the time of a step.

    python -m tests.reliability.long_runs --n 20000

Exit 1 if one of them grows between the first tenth of the run and its end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from tests.reliability.kills import end, start, write_config

HERE = "tests.reliability.long_runs"


class Point(NamedTuple):
    """What the process uses after some steps; times are of its own computing, in milliseconds."""

    step: int
    resident_mb: float
    open_files: int
    threads: int
    step_ms: float

    @classmethod
    def now(cls, step: int, step_ms: float) -> Point:
        """Measure this process, on Linux."""
        status = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in status)
        resident = int(values["VmRSS"].split()[0]) / 1024
        return cls(
            step, resident, len(os.listdir("/proc/self/fd")), int(values["Threads"]), step_ms
        )


class Measure(pl.Callback):
    """Append a `Point` to ``points.txt`` every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.begun = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        duration = time.process_time() - self.begun
        point = Point.now(trainer.global_step, duration / self.every * 1000)
        with Path("points.txt").open("a") as file:
            file.write(" ".join(map(str, point)) + "\n")
        self.begun = time.process_time()


def read(file: Path) -> list[Point]:
    """Read the points of a run."""
    lines = (line.split() for line in file.read_text().splitlines())
    return [Point(int(s), float(m), int(f), int(t), float(ms)) for s, m, f, t, ms in lines]


def growth(points: list[Point]) -> list[str]:
    """Name what grew from the second point, after everything has been used once, to the end."""
    first, last = points[1], points[-1]
    found = []
    if last.resident_mb > first.resident_mb * 1.05:
        found.append(f"memory grew from {first.resident_mb:.0f} to {last.resident_mb:.0f} MB")
    if last.open_files > first.open_files:
        found.append(f"{last.open_files - first.open_files} more files are open")
    if last.threads > first.threads:
        found.append(f"{last.threads - first.threads} more threads")
    if last.step_ms > first.step_ms * 1.5:
        found.append(f"a step takes {last.step_ms:.1f} ms in place of {first.step_ms:.1f}")
    return found


def main() -> None:
    """Print a table of points, and what grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000, help="steps, at least 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, length = Path(name), max(options.n // 10, 4)  # 20 epochs
        config = write_config(folder / "run.yaml", "tokenizer", length=length, steps_between=500)
        measure = f"lightning.callbacks.measure={{target: {HERE}.Measure, params: "
        measure += f"{{every: {options.n // 20}}}}}"
        limits = ["--max_epochs", -1, "--max_steps", options.n, "--log_every_n_steps", 50]
        workers = f"data.params.num_workers={options.workers}"
        end(folder, start(folder, "-b", config, "-s", options.seed, *limits, measure, workers))
        points, files = read(folder / "points.txt"), list(folder.rglob("*"))
    sys.stdout.write("  step  memory MB  open files  threads  CPU ms per step\n")
    for point in points:
        step, memory, opened, threads, duration = point
        sys.stdout.write(f"{step:6} {memory:10.1f} {opened:11} {threads:8} {duration:16.2f}\n")
    found = growth(points)
    sys.stdout.write(f"{len(files)} files on disk; {', '.join(found) or 'nothing grew'}\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
