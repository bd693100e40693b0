"""Time the sampling of priors: tokens and images per second of one thread.

pip install --target PEER --no-deps taming-transformers-rom1504
python -m benchmarks.sampling --peer PEER

The transformer takes turns with the original's `sample_with_past`, and with the bare products of
all its weights, which no step can go without; the PixelCNN with a run of its stacks over the whole
grid for each site. Both sides' samples are compared before anything is timed. Weights are random.

Axis letters: B images, h w grid, T turns, V values.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import save, summary, table
from benchmarks.workers import ROOT, Worker
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.pixelcnn.model import PixelCNN
from taming.modules.pixelcnn.site import SiteSymbols
from taming.modules.pixelcnn.stacks import GatedStacks
from taming.modules.transformer.generate import SamplingParams, generators_of
from taming.modules.transformer.mingpt import GPT, sample_with_past
from taming.run.cli import run, script_parser
from taming.run.config import load_config

logger = logging.getLogger("taming.benchmark")

Row = dict[str, Any]
SIZES: Row = {"vocab_size": 1024, "block_size": 256, "n_layer": 8, "n_head": 8, "n_embd": 512}
Side = Callable[[], tuple[float, float]]  # wall and processor seconds of one piece of work


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds of a piece of work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def row(
    prior: str, images: int, tokens: int, peer: str, sides: Mapping[str, Side], rounds: int
) -> Row:
    """Measure the sides in turn, after one round without: a row of the table.

    Args:
        prior: Its name.
        images: Number of images of a batch.
        tokens: Number of their tokens.
        peer: Name of the peer's side.
        sides: "ours", the peer's if there is one, and "products", the limit, if it is known.
        rounds: Number of timed rounds, at least 2.
    """
    times = [{name: side() for name, side in sides.items()} for _ in range(1 + rounds)][1:]
    found = {name: summary([one[name] for one in times]) for name in sides}
    ours = found["ours"].cpu
    return {
        "prior": prior,
        "images": images,
        "peer": peer or "-",
        "its tokens/s": tokens / found[peer].cpu if peer else "-",
        "tokens/s": tokens / ours,
        "images/s": images / ours,
        "faster by": found[peer].cpu / ours if peer else "-",
        "over products": ours / found["products"].cpu if "products" in found else "-",
        "spread": max(timing.spread for timing in found.values()),
    }


# --- transformer, against the original's ---------------------------------------------------------


@contextmanager
def original(model: GPT, images: int, steps: int, peer: Path) -> Iterator[Worker]:
    """Start the original with the weights of a model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = {"sizes": SIZES, "images": images, "steps": steps}
        (folder / "setting.json").write_text(json.dumps(setting))
        torch.save(model.state_dict(), folder / "weights.pt")
        worker = Worker([ROOT / "benchmarks/original_sampling.py", folder], [peer])
        try:
            yield worker
        finally:
            worker.close()


def products(model: nn.Module, images: int, steps: int) -> None:
    """Multiply vectors of all images by each matrix of a model, so many times."""
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    vectors = {weight.shape[1]: torch.randn(images, weight.shape[1]) for weight in weights}
    with torch.inference_mode():
        for _ in range(steps):
            for weight in weights:
                F.linear(vectors[weight.shape[1]], weight)


def transformer(images: int, peer: Path, rounds: int, steps: int = 255) -> Row:
    """Measure a transformer; its greedy tokens must be the original's."""
    model = GPT(**SIZES).eval()
    start = torch.zeros(images, 1, dtype=torch.int64)
    with original(model, images, steps, peer) as worker:
        ours = sample_with_past(start, model, steps, sample_logits=False)
        if worker.request()["tokens"] != ours.tolist():
            raise RuntimeError("the original's greedy tokens differ")

        def ask() -> tuple[float, float]:
            report = worker.request()
            return report["wall"], report["cpu"]

        sides: dict[str, Side] = {
            "original": ask,
            "ours": lambda: timed(lambda: sample_with_past(start, model, steps)),
            "products": lambda: timed(lambda: products(model, images, steps)),
        }
        return row("transformer", images, images * steps, "original", sides, rounds)


# --- two levels: the demo's prior ----------------------------------------------------------------


