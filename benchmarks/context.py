"""Compare bits of a tokenizer's codes under tables, a context network, its float version and a GPT.

python -m benchmarks.context -r logs/<run of a tokenizer> --train data/photos/train \
    --val data/photos/val

Encodes crops of the pictures, each at a rate of its own, and trains all contenders on the codes of
``--train`` for the same number of steps: the `ContextNetwork` on its grids; the same on grids so
fine that nothing is rounded, which is a float network; and a two-level transformer of about as many
parameters. Tables by turn are counted in the same codes. Bits per image of the crops of ``--val``,
lengths included; those of the integer network also as bytes of its segments. Then the processor
time of coding a megapixel's sites, without the tokenizer's networks. Codes and trained networks are
kept in the folder of results and used again.

Axis letters: B images, h w grid, T turns, K codes.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.timing import in_turn, save, table
from taming.codec.context import Context
from taming.data.custom import ImageFolder
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.context import ContextPrior
from taming.models.prior import TokenizedBatch
from taming.modules.util import count_params
from taming.run.cli import run, script_parser
from taming.run.folder import model_from_run

logger = logging.getLogger("taming.benchmark")

NETWORK = "taming.modules.context.ContextNetwork"
FLOAT = {"bits": 40}  # finer than float32 can send
GPT: dict[str, Any] = {
    "target": "taming.modules.transformer.two_level.TwoLevelGPT",
    "params": {"n_layer": 2, "n_head": 4, "n_embd": 96, "rms_norm": True, "qk_norm": True}
    | {"depth": {"n_layer": 1, "n_head": 4, "n_embd": 96, "rms_norm": True, "qk_norm": True}},
}
BATCH = 4
Nats = Callable[[Tensor], Tensor]  # codes (B, h, w, T) -> (B,)


def keep(model: Any) -> Any:
    """Return the model: a target for a tokenizer that is loaded already."""
    return model


@torch.no_grad()
def codes_of(prior: ContextPrior, folder: str, size: int, images: int | None = None) -> Tensor:
    """Encode crops of a folder's pictures as codes (B, h, w, T), at the prior's rates.

    The crops are random in training, and one for each picture unless ``images`` limits them.
    """
    crops = {"random_crop": True, "random_flip": True, "random_scale": (1.0, 2.5)}
    data = ImageFolder(folder, size, allow_upscale=True, **(crops if prior.training else {}))
    codes, images = [], images or len(data)
    for start in tqdm(range(0, images, 16), desc=folder):
        numbers = range(start, min(start + 16, images))
        x = torch.stack([torch.as_tensor(data[n % len(data)]["image"]) for n in numbers])
        codes.append(prior.encode_codes(x.permute(0, 3, 1, 2)))
    return torch.cat(codes)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Load a file of an earlier start, or make and save what belongs there."""
    if not file.exists():
        torch.save(make(), file)
    return torch.load(file)


