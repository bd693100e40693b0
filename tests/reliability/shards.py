"""Kill processes that encode pictures, and compare with a run that was never killed.

    python -m tests.reliability.shards --pictures 10000 --kills 20

Each time, some of the workers get SIGKILL at a random moment and are started again. At the end,
every key must be there once, and every byte be the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from taming.data.tokens import TokenCache
from taming.scale import encode_shards
from taming.util import instantiate_from_config

# A loopy tokenizer of few channels, at 2 x 2 pixels a site.
SIZES = {"z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8}
SIZES |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "num_groups": 4}
LOOP = {"max_loops": 3, "threshold": 0.1}
MODEL = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "n_embed": 16,
        "embed_dim": 4,
        "ddconfig": {"double_z": False, **SIZES},
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "quantizer_config": {
            "target": "taming.modules.vqvae.quantize.LoopyVectorQuantizer",
            "params": LOOP,
        },
    },
}


def save_tokenizer(run: Path) -> Path:
    """Save a run of a tokenizer with random weights."""
    torch.manual_seed(0)
    for part in ("configs", "checkpoints"):
        (run / part).mkdir(parents=True)
    (run / "configs/2026-01-01T00-00-00-project.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    weights = instantiate_from_config(MODEL).state_dict()
    torch.save({"state_dict": weights}, run / "checkpoints/last.ckpt")
    return run


def write_pictures(folder: Path, number: int) -> None:
    """Write small pictures of different sizes, and one file in a thousand that is none."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"{i % 10}/{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(4, 13, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        if i % 1000 == 7:
            path.write_bytes(b"no picture")


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _serve(rank: int, workers: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    os.environ |= dict(zip(names, map(str, (rank, workers, rank)), strict=True))
    encode_shards(*arguments, engine="torchrun", devices="cpu", **options)


@contextmanager
def _workers(number: int, *arguments: Any) -> Iterator[Any]:
    """Yield a function that starts a worker by its rank; end those that are left."""
    context, started = multiprocessing.get_context("fork"), []

    def start(rank: int) -> Any:
        process = context.Process(target=_serve, args=(rank, number, *arguments))
        with warnings.catch_warnings():  # about forks beside threads
            warnings.simplefilter("ignore")
            process.start()
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.join()


def survive(
    run: Path, data: Path, output: Path, kills: int, workers: int = 2, seed: int = 0, **options: Any
) -> int:
    """Encode with workers of which some are killed now and then; return the number of deaths."""
    rng, deaths = random.Random(seed), 0
    size = options["shard_size"]
    shards = -(-sum(len(files) for _, _, files in os.walk(data)) // size)
    moments = sorted(rng.uniform(0, shards - 1) for _ in range(kills))
    with _workers(workers, (run, str(data), output), options) as start:
        running = [start(rank) for rank in range(workers)]
        for moment in moments:
            while len(list(output.glob("*.arrow"))) < int(moment):
                assert any(process.is_alive() for process in running), "the workers ended"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02 * size))  # anywhere within a shard
            for rank in rng.sample(range(workers), rng.randint(1, workers)):
                running[rank].kill()
                running[rank].join()
                deaths += running[rank].exitcode != 0
                running[rank] = start(rank)
        for process in running:
            process.join()
            assert process.exitcode == 0
    return deaths


def differences(output: Path, whole: Path) -> list[str]:
    """Name what a cache has that differs from one of a run that was never killed."""
    one, other = contents(output), contents(whole)
    found = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    counts = Counter(item["key"] for item in TokenCache(str(output)))
    return found + [f"{key} {count} times" for key, count in counts.items() if count != 1]


def main() -> None:
    """Print what was killed, and whether anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        run, data = save_tokenizer(folder / "run"), folder / "pictures"
        write_pictures(data, options.pictures)
        report = encode_shards(run, str(data), folder / "whole", devices=["cpu"], shard_size=100)
        arguments = (run, data, folder / "killed", options.kills, options.workers, options.seed)
        deaths = survive(*arguments, shard_size=100)
        wrong = differences(folder / "killed", folder / "whole")
    sys.stdout.write(
        f"{report.pictures} pictures and {len(report.unreadable)} unreadable ones, {deaths} "
        f"workers killed at {options.kills} moments: {', '.join(wrong) or 'no difference'}\n"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
