"""Time programs from the command to their end, over the import of torch.

python -m benchmarks.start

Each program is a process of its own with one thread; all take turns. The run that is reconstructed
from has the tokenizer of ``make demo`` after one step of training.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from skimage.data import astronaut

from benchmarks.timing import save, summary, table
from benchmarks.workers import ROOT
from taming.run.cli import run, script_parser

logger = logging.getLogger("taming.benchmark")

LIMIT = "import torch"
TRAIN = (
    *(ROOT / "main.py", "-b", ROOT / "configs/demo/loopy_vqgan.yaml", "-t", "--no_test"),
    *("--max_steps", 1, "--limit_val_batches", 0, "--num_sanity_val_steps", 0),
    "model.params.quantize_start=0",
)


def seconds_of(words: Sequence[object], folder: Path) -> tuple[float, float]:
    """Run Python with arguments in a folder; return wall and processor seconds.

    Raises:
        RuntimeError: It failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def main() -> None:
    """Log the table and save it."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.fromarray(astronaut()).resize((128, 128)).save(folder / "picture.png")
        seconds_of(TRAIN, folder)
        (trained,) = folder.glob("logs/*")
        programs = {
            LIMIT: ("-c", "import torch"),
            "import taming": ("-c", "import taming"),
            "main.py --help": (ROOT / "main.py", "--help"),
            "reconstruct.py --help": (ROOT / "scripts/reconstruct.py", "--help"),
            "reconstruct.py, 128 x 128 pixels": (
                *(ROOT / "scripts/reconstruct.py", "-r", trained, folder / "picture.png"),
            ),
            "main.py, one training step": TRAIN,
        }
        rounds: dict[str, list[tuple[float, float]]] = {program: [] for program in programs}
        for _ in range(repeats):
            for program, words in programs.items():
                rounds[program].append(seconds_of(words, folder))
    times = {program: summary(seconds) for program, seconds in rounds.items()}
    rows = [
        {
            "program": program,
            "wall, s": timing.wall,
            "processor, s": timing.cpu,
            f"over {LIMIT}": timing.cpu / times[LIMIT].cpu,
            "spread": timing.spread,
        }
        for program, timing in times.items()
    ]
    logger.info("Medians of %d runs in turn:\n%s", repeats, table(rows))
    logger.info("saved %s", save("start", rows))


if __name__ == "__main__":
    run(main)
