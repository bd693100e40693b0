"""Mutated configurations: refused in one line that names the key, or trained for two steps.

python -m tests.reliability.configurations --n 600
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.runs import CONFIGS, TRAINER, TinyRuns, run_main  # noqa: E402

from taming.run.config import load_config  # noqa: E402

NAMES = [
    *("cifar10_loopy.yaml", "custom_loopy_vqgan.yaml", "custom_vqgan.yaml"),
    *("demo/loopy_vqgan.yaml", "imagenet_gumbel_vqgan.yaml", "vqvae2_cifar10.yaml"),
    *("cifar10_two_level_transformer.yaml", "custom_transformer.yaml", "loopy_transformer.yaml"),
    *("pixelcnn_cifar10.yaml", "vqvae2_top_prior.yaml", "imagenet_transformer.yaml"),
]
SECONDS = 60
BYTES = 16 << 30

Path_ = tuple[Any, ...]


class Mutant(NamedTuple):
    """Attributes: kind of mutation, key path, the words one of which an error must have, values."""

    kind: str
    path: Path_
    words: set[str]
    values: dict[str, Any]


def nodes(value: Any, path: Path_ = ()) -> list[Path_]:
    """List the paths of everything inside a value."""
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    return [p for key, item in pairs for p in ((*path, key), *nodes(item, (*path, key)))]


def at(value: Any, path: Path_) -> Any:
    """Return the value at a path."""
    for key in path:
        value = value[key]
    return value


def _wrong_type(old: Any, draw: random.Random) -> Any:
    others = ["big", 3, 2.5, True, [1, "a"], {"x": 1}]
    return draw.choice([other for other in others if type(other) is not type(old)])


def _out_of_range(old: Any, draw: random.Random) -> Any:
    return draw.choice([-2, 0, -0.5, 1.5])


REPLACED: dict[str, Callable[[Any, random.Random], Any]] = {
    "wrong type": _wrong_type,
    "out of range": _out_of_range,
    "null": lambda old, draw: None,
    "huge": lambda old, draw: draw.choice([10**6, 10**12, 10**30, 1e30]),
    "nan": lambda old, draw: draw.choice([float("nan"), float("inf"), float("-inf")]),
    "empty list": lambda old, draw: [],
    "nested text": lambda old, draw: {"a": {"b": "text"}},
}
KINDS = [*REPLACED, "deleted key", "misspelt key", "swapped block"]


def mutate(values: dict[str, Any], draw: random.Random) -> Mutant:
    """Return a copy of a configuration with one mistake."""
    values = deepcopy(values)
    kind = draw.choice(KINDS)
    paths = nodes(values)
    if kind == "out of range" or kind in ("huge", "nan"):  # of numbers
        paths = [p for p in paths if type(at(values, p)) in (int, float)]
    if kind == "swapped block":
        paths = [p for p in paths if isinstance(at(values, p), dict) and "target" in at(values, p)]
    if kind == "misspelt key":
        paths = [p for p in paths if isinstance(p[-1], str) and len(p[-1]) > 1]
    path = draw.choice(paths)
    parent, key = at(values, path[:-1]), path[-1]
    words = {word for k in path if isinstance(k, str) for word in (k, *k.split("_"))}
    words = words - {"params", "model", "data", "config"} or {str(key)}
    if kind in REPLACED:
        parent[key] = REPLACED[kind](parent[key], draw)
        if isinstance(parent[key], bool | str | float):  # where a text is taken, they are one
            words.add(str(parent[key]).lower())
    elif kind == "deleted key":
        del parent[key]
    elif kind == "misspelt key":
        place = draw.randrange(len(key) - 1)
        name = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
        name = name if name != key else f"{key}x"
        parent[name] = parent.pop(key)
        words.add(name)
    else:
        others = [p for p in paths if at(values, p) != parent[key]]
        parent[key] = deepcopy(at(values, draw.choice(others)))
        words |= {str(parent[key]["target"]).rpartition(".")[2]}
    return Mutant(kind, path, words, values)


def train(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Train a mutant for two steps in this process; return the outcome and what it printed.

    The outcome is "trained", "refused", or what is wrong.
    """
    file, output = folder / "mutant.yaml", io.StringIO()
    file.write_text(yaml.safe_dump(mutant.values))
    status: Any = 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            run_main(folder, "-b", file, "-t", "--no-test", "-n", "m", "--max_steps=2")
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            return "traceback", output.getvalue()
    text = output.getvalue()
    if status not in (0, None):
        error = text.rpartition("error: ")[2]
        if status != 2 or error.count("\n") != 1:
            return "several lines", text
        words = mutant.words
        if "the run's folder is" in text:  # parts that do not fit each other: any of their keys
            words = (
                words | {"pixels"} | {k for p in nodes(mutant.values) for k in p if len(str(k)) > 3}
            )
        named = any(re.search(rf"\b{re.escape(str(word))}", error) for word in words)
        return ("refused" if named else "key not named"), text
    last = [*folder.glob("logs/*_m/checkpoints/last.ckpt")]
    steps = torch.load(last[0], weights_only=True)["global_step"] if last else 0
    return ("trained" if steps == 2 else f"trained {steps} steps"), text


def train_apart(mutant: Mutant, folder: Path, seconds: int = SECONDS) -> tuple[str, str]:
    """Do the same in a child process, with a limit on time and memory."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        outcome, text = train(mutant, folder)
        with os.fdopen(write, "w") as pipe:
            pipe.write(f"{outcome}\n{text}")
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        outcome, _, text = pipe.read().partition("\n")
    _, status = os.waitpid(child, 0)
    return (outcome, text) if status == 0 else (f"ended by signal {status}", text)


def bases(runs: TinyRuns, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the tiny configurations of the recipes, tokenizers of priors trained."""
    found = {}
    for name in names:
        items = [*runs.overrides[name], *runs.stages(name)]
        items += [item for item in TRAINER if "=" in item]
        flags = [argument for argument in TRAINER if "=" not in argument]
        pairs = zip(flags[::2], flags[1::2], strict=True)
        items += [f"lightning.trainer.{flag[2:]}={value}" for flag, value in pairs]
        config = load_config([CONFIGS / name], items)
        values = {**config.values, "lightning": dict(config.values["lightning"])}
        values["lightning"]["trainer"] = {**values["lightning"]["trainer"], **config.trials}
        found[name] = values
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants to try again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        runs = TinyRuns(Path(name))
        os.environ["TAMING_DATA"] = str(runs.data)
        with redirect_stderr(io.StringIO()):
            configurations = bases(runs, NAMES)
        for number in options.only or range(options.n):
            draw = random.Random(options.seed * 1_000_000 + number)
            recipe = draw.choice(NAMES)
            mutant = mutate(configurations[recipe], draw)
            folder = Path(name) / f"mutant{number}"
            folder.mkdir()
            begun = time.monotonic()
            outcome, text = train_apart(mutant, folder)
            counts[f"{mutant.kind}: {outcome}"] += 1
            if outcome not in ("trained", "refused") or options.only:
                wrong += outcome not in ("trained", "refused")
                where = ".".join(map(str, mutant.path))
                took = time.monotonic() - begun
                try:
                    value = at(mutant.values, mutant.path)
                except LookupError:
                    value = "(gone)"
                head = f"{number} {recipe} {mutant.kind} {where}={value!r}: {outcome}, {took:.0f} s"
                lines = text.splitlines()[-(40 if options.only else 3) :]
                sys.stdout.write("\n    ".join([head, *lines]) + "\n")
                sys.stdout.flush()
    for outcome, count in sorted(counts.items()):
        sys.stdout.write(f"{count:5} {outcome}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