def demo_prior() -> Net2NetTransformer:
    """Build the demo's prior and tokenizer."""
    prior, tokenizer = (
        load_config([ROOT / f"configs/demo/{name}.yaml"]).values["model"]
        for name in ("loopy_transformer", "loopy_vqgan")
    )
    tokenizer["params"]["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    prior["params"]["first_stage_config"] = tokenizer
    return Net2NetTransformer(**prior["params"]).eval()


def two_levels(model: Net2NetTransformer, images: int, side: int, rounds: int) -> Row:
    """Measure the demo's prior on ``side`` x ``side`` sites, with the same samples each time."""
    codes = torch.empty(0)

    def sample() -> None:
        nonlocal codes
        params = SamplingParams(generators=generators_of(0, range(images)))
        start = torch.zeros(images, 1, dtype=torch.int64)
        codes = model.sample_codes(start, params, grid=(side, side))

    sides: dict[str, Side] = {"ours": lambda: timed(sample)}
    found = row(f"two-level, {side} x {side}", images, 1, "", sides, rounds)
    tokens = int((model.codes_to_tokens(codes) >= 0).sum())
    return {**found, "tokens/s": tokens * found["tokens/s"]}


# --- PixelCNN, against its stacks over the whole grid --------------------------------------------


def sample_symbol(logits: Tensor) -> Tensor:
    """Sample symbols (B,) from logits (B, V)."""
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1)


@torch.no_grad()
def sample_anew(net: PixelCNN, codes: Tensor, labels: Tensor) -> Tensor:
    """Sample codes (B, h, w, T), overwritten, by running the stacks anew for each site."""
    codes[..., :1], codes[..., 1:] = 0, -1
    _, h, w, _ = codes.shape
    for site in range(h * w):
        embedded = net.embed(net.site.of_codes(codes)).permute(0, 3, 1, 2)
        context = net.stacks(embedded, net.classes(labels)).flatten(2)[..., site]
        symbols = labels.new_empty(len(labels), 0)
        for _ in net.site.sizes:
            symbol = sample_symbol(net.head(context, symbols))
            symbols = torch.cat([symbols, symbol[:, None]], dim=1)
        codes[:, site // w, site % w] = net.site.to_codes(symbols)
    return codes


SAMPLERS: dict[str, Callable[[PixelCNN, Tensor, Tensor], Tensor]] = {
    "whole grid": sample_anew,
    "ours": lambda net, codes, labels: net.sample(codes, labels, sample_symbol),
}


def pixelcnn(images: int, rounds: int) -> Row:
    """Measure a PixelCNN of the sizes of configs/pixelcnn_cifar10.yaml."""
    site = SiteSymbols(n_e=256, max_loops=6, dummies=False)
    net = PixelCNN(site, 10, GatedStacks(channels=128, layers=10)).eval()
    labels, sampled = torch.zeros(images, dtype=torch.int64), []
    blank = torch.zeros(images, 8, 8, site.max_loops, dtype=torch.int64)
    for sample in SAMPLERS.values():
        torch.manual_seed(0)
        sampled.append(sample(net, blank.clone(), labels))
    if not torch.equal(*sampled):
        raise RuntimeError("both ways to sample from the PixelCNN give other codes")
    sides: dict[str, Side] = {
        name: partial(timed, partial(sample, net, blank.clone(), labels))
        for name, sample in SAMPLERS.items()
    }
    tokens = int((sampled[0] >= 0).sum()) + images * 64  # the length of each site is one more
    return row("PixelCNN, 8 x 8", images, tokens, "whole grid", sides, rounds)


def main() -> None:
    """Log the table and save it."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("--peer", type=Path, help="folder of the original's package")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--large", action="store_true", help="also 64 x 64 sites; takes minutes")
    options = parser.parse_args()
    if not options.peer or not (options.peer / "taming").is_dir():
        raise ValueError(f"--peer {options.peer} holds no package taming; see --help")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peer, rounds, model = options.peer.resolve(), options.repeats, demo_prior()
    rows = [transformer(images, peer, rounds) for images in (1, 16)]
    rows += [two_levels(model, images, 16, rounds) for images in (1, 16)]
    rows += [pixelcnn(images, rounds) for images in (1, 16)]
    if options.large:
        rows.append(two_levels(model, 1, 64, 2))
    logger.info("Processor time of one thread:\n%s", table(rows))
    logger.info("saved %s", save("sampling", rows))


if __name__ == "__main__":
    run(main)
