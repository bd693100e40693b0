"""Memory of large codebooks and of a large picture, and the speed of checking large files.

    python -m tests.reliability.large

Exit 1 if a picture of 24 megapixels takes 4 GB, with torch and a small model; or if a training step
holds more than `MOST` bytes beside four times the codebook (gradient, and sums and counts of its
start), which it would if it held the scores of all latents and codes.

Axis letters: N latents, D channels, K codes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.growth import SMALL
from taming.checkpoint import load_checkpoint
from taming.data.token_files import check_table, crc32_of
from taming.models.vqgan import VQModel
from taming.modules.vqvae.build import build_quantizer
from taming.tokenizer import Tokenizer

QUANTIZERS: dict[str, dict[str, Any]] = {
    "VectorQuantizer2": {"beta": 0.25},
    "EMAVectorQuantizer": {"beta": 0.25},
    "LoopyVectorQuantizer": {"threshold": 0.1, "max_loops": 4},
    "VectorQuantizer": {"beta": 0.25},
    "GumbelQuantize": {},
}
HOLDS_ALL = ("VectorQuantizer", "GumbelQuantize")  # (N, K) is part of what they return
MOST = 200e6  # bytes; the scores of 1,024 latents with 65,536 codes would be 268e6


def status(name: str) -> float:
    """Return a size in bytes from /proc/self/status, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024.0


def growth(function: Callable[[], Any]) -> float:
    """Return how far a call takes the process's memory beyond that before it, in bytes."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    function()
    return status("VmHWM") - before


def measure(name: str, k: int, d: int, n: int, folder: str) -> tuple[float, ...]:
    """Measure a quantizer in MB: its state, forward and backward, its checkpoint, loading that."""
    torch.set_num_threads(1)
    config = {"target": f"taming.modules.vqvae.quantize.{name}", "params": QUANTIZERS[name]}
    quantizer, file = build_quantizer(config, n_e=k, e_dim=d), Path(folder, f"{name}.ckpt")
    state = sum(tensor.nbytes for tensor in quantizer.state_dict().values())
    z = torch.randn(n // 64, d, 8, 8, requires_grad=True)

    def step() -> None:
        quantized = quantizer(z)
        (quantized[0].square().mean() + quantized[1]).backward()

    step_bytes = growth(step)
    torch.save({"state_dict": quantizer.state_dict()}, file)
    loading = growth(lambda: quantizer.load_state_dict(load_checkpoint(file)["state_dict"]))
    return state / 1e6, step_bytes / 1e6, file.stat().st_size / 1e6, loading / 1e6


def picture(height: int, width: int) -> float:
    """Encode and decode a picture with random weights; return the process's peak in GB."""
    torch.set_num_threads(1)
    params = {"max_loops": 4, "target_length": 2.0}
    loopy = {"target": "taming.modules.vqvae.quantize.LoopyVectorQuantizer", "params": params}
    loss = {"target": "taming.modules.losses.DummyLoss"}
    tokenizer = Tokenizer(VQModel(SMALL, loss, 256, 16, quantizer_config=loopy))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    decoded = tokenizer.decode(tokenizer.encode(pixels))
    assert decoded.size == (width, height)
    return status("VmHWM") / 1e9


def speeds(folder: str, megabytes: int) -> dict[str, float]:
    """Measure the checks of a checkpoint and of a token cache's file, in GB/s of wall time."""
    file = Path(folder, "large.ckpt")
    torch.save({"state_dict": {"w": torch.randn(megabytes, 250_000)}}, file)
    tokens = (np.arange(megabytes * 500_000) % 1000).astype(np.uint16)
    offsets = np.arange(0, len(tokens) + 1, 250, dtype=np.int32)
    table = pa.table({"tokens": pa.ListArray.from_arrays(offsets, tokens)})
    about = {"vocab_size": 1000, "grid": (8, 8)}
    checks: dict[str, tuple[float, Callable[[], Any]]] = {
        "checkpoint, load and CRC-32": (file.stat().st_size, lambda: load_checkpoint(file)),
        "checkpoint, load alone": (file.stat().st_size, lambda: torch.load(file)),
        "a cache's file, CRC-32": (file.stat().st_size, lambda: crc32_of(file)),
        "a cache's table": (table.nbytes, lambda: check_table(table, about, None)),
    }
    found = {}
    for name, (size, check) in checks.items():
        check()
        begun = time.perf_counter()
        check()
        found[name] = size / 1e9 / (time.perf_counter() - begun)
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codes", type=int, default=65_536)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--megabytes", type=int, default=1000)
    options = parser.parse_args()
    failed = False
    head = ("state", "forward and backward", "checkpoint", "loading it")
    sys.stdout.write(f"{'MB':22}{''.join(f'{name:>22}' for name in head)}\n")
    with tempfile.TemporaryDirectory() as folder:
        sizes = (options.codes, options.channels, options.latents, folder)
        for name in QUANTIZERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (name, *sizes))
            sys.stdout.write(f"{name:22}{''.join(f'{value:22.0f}' for value in row)}\n")
            codebook = options.codes * options.channels * 4
            failed |= name not in HOLDS_ALL and row[1] * 1e6 > 4 * codebook + MOST
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(picture, (4000, 6000))
        sys.stdout.write(f"a picture of 24 megapixels {peak:10.2f} GB\n")
        failed |= peak > 4
        for name, speed in speeds(folder, options.megabytes).items():
            sys.stdout.write(f"{name:30}{speed:8.2f} GB/s\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
