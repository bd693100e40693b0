"""Resume a run on disks that are full after so many bytes of a file, and count what is lost.

python -m tests.reliability.faults

The limit on the size of a file (RLIMIT_FSIZE) makes every longer write fail: of checkpoints,
tables, pictures, TensorBoard files and configurations. The resumed run must finish, or end in one
line; the checkpoint from before or a later one must load; no half file may be left.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
import yaml
from PIL import Image

from taming.checkpoint import load_checkpoint

sys.path.append(str(Path(__file__).parents[1]))  # as pytest does
runs = importlib.import_module("support.runs")

LIMITS = [0, 100, 200, 400, 700, 1_000, 1_500, 2_000, 5_000, 50_000, 200_000, 10_000_000]


def resume(run: Path, limit: int) -> tuple[int, str]:
    """Resume a run for four more steps in a child with a limit: exit status, and stderr."""
    reader, writer = os.pipe()  # to which the limit does not apply
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.dup2(writer, 2)
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            runs.run_main(run.parents[1], "-r", run, "-t", "--max_steps", "6")
            status = 0
        except SystemExit as exit:
            status = int(exit.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def losses(run: Path, status: int, said: str, step: int) -> list[str]:
    """List what was lost: files that cannot be read, half files, an end of many lines."""
    wrong = []
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    is_named = all(str(run) in line for line in errors)
    if (status, len(errors)) not in ((0, 0), (2, 1)) or not is_named or "Traceback" in said:
        wrong.append(f"ended with status {status}: {said[-1500:]}")
    readers = {".ckpt": load_checkpoint, ".csv": read_table, ".yaml": read_yaml, ".png": show}
    for file in filter(Path.is_file, run.rglob("*")):
        try:
            found = readers[file.suffix](file) if file.suffix in readers else None
            if file.name == "last.ckpt" and found["global_step"] < step:
                wrong.append(f"{file} is of step {found['global_step']}")
        except Exception as error:
            wrong.append(f"{file}: {error}")
        if file.name.endswith(".part"):
            wrong.append(f"{file} was left")
    return wrong


def read_yaml(file: Path) -> None:
    if not isinstance(yaml.safe_load(file.read_text()), dict):
        raise ValueError("half a configuration")


def read_table(file: Path) -> None:
    with open(file, newline="") as opened:
        if len({len(row) for row in csv.reader(opened)}) != 1:
            raise ValueError("half a row")


def show(file: Path) -> None:
    Image.open(file).load()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="custom_vqgan.yaml")
    parser.add_argument("--n", type=int, default=len(LIMITS), help="number of limits, from none up")
    options = parser.parse_args()
    counts: Counter[str] = Counter(finished=0, ended=0, lost=0)
    with tempfile.TemporaryDirectory() as folder:
        whole = runs.TinyRuns(Path(folder)).of(options.config)
        os.environ["TAMING_DATA"] = str(Path(folder) / "data")
        for limit in LIMITS[: options.n]:
            run = Path(folder) / f"{limit}/logs" / whole.name
            shutil.copytree(whole, run)
            status, said = resume(run, limit)
            wrong = losses(run, status, said, step=2)
            counts["lost" if wrong else "ended" if status else "finished"] += 1
            lines = [line for line in said.splitlines() if line.startswith("error:")]
            sys.stdout.write(f"{limit:>10} bytes: status {status} {' '.join(lines)[:150]}\n")
            sys.stdout.write("".join(f"  LOST {what}\n" for what in wrong))
            sys.stdout.flush()
    sys.stdout.write(", ".join(f"{number} {what}" for what, number in counts.items()) + "\n")
    sys.exit(1 if counts["lost"] else 0)


if __name__ == "__main__":
    main()
