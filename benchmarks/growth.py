"""Fit how time and memory grow, and estimate what training large recipes takes.

python -m benchmarks.growth

First the exponents of log-log fits: 1 is linear. Then a sizing table by operations counted on the
meta device. Memory of a device is that of weights, gradients and Adam's two moments, 16 bytes a
parameter, and of what autograd keeps for the way back. Time is that of the operations at a share of
the device's peak, and of an all-reduce of the gradients that nothing hides.

Axis letters: B images, N vectors, D channels, K codes, T turns, L tokens.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import in_turn, save, table
from taming.models.vqgan import VQModel
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.discriminator.model import NLayerDiscriminator
from taming.modules.transformer.mingpt import GPT
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.run.cli import run, script_parser
from taming.tokenizer import Tokenizer

logger = logging.getLogger("taming.benchmark")

PEAK, USED, LINK = 312e12, 0.4, 200e9  # an A100: operations/s in bf16, share of it, bytes/s
DEVICES = (1, 8, 64, 256)

SMALL: dict[str, Any] = {"double_z": False, "z_channels": 32, "resolution": 64, "in_channels": 3}
SMALL |= {"out_ch": 3, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": []}
SMALL |= {"num_groups": 4}
LARGE: dict[str, Any] = {**SMALL, "z_channels": 256, "resolution": 256, "ch": 128}
LARGE |= {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16]}
LARGE |= {"num_groups": 32}


class Allocated(TorchDispatchMode):
    """Count the bytes of new tensors that are alive.

    Attributes:
        peak: Most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.bytes:
                    self.bytes[key] = storage.nbytes()
                    weakref.finalize(storage, self.bytes.pop, key, None)
        self.peak = max(self.peak, sum(self.bytes.values()))
        return result


def search(n: int, d: int, k: int) -> Callable[[], object]:
    """Return a search of n vectors of d channels among k codes."""
    vectors, codebook = torch.randn(n, d), torch.randn(k, d)
    return lambda: nearest_codes(vectors, codebook)


def loop(turns: int) -> Callable[[], object]:
    """Return the quantization of 4,096 sites by the loopy quantizer with so many turns."""
    torch.manual_seed(0)
    quantizer = LoopyVectorQuantizer(256, 16, 0.25, max_loops=turns, threshold=1e-6).eval()
    z = torch.randn(1, 16, 64, 64)
    return lambda: quantizer(z)


def picture(side: int, tile: int | None) -> Callable[[], object]:
    """Return the encoding and decoding of a picture of a side in pixels."""
    torch.manual_seed(0)
    model = VQModel(SMALL, {"target": "taming.modules.losses.DummyLoss"}, 256, 16)
    tokenizer = Tokenizer(model, tile=tile)
    x = torch.rand(3, side, side) * 2 - 1
    return lambda: tokenizer.decode(tokenizer.encode(x))


def sequence(length: int) -> Callable[[], object]:
    """Return a training pass of a small transformer over one sequence."""
    torch.manual_seed(0)
    model = GPT(1024, length, n_layer=4, n_head=4, n_embd=256)
    tokens = torch.randint(1024, (1, length))
    return lambda: model(tokens, targets=tokens)[1].backward()


GROWTH: dict[str, tuple[Callable[[int], Callable[[], object]], tuple[int, ...]]] = {
    "N, search": (lambda n: search(n, 64, 1024), (4096, 8192, 16384, 32768, 65536)),
    "K, search": (lambda k: search(2048, 64, k), (2048, 4096, 8192, 16384, 32768)),
    "D, search": (lambda d: search(2048, d, 4096), (64, 128, 256, 512, 1024)),
    "T, loop": (loop, (2, 4, 8, 16)),
    "side in tiles, encode + decode": (lambda s: picture(s, 256), (128, 256, 512, 1024)),
    "side whole, encode + decode": (lambda s: picture(s, None), (128, 256, 512)),
    "L, prior's pass": (sequence, (256, 512, 1024, 2048)),
}


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Return the exponent of the power of ``sizes`` that fits ``values`` best."""
    logs = [[math.log(value) for value in numbers] for numbers in (sizes, values)]
    return statistics.linear_regression(*logs).slope


def grow(name: str, repeats: int) -> dict[str, Any]:
    """Measure one growth: exponents of time and memory, and both at the largest size."""
    build, sizes = GROWTH[name]
    seconds, memory = [], []
    for size in sizes:
        work = build(size)
        with Allocated() as allocated:
            work()
        memory.append(float(allocated.peak))
        rounds = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            rounds.append(time.process_time() - start)
        seconds.append(min(rounds))
    row: dict[str, Any] = {"growth in": name, "sizes": f"{sizes[0]} to {sizes[-1]}"}
    row |= {"time": slope(sizes, seconds), "memory": slope(sizes, memory)}
    last = slope(sizes[-2:], seconds[-2:])
    return row | {"time, last doubling": last, "s": seconds[-1], "MB": memory[-1] / 1e6}


class _Autoencoder(nn.Module):
    """Generator without its quantizer, and what the discriminator adds: three of its passes."""

    def __init__(self, ddconfig: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.discriminator = NLayerDiscriminator(3, n_layers=3, use_actnorm=False)

    def forward(self, x: Tensor) -> Tensor:
        x_rec = self.decoder(self.encoder(x))
        return sum(self.discriminator(y).mean() for y in (x_rec, x, x_rec)) + x_rec.mean()  # type: ignore[return-value]


def autoencoder(ddconfig: Mapping[str, Any], side: int, images: int, k: int) -> dict[str, Any]:
    """Count a step of a VQGAN, LPIPS left out, with a codebook of k codes of its channels."""
    with torch.device("meta"):
        model, x = _Autoencoder(ddconfig), torch.empty(images, 3, side, side)
    counted = count(model, lambda: model(x))
    sites = images * (side // model.encoder.factor) ** 2
    width = ddconfig["z_channels"]
    counted["operations"] += 2 * sites * k * width
    counted["parameters"] += k * width
    return counted


def transformer(sizes: Mapping[str, int], length: int, images: int) -> dict[str, Any]:
    """Count a step of a prior over sequences of a length."""
    with torch.device("meta"):
        model = GPT(block_size=length, **sizes)  # type: ignore[arg-type]
        tokens = torch.zeros(images, length, dtype=torch.long)
    return count(model, lambda: model(tokens, targets=tokens)[1], length)


def count(model: nn.Module, loss: Callable[[], Any], length: int | None = None) -> dict[str, Any]:
    """Count a training pass: parameters, bytes kept for the way back, operations.

    Matrices of ``length`` x ``length`` are not counted: fused attention does not keep them.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        is_attention = tensor.shape[-2:] == (length, length)
        if tensor.untyped_storage()._cdata not in parameters and not is_attention:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "activations": sum(t.untyped_storage().nbytes() for t in kept.values()),
        "operations": counter.get_total_flops(),
    }


