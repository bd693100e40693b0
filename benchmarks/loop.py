"""Time the loop against the searches that it needs, and the codecs of token sequences.

python -m benchmarks.loop

The limit is one search of all latents for each turn: every turn searches the whole codebook. Before
anything is timed, codes are decoded and compared with what the quantizer returned, and tokens with
the codes they were encoded from.

Axis letters: N latents, D channels, K codes, T turns.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from benchmarks.settings import SETTING
from benchmarks.timing import in_turn, save, table
from taming.models.vqgan import VQModel
from taming.modules.sequence.grammar import TokenSequence
from taming.modules.sequence.notations import RasterSequence, RunLengthSequence, UnarySequence
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.quantize import LoopyVectorQuantizer, VectorQuantizer2
from taming.modules.vqvae.rate import threshold_for
from taming.run.cli import run, script_parser

logger = logging.getLogger("taming.benchmark")

SIZES = ((4096, 256, 1024), (4096, 64, 4096), (4096, 256, 16384))
TURNS = 4
TRANSFORMS = "taming.modules.vqvae.transforms."


def started(z: Tensor, k: int, turns: int, transform: str) -> LoopyVectorQuantizer:
    """Build a quantizer in training mode, with codes and transform placed by latents z."""
    quantizer = LoopyVectorQuantizer(
        k,
        z.shape[1],
        max_loops=turns,
        transform_config={"target": TRANSFORMS + transform},
        target_length=(1 + turns) / 2,
        start_batches=0,
    )
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn_like(quantizer.embedding.weight))
        for _ in range(30):  # threshold and maps settle
            quantizer(z[:16])
    return quantizer


def measure_attract(n: int, d: int, k: int, repeats: int) -> dict[str, Any]:
    """Measure `Attract` of few and of many turns over `VectorQuantizer2`, in evaluation."""
    z = torch.randn(n // 64, d, 8, 8)
    plain = VectorQuantizer2(k, d, beta=0.25).eval()
    torch.nn.init.normal_(plain.embedding.weight)
    sides: dict[str, Any] = {"plain": lambda: plain(z)}
    with torch.no_grad():
        for turns in (4, 16):
            quantizer = started(z, k, turns, "Attract").eval()
            quantizer.embedding.weight.copy_(plain.embedding.weight)
            out = quantizer(z)
            assert torch.equal(quantizer.get_codebook_entry(out.info.indices), out.z_q)
            sides[f"T = {turns}"] = lambda q=quantizer: q(z)
        times = in_turn(sides, repeats)
    ratios = {name: times[name].cpu / times["plain"].cpu for name in sides if name != "plain"}
    spread = max(timing.spread for timing in times.values())
    return {
        "N": n,
        "D": d,
        "K": k,
        "plain, ms": times["plain"].cpu * 1e3,
        **ratios,
        "spread": spread,
    }


def measure_residual(n: int, d: int, k: int, repeats: int) -> dict[str, Any]:
    """Measure `LinearResidual` over (codes per site) times one search.

    Training searches as many turns as evaluation, since the threshold is fixed; it adds the losses,
    the backward pass, and the learning of maps and codes.
    """
    z = torch.randn(n // 64, d, 8, 8)
    quantizer = started(z, k, TURNS, "LinearResidual")
    codebook = quantizer.embedding.weight.detach().clone()
    distances = quantizer.whole_path(z).distances
    quantizer.threshold.copy_(threshold_for(distances, torch.tensor([5 * n // 2]))[0])
    with torch.no_grad():
        out = quantizer.eval()(z)
    assert torch.equal(quantizer.get_codebook_entry(out.info.indices), out.z_q)
    latents = z.clone().requires_grad_()

    def evaluate() -> None:
        with torch.no_grad():
            quantizer.eval()(z)

    def train() -> None:
        quantized = quantizer.train()(latents, threshold=quantizer.threshold)
        (quantized.z_q.sum() + quantized.loss).backward()

    length = float(out.info.encodings.lengths.float().mean())
    sides = {"search": lambda: nearest_codes(z, codebook), "evaluate": evaluate, "train": train}
    times = in_turn(sides, repeats)
    search = times["search"].cpu
    return {
        "N": n,
        "D": d,
        "K": k,
        "search, ms": search * 1e3,
        "mean length": length,
        "evaluation": times["evaluate"].cpu / (length * search),
        "training": times["train"].cpu / (length * search),
        "spread": max(timing.spread for timing in times.values()),
    }


def measure_codec(sequence: TokenSequence, repeats: int) -> dict[str, Any]:
    """Measure a notation: tokens of a batch of 64 images of 16 x 16 sites."""
    turns, k = sequence.max_loops, sequence.n_e
    length = torch.randint(1, turns + 1, (64, 16, 16, 1))
    turn = torch.arange(turns)
    codes = torch.randint(0, k, (64, 16, 16, turns))
    codes = torch.where((turn < length - 1) & sequence.dummies, k, codes)
    codes = torch.where(turn < length, codes, -1)
    tokens, lengths = sequence.encode(codes)
    assert torch.equal(sequence.decode(tokens, (16, 16)), codes)
    sides = {
        "encode": lambda: sequence.encode(codes),
        "decode": lambda: sequence.decode(tokens, (16, 16)),
    }
    times = in_turn(sides, repeats)
    count = int(lengths.sum())
    return {
        "notation": type(sequence).__name__,
        "T": turns,
        "dummies": sequence.dummies,
        "tokens": count,
        **{f"{name}, million/s": count / times[name].cpu / 1e6 for name in sides},
        "spread": max(timing.spread for timing in times.values()),
    }


def measure_telemetry(repeats: int) -> dict[str, Any]:
    """Measure what counting codes adds to a training step.

    The step is short: that of a small tokenizer, without discriminator and optimizers.
    """
    model = VQModel(SETTING["ddconfig"], {"target": "taming.modules.losses.DummyLoss"}, 1024, 64)
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    z = model.encode_to_prequant(x).detach()
    quantized = model.quantize(z)

    def step() -> None:
        x_rec, loss = model(x)
        ((x_rec - x).abs().mean() + loss).backward()

    model.setup("fit")
    sides = {"step": step, "telemetry": lambda: model.codebook.update("train", z, quantized)}
    times = in_turn(sides, repeats)
    step_time, telemetry = times["step"].cpu, times["telemetry"].cpu
    return {
        "step, ms": step_time * 1e3,
        "telemetry, ms": telemetry * 1e3,
        "share": telemetry / step_time,
        "spread": max(timing.spread for timing in times.values()),
    }


def main() -> None:
    """Log the tables and save them."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default: 9)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.empty(1 << 23).fill_(0)  # as in benchmarks.search
    codecs: list[TokenSequence] = [RasterSequence(1024)]
    codecs += [
        kind(1024, 4, d) for kind in (UnarySequence, RunLengthSequence) for d in (False, True)
    ]
    parts = {
        "Attract over VectorQuantizer2": [measure_attract(*size, repeats) for size in SIZES],
        "LinearResidual over its searches": [measure_residual(*size, repeats) for size in SIZES],
        "Telemetry": [measure_telemetry(repeats)],
        "Token sequences": [measure_codec(sequence, 3 * repeats) for sequence in codecs],
    }
    for title, rows in parts.items():
        logger.info("%s, processor time of one thread:\n%s", title, table(rows))
    rows = [{"table": title, **row} for title, rows in parts.items() for row in rows]
    logger.info("saved %s", save("loop", rows))


if __name__ == "__main__":
    run(main)
