"""Kill trainings with SIGKILL at random moments, resume them, and compare with one never killed.

    python -m tests.reliability.kills --n 20

Every value must be the same, bit for bit: weights, codebooks, averages, thresholds, optimizers,
schedules, all that was logged, and the order of the images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

import main as program
from taming.run.position import settle
from taming.util import NonFiniteError

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.reliability.kills"
KINDS = ("tokenizer", "prior", "cache", "processes")


class Noise(Dataset[dict[str, Any]]):
    """Items that differ by their number and by what each of the three generators gives."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = torch.rand(16, 16, 3) + np.random.rand() + random.random() + index / self.length
        return {"image": (drawn / 2 - 1).numpy(), "number": index}


class Lines(Logger):
    """Append each value that a process logs to ``lines<rank>.json``, at once."""

    name, version = "lines", ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        append(
            Path(f"lines{rank_zero_only.rank}.json"),
            {f"{name} at {step}": value for name, value in metrics.items()},
        )

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Ignore them."""


class Watch(pl.Callback):
    """Append each batch's items to ``items<rank>.json``, and raise at a place.

    Args:
        place: Hook, epoch and batch at which to raise an error that leaves all files as they are.
    """

    def __init__(self, place: Sequence[Any] = ()) -> None:
        self.place = list(place)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        file = Path(f"items{trainer.global_rank}.json")
        append(file, {f"epoch {trainer.current_epoch} batch {i}": batch_items(batch)})
        self._stop("on_train_batch_end", trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop("on_train_batch_start", trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop("on_validation_batch_end", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop("on_train_epoch_end", trainer)

    def _stop(self, hook: str, trainer: pl.Trainer) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if [hook, trainer.current_epoch, done] == self.place and not trainer.sanity_checking:
            raise NonFiniteError("stopped")


def batch_items(batch: Any) -> list[Any]:
    """Return numbers by which to recognize the items of a batch."""
    return batch["number"].tolist() if "number" in batch else batch["tokens"].sum(1).tolist()


def append(file: Path, values: Mapping[str, Any]) -> None:
    """Append a line, whole."""
    with file.open("a") as lines:
        lines.write(json.dumps(values) + "\n")


def read(folder: Path, pattern: str) -> Iterator[tuple[str, Any]]:
    """Read the values of all starts of a run."""
    for file in sorted(folder.glob(pattern)):
        for line in file.read_text().splitlines():
            for name, value in json.loads(line).items():
                yield f"{file.stem}: {name}", value


def tokenizer_block() -> dict[str, Any]:
    """A loopy GAN with averages, a steered threshold, random rates and dropout."""
    loop = {"max_loops": 3, "ema_decay": 0.9, "target_length": 1.7, "length_range": [1.0, 2.5]}
    loop |= {"start_batches": 2, "revive_below": 0.5}
    sizes = {"z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8}
    more = {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "num_groups": 4}
    gan = {"disc_start": 2, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1}
    params = {
        "n_embed": 16,
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {"double_z": False, "dropout": 0.2, **sizes, **more},
        "quantizer_config": _block("taming.modules.vqvae.quantize.LoopyVectorQuantizer", **loop),
        "lossconfig": _block("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", **gan),
        "scheduler_config": _schedule(),
    }
    return _block("taming.models.vqgan.VQModel", **params) | {"base_learning_rate": 1e-3}


def prior_block(tokenizer: Path) -> dict[str, Any]:
    """A prior with dropout and replaced tokens."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    gpt = _block("taming.modules.transformer.mingpt.GPT", **sizes)
    params = {
        "cond_stage_config": "__is_unconditional__",
        "pkeep": 0.8,
        "first_stage_config": _block("taming.run.folder.model_from_run", run=str(tokenizer)),
        "transformer_config": gpt,
        "scheduler_config": _schedule(),
    }
    model = _block("taming.models.cond_transformer.Net2NetTransformer", **params)
    return model | {"base_learning_rate": 1e-3}


def _block(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params}


