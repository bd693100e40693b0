"""Check that published checkpoints of taming-transformers work from the command line, full size.

python tests/support/published.py
python tests/support/published.py --device cuda --only cin

Writes runs as the original left them, ``logs/<run>/{configs,checkpoints}``, with every key, shape
and type of the f16 ImageNet VQGAN and of the class-conditional ImageNet transformer (1.5 billion
parameters) and random weights, in files as Lightning 1 wrote them; then calls the scripts that a
user would. Takes 6.5 GB of disk, given back at the end, and 13 GB of memory. The exit status is 1
if anything fails. The tables of keys are expected where tests look for them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # in place of this file's own folder
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

from conftest import SHARED  # noqa: E402
from support.original import PUBLISHED, save_run  # noqa: E402

SIDE = 256  # pixels of the images


class Case(NamedTuple):
    """A checkpoint, and how a user tries it.

    Attributes:
        name: Of the run.
        keys: Entry in the table of keys.
        model: The ``model`` block of its configuration.
        command: Script and its arguments; RUN, IN and OUT stand for folders.
    """

    name: str
    keys: str
    model: Any
    command: str


def cases() -> list[Case]:
    """List the checkpoints; the tokenizer's configuration is the one that ships."""
    vqgan = OmegaConf.load(ROOT / "configs/imagenet_vqgan.yaml").model
    prior = "cin_transformer (published checkpoint)"
    cin = PUBLISHED[prior]
    sample = "sample_fast.py -r RUN -o OUT -n 1 --batch_size 1 --classes 207 -k 250 -p 0.92"
    return [
        Case("vqgan", "imagenet_vqgan.yaml", vqgan, "reconstruct.py -r RUN IN -o OUT"),
        Case("cin", prior, {"base_learning_rate": 4.5e-6, **cin}, sample),
    ]


def random_weights(table: dict[str, list[Any]]) -> dict[str, Tensor]:
    """Fill every key of a table of shapes and types; masks are what they must be."""
    weights = {}
    for key, (shape, dtype) in table.items():
        if key.endswith("attn.mask"):
            weights[key] = torch.ones(shape).tril()
        elif dtype == "float32":
            weights[key] = torch.randn(shape) * 0.02
        else:
            weights[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
    return weights


def call(command: str, device: str) -> tuple[int, float, float]:
    """Run a script; returns its exit status, seconds, and the most memory it took in GB."""
    script, *arguments = command.split()
    program = [sys.executable, str(ROOT / "scripts" / script), *arguments, "--device", device]
    start = time.monotonic()
    process = subprocess.Popen(program, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - start, usage.ru_maxrss / 1e6


def check(case: Case, table: dict[str, list[Any]], folder: Path, device: str) -> str:
    """Write a run, try it, and return a line that begins with the verdict."""
    run, source, out = folder / "logs" / case.name, folder / "in", folder / "out"
    save_run(run, {"model": case.model}, random_weights(table))
    size = (run / "checkpoints/last.ckpt").stat().st_size / 1e9
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "picture.png")
    command = case.command.replace("RUN", str(run)).replace("IN", str(source))
    status, seconds, memory = call(command.replace("OUT", str(out)), device)
    sizes = {path.name: Image.open(path).size for path in sorted(out.rglob("*.png"))}
    passed = status == 0 and (SIDE, SIDE) in sizes.values()
    return (
        f"{'pass' if passed else 'FAIL'}  {case.name}: {len(table)} keys, {size:.1f} GB; "
        f"{case.command}: exit {status}, {seconds:.0f} s, {memory:.1f} GB; wrote {sizes}"
    )


def main() -> None:
    """Try one checkpoint after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [case.name for case in cases()]
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    path = SHARED / "upstream/state_dict_keys.json"
    if not path.is_file():
        sys.exit(f"error: the original's tables of keys are not at {path}")
    tables = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for case in cases():
        if case.name in options.only:
            with tempfile.TemporaryDirectory() as folder:
                lines.append(check(case, tables[case.keys], Path(folder), options.device))
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(any(line.startswith("FAIL") for line in lines))


if __name__ == "__main__":
    main()