def sizing(name: str, counted: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Make a row of the sizing table: a device's memory and step, and images/s of several."""
    parameters, seconds = counted["parameters"], counted["operations"] / (PEAK * USED)
    row: dict[str, Any] = {"recipe": name, "images": images, "M parameters": parameters / 1e6}
    row |= {"state, GB": 16 * parameters / 1e9, "activations, GB": counted["activations"] / 1e9}
    row |= {"T operations": counted["operations"] / 1e12, "step, ms": seconds * 1e3}
    for n in DEVICES:
        reduced = 2 * (n - 1) / n * 4 * parameters / LINK
        row[f"images/s, {n}"] = round(n * images / (seconds + reduced))
    return row


def recipes() -> list[dict[str, Any]]:
    """Estimate the recipes of the table."""
    prior = {"vocab_size": 1024, "n_layer": 24, "n_head": 16, "n_embd": 1024}
    large: list[tuple[str, int, int, int]] = [
        ("f16 VQGAN, 256 px, K 1,024", 256, 12, 1024),
        ("the same, K 262,144", 256, 12, 262144),
        ("the same, 1,024 px, K 1,024", 1024, 1, 1024),
    ]
    rows = [sizing("demo's VQGAN, 64 px", autoencoder(SMALL, 64, 8, 256), 8)]
    rows += [sizing(n, autoencoder(LARGE, side, b, k), b) for n, side, b, k in large]
    rows += [
        sizing(f"GPT of 24 x 1,024, {length:,} sites", transformer(prior, length, b), b)
        for length, b in ((256, 16), (1024, 4), (4096, 1))
    ]
    return rows


def measured_point() -> dict[str, Any]:
    """Measure the peak of a step of the demo's networks, to set against the estimate."""
    torch.manual_seed(0)
    model, x = _Autoencoder(SMALL), torch.randn(8, 3, 64, 64)
    estimate = count(model, lambda: model(x))
    with Allocated() as allocated:
        optimizer = torch.optim.Adam(model.parameters())
        model(x).backward()
        optimizer.step()
    # The weights were there before.
    found = allocated.peak + 4 * estimate["parameters"]
    expected = 16 * estimate["parameters"] + estimate["activations"]
    return {"estimated, MB": expected / 1e6, "measured peak, MB": found / 1e6}


def checkpointing(repeats: int) -> dict[str, Any]:
    """Measure what ``gradient_checkpointing`` saves and costs in a step of the demo's networks."""
    x = torch.randn(8, 3, 64, 64)
    models = [_Autoencoder(SMALL | {"gradient_checkpointing": on}) for on in (False, True)]
    memory = []
    for model in models:
        with Allocated() as allocated:
            model(x).backward()
        memory.append(float(allocated.peak))
    whole, checked = models
    sides = {"whole": lambda: whole(x).backward(), "checked": lambda: checked(x).backward()}
    times = in_turn(sides, repeats)
    return {
        "MB without": memory[0] / 1e6,
        "MB with": memory[1] / 1e6,
        "memory": memory[1] / memory[0],
        "time": times["checked"].cpu / times["whole"].cpu,
    }


def main() -> None:
    """Log the tables and save them."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = [grow(name, repeats) for name in GROWTH]
    logger.info("Exponents of time and memory:\n%s", table(rows))
    sizes, point = recipes(), measured_point()
    logger.info("At %.0f%% of %.3g operations/s:\n%s", 100 * USED, PEAK, table(sizes))
    logger.info("One point of the estimate:\n%s", table([point]))
    checked = checkpointing(repeats)
    logger.info("Gradient checkpointing, tensors at once and time of a step:\n%s", table([checked]))
    logger.info("saved %s", save("growth", [*rows, *sizes, point, checked]))


if __name__ == "__main__":
    run(main)