def train(network: nn.Module, nats: Nats, codes: Tensor, steps: int) -> dict[str, Any]:
    """Train on random batches; return the weights."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.01)

    def factor(step: int) -> float:
        return min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    torch.manual_seed(0)
    for _ in tqdm(range(steps), desc=type(network).__name__):
        batch = codes[torch.randint(len(codes), (BATCH,))]
        optimizer.zero_grad()
        (nats(batch).sum() / (batch >= 0).sum()).backward()
        optimizer.step()
        schedule.step()
    return network.state_dict()


def nats_of_tokens(prior: Net2NetTransformer) -> Nats:
    """Return the measure of a transformer."""

    def nats(codes: Tensor) -> Tensor:
        c = torch.zeros(len(codes), 1)
        condition = prior.encode_to_c(c)
        tokens = prior.codes_to_tokens(codes)
        return prior.measure_nats(TokenizedBatch(codes, tokens, c, *condition, 1))[0]

    return nats


def static_bits(training: Tensor, codes: Tensor, n_codes: int) -> float:
    """Return the bits per image by tables by turn: of codes, and of going on."""
    bits = 0.0
    for turn in range(codes.shape[-1]):
        known, sent = training[..., turn], codes[..., turn]
        counts = torch.bincount(known[known >= 0], minlength=n_codes) + 0.5
        bits -= float((counts / counts.sum()).log2()[sent[sent >= 0]].double().sum())
        if turn:
            known, sent = (c[c[..., turn - 1] >= 0][:, turn] >= 0 for c in (training, codes))
            on = (known.sum() + 0.5) / (known.numel() + 1)
            bits -= float(sent.sum() * on.log2() + (~sent).sum() * (1 - on).log2())
    return bits / len(codes)


@torch.no_grad()
def mean_bits(nats: Nats, codes: Tensor) -> float:
    """Return the bits per image of codes (B, h, w, T)."""
    parts = [nats(part).double().sum() for part in codes.split(16)]
    return float(torch.stack(parts).sum()) / math.log(2) / len(codes)


def megapixel_times(model: Context, codes: Tensor, factor: int) -> dict[str, float]:
    """Return seconds of encoding and decoding sites like these for a million pixels."""
    side = round(1000 / factor)
    plane = torch.cat([*codes], dim=1)  # beside each other
    plane = plane.repeat(-(-side // plane.shape[0]), -(-side // plane.shape[1]), 1)[:side, :side]
    segments = list(model.encode(plane))
    sides = {
        "encode": lambda: list(model.encode(plane)),
        "decode": lambda: model.decode(segments, (side, side)),
    }
    return {name: timing.cpu for name, timing in in_turn(sides, 3).items()}


def contenders(
    prior: ContextPrior, tokenizer: Any, grid: tuple[int, int]
) -> dict[str, tuple[nn.Module, Nats]]:
    """Build all networks that are trained, for a grid (h, w): name -> network and measure."""
    first = {"target": "benchmarks.context.keep", "params": {"model": tokenizer}}
    finer = ContextPrior(first, {"target": NETWORK, "params": FLOAT}).context
    shape = {"site_shape": [*grid, prior.sequence.site_tokens]}
    network = {**GPT, "params": {**GPT["params"], **shape}}
    gpt = Net2NetTransformer(network, first, "__is_unconditional__")
    return {
        "integer": (prior.context, prior.context.nats),
        "float": (finer, finer.nats),
        "transformer": (gpt.transformer, nats_of_tokens(gpt)),
    }


def parse() -> Namespace:
    """Parse the command line."""
    parser = script_parser(__doc__, device=False)
    add = parser.add_argument
    add("-r", "--run", required=True, help="run of a tokenizer")
    add("--train", required=True, help="folder of pictures")
    add("--val", required=True, help="folder of other pictures")
    add("--size", type=int, default=256, help="side of a crop (default: 256)")
    add("--images", type=int, default=1200, help="crops to train on")
    add("--steps", type=int, default=1000, help="training steps of each network")
    beside = ["float", "transformer"]
    add("--beside", nargs="*", default=beside, help="other networks to train")
    add("-o", "--outdir", type=Path, default=Path("results/context"))
    return parser.parse_args()


def measure(options: Namespace, tokenizer: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """Train what is missing: a row of bits per image for each model, and held-out codes."""
    first = {"target": "benchmarks.context.keep", "params": {"model": tokenizer}}
    prior = ContextPrior(first, {"target": NETWORK})

    def encode() -> list[Tensor]:
        training = codes_of(prior.train(), options.train, options.size, options.images)
        return [training.short(), codes_of(prior.eval(), options.val, options.size).short()]

    training, held_out = (codes.long() for codes in kept(options.outdir / "codes.pt", encode))
    bits = static_bits(training, held_out, tokenizer.quantize.n_e)
    rows: list[dict[str, Any]] = [{"model": "static", "parameters": 0, "bits": bits}]
    grid = training.shape[1], training.shape[2]
    for name, (network, nats) in contenders(prior, tokenizer, grid).items():
        if name not in ("integer", *options.beside):
            continue
        steps = partial(train, network.train(), nats, training, options.steps)
        network.load_state_dict(kept(options.outdir / f"{name}.pt", steps))
        network.eval()
        bits = mean_bits(nats, held_out)
        rows.append({"model": name, "parameters": count_params(network), "bits": bits})
    context, parameters = Context(prior.context), rows[1]["parameters"]
    bits = 8 * mean(sum(map(len, context.encode(codes))) for codes in held_out)
    times = megapixel_times(context, held_out, tokenizer.factor)
    seconds = "{encode:.2f} / {decode:.2f}".format(**times)
    rows.append({"model": "segments", "parameters": parameters, "bits": bits, "time": seconds})
    return rows, held_out


def main() -> None:
    """Train, measure, log the table and save it."""
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options.outdir.mkdir(parents=True, exist_ok=True)
    rows, held_out = measure(options, model_from_run(options.run))
    for row in rows:
        row["saved"] = f"{1 - row['bits'] / rows[0]['bits']:.1%}"
    for row in rows:
        row["bits"] = round(row["bits"])
        row["seconds per megapixel"] = row.pop("time", "")
    sites = int((held_out >= 0).sum()) / held_out[..., 0].numel()
    size = options.size
    logger.info("Bits per image of %d pixels, %.2f codes a site:\n%s", size, sites, table(rows))
    logger.info("saved %s", save("context", rows))


if __name__ == "__main__":
    run(main)