def _schedule() -> dict[str, Any]:
    rates = {"lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.1}
    name = "taming.lr_scheduler.LambdaWarmUpCosineScheduler"
    return _block(name, warm_up_steps=5, max_decay_steps=60, **rates)


def write_config(
    file: Path,
    kind: str,
    tokenizer: Path | None = None,
    *,
    length: int = 22,
    steps_between: int = 3,
    place: Sequence[Any] = (),
    **trainer: Any,
) -> Path:
    """Write the configuration of a kind of training.

    Args:
        file: The YAML file.
        kind: One of `KINDS`.
        tokenizer: Run of the tokenizer of a prior; ``cache`` is beside its ``logs``.
        length: Number of training images.
        steps_between: Steps between checkpoints.
        place: Where `Watch` stops.
        **trainer: Arguments of the Trainer.
    """
    lengths = {"train": length, "validation": 6}
    sets = {name: _block(f"{HERE}.Noise", length=n) for name, n in lengths.items()}
    if kind == "cache":
        assert tokenizer is not None
        caches = tokenizer.parents[1] / "cache"
        sets = {s: _block("taming.data.tokens.TokenCache", path=str(caches / s)) for s in sets}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    devices = {"devices": 2, "strategy": "ddp"} if kind == "processes" else {"devices": 1}
    callbacks = {
        "watch": _block(f"{HERE}.Watch", place=list(place)),
        "last_checkpoint": {"params": {"every_n_train_steps": steps_between}},
        "image_logger": {"params": {"max_images": 0 if tokenizer else 1}},  # sampling is slow
    }
    config = {
        "model": prior_block(tokenizer) if tokenizer else tokenizer_block(),
        "data": _block("main.DataModuleFromConfig", batch_size=2, num_workers=0, **sets),
        "lightning": {
            "trainer": {"accelerator": "cpu", "max_epochs": 4, **devices, **quiet, **trainer},
            "logger": {"target": f"{HERE}.Lines"},
            "callbacks": callbacks,
        },
    }
    file.write_text(yaml.safe_dump(config))
    return file


def differences(whole: Path, folder: Path) -> list[str]:
    """Name all that differs between a run that was never stopped and one that was, by folder."""
    found = []
    for pattern in ("lines*.json", "items*.json"):
        expected, seen = dict(read(whole, pattern)), set()
        for name, value in read(folder, pattern):
            seen.add(name)
            if name not in expected or not _same(expected[name], value):
                found.append(f"{name}: {value}, not {expected.get(name)}")
        found += [f"{name} is missing" for name in expected.keys() - seen]
    files = [next(f.glob("logs/*/checkpoints/last.ckpt")) for f in (whole, folder)]
    states = [torch.load(file, weights_only=True) for file in files]
    for state in states:
        settle(state["loops"]["fit_loop"])
        state["loops"] = state["loops"]["fit_loop"]
        state["callbacks"] = {k: v for k, v in state["callbacks"].items() if "dirpath" not in v}
    return found + list(_unequal("", *states))


def _same(first: Any, second: Any) -> bool:
    return first == second or (first != first and second != second)  # NaN


def _unequal(name: str, first: Any, second: Any) -> Iterator[str]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in first.keys() | second.keys():
            yield from _unequal(f"{name}/{key}", first.get(key), second.get(key))
    elif isinstance(first, list | tuple) and len(first) == len(second):
        for i, pair in enumerate(zip(first, second, strict=True)):
            yield from _unequal(f"{name}/{i}", *pair)
    elif isinstance(first, Tensor):
        if not torch.equal(first, second):
            yield f"{name} differs"
    elif not _same(first, second):
        yield f"{name}: {second}, not {first}"


def start(folder: Path, *argv: Any) -> Any:
    """Start the program in a session of its own: by a fork, which need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, argv))
    process.start()
    return process


def _run(folder: Path, argv: Sequence[Any]) -> None:
    os.setsid()
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    arguments = ["-t", "--no-test", *map(str, argv)]
    # From these, Lightning starts the second of two processes.
    sys.argv, sys.modules["__main__"].__spec__ = [str(ROOT / "main.py"), *arguments], None
    os.environ["PYTHONPATH"] = str(ROOT)
    program.main(arguments)


def wait_for_checkpoint(folder: Path, process: Any) -> float:
    """Wait until a training has saved its first checkpoint; returns the time."""
    while process.is_alive() and not list(folder.glob("logs/*/checkpoints/last.ckpt")):
        time.sleep(0.002)
    return time.monotonic()


def end(folder: Path, process: Any) -> Path:
    """Wait until a training ends well; returns its run."""
    process.join()
    if process.exitcode != 0:
        raise RuntimeError((folder / "log").read_text()[-2000:])
    (run,) = (folder / "logs").iterdir()
    return run


def kill(folder: Path, config: Path, delay: float, workers: int) -> bool:
    """Start a training, kill it a time after its first checkpoint, and resume it to the end.

    Returns:
        True if it was killed before its end.
    """
    process = start(folder, "-b", config)
    wait_for_checkpoint(folder, process)
    time.sleep(delay)
    was_running = process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    (run,) = (folder / "logs").iterdir()
    end(folder, start(folder, "-r", run, f"data.params.num_workers={workers}"))
    return was_running


def make_tokenizer(folder: Path) -> Path:
    """Train the tokenizer of the priors, and encode their cache; returns the run."""
    folder.mkdir()
    config = write_config(folder / "tokenizer.yaml", "tokenizer", max_epochs=1)
    run = end(folder, start(folder, "-b", config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "scripts/encode.py"), "-r", str(run)]
    script += ["-o", str(folder / "cache"), "data.params.num_workers=0"]
    subprocess.run(script, check=True, env=environment, cwd=folder, capture_output=True)
    return run


def main() -> None:
    """Print how many of the runs that were killed ended as if they had not been."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    chance, folder, lost = random.Random(options.seed), Path(tempfile.mkdtemp()), 0
    tokenizer = make_tokenizer(folder / "tokenizer_of_priors")
    sys.stdout.write(f"{'kind':12} kills identical\n")
    for kind in options.kinds:
        stages = tokenizer if kind in ("prior", "cache") else None
        config, whole = write_config(folder / f"{kind}.yaml", kind, stages), folder / kind
        whole.mkdir()
        process = start(whole, "-b", config)
        begun = wait_for_checkpoint(whole, process)
        end(whole, process)
        duration, kills, identical = time.monotonic() - begun, 0, 0
        while kills < options.n:
            attempt = folder / f"{kind}{kills}"
            attempt.mkdir()
            workers, delay = chance.choice((0, 1, 2)), chance.uniform(0, duration)
            if kill(attempt, config, delay, workers):
                kills += 1
                found = differences(whole, attempt)
                identical += not found
                sys.stderr.writelines(f"  {attempt}: {line}\n" for line in found[:5])
                if found:
                    continue
            shutil.rmtree(attempt)
        sys.stdout.write(f"{kind:12} {kills:5} {identical:9}\n")
        sys.stdout.flush()
        lost += kills - identical
    if not lost:
        shutil.rmtree(folder)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
