"""Time a VQGAN's training step against the original's modules in a plain loop.

pip install --target PEER --no-deps taming-transformers-rom1504
python -m benchmarks.training --peer PEER
python -m benchmarks.training --peer PEER --device cuda --precision bf16-mixed --compile

Both sides start from the same weights, train on the same images and take turns; ours runs in
Lightning as main.py runs it. The losses of the first step are compared before anything is timed.
LPIPS, whose weights would have to be downloaded, is left out of both. On a CPU, processor time of
one thread counts; on a GPU, wall time. ``--precision`` and ``--compile`` are of our side alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from benchmarks.settings import ON_GPU, SETTING
from benchmarks.timing import save, summary, table
from benchmarks.workers import ROOT, Server, Worker
from taming.models.vqgan import VQModel
from taming.run.cli import choose_device, run, script_parser
from taming.run.loggers import quiet_lightning

logger = logging.getLogger("taming.benchmark")

STARTS = {"with the discriminator": 0, "before disc_start": 1_000_000}


def build(setting: dict[str, Any]) -> VQModel:
    """Build our model of a setting."""
    target = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    loss = {"target": target, "params": setting["loss"]}
    sizes = (setting["n_embed"], setting["embed_dim"])
    model = VQModel(setting["ddconfig"], loss, *sizes, compile=setting["compile"])
    model.learning_rate = setting["learning_rate"]
    return model


class Served(pl.Callback):
    """Serve one training step for each request."""

    def __init__(self) -> None:
        self.server, self.report = Server(), {}

    def on_train_batch_start(self, *_: Any) -> None:
        """Report the step before, with all that Lightning did after it, and wait."""
        self.server.turn(**self.report)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the generator's loss."""
        self.report = {"loss": float(trainer.callback_metrics["train/aeloss"])}


def train(folder: Path) -> None:
    """Serve our steps; the worker's program."""
    torch.set_num_threads(1)
    quiet_lightning()
    setting = json.loads((folder / "setting.json").read_text())
    model = build(setting)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    torch.manual_seed(0)
    side = setting["ddconfig"]["resolution"]
    images = torch.rand(setting["batch_size"], 3, side, side) * 2 - 1
    batches: Any = [{"image": images.movedim(1, -1)}] * 1_000_000
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="gpu" if setting["device"] == "cuda" else "cpu",
        devices=1,
        precision=setting["precision"],
        logger=CSVLogger(folder),
        callbacks=[Served()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))


def measure(setting: dict[str, Any], peer: Path, repeats: int) -> dict[str, Any]:
    """Measure one step of both sides, ``repeats`` times in turn.

    Args:
        setting: Sizes and devices of both sides.
        peer: Folder of the original's package.
        repeats: Number of timed steps.

    Returns:
        Seconds of a step of each side, their ratio, the larger spread, and the relative difference
        of the first losses.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "setting.json").write_text(json.dumps(setting))
        torch.manual_seed(1)
        torch.save(build(setting).state_dict(), folder / "weights.pt")
        original = [ROOT / "benchmarks/original_step.py", folder]
        sides = {
            "original": Worker(original, [peer]),
            "ours": Worker(["-m", "benchmarks.training", "--serve", folder], [ROOT]),
        }
        try:
            first = [side.request()["loss"] for side in sides.values()]
            rounds = [{k: side.request() for k, side in sides.items()} for _ in range(repeats)]
        finally:
            for side in sides.values():
                side.close()
    counted = "wall" if setting["device"] == "cuda" else "cpu"
    times = {k: summary([(r[k]["wall"], r[k][counted]) for r in rounds]) for k in sides}
    return {
        "original, s": times["original"].cpu,
        "ours, s": times["ours"].cpu,
        "faster by": times["original"].cpu / times["ours"].cpu,
        "spread": max(timing.spread for timing in times.values()),
        "loss differs by": abs(first[0] - first[1]) / abs(first[0]),
    }


def main() -> None:
    """Log the table and save it."""
    parser = script_parser(__doc__)
    parser.add_argument("--precision", default="32-true", help="of ours (default: 32-true)")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--peer", type=Path, help="folder of the original's package")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps (default: 7)")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        train(options.serve)
        return
    if not options.peer or not (options.peer / "taming").is_dir():
        raise ValueError(f"--peer {options.peer} holds no package taming; see --help")
    peer = options.peer.resolve()
    device = choose_device(options.device).type
    setting = {**SETTING, **(ON_GPU if device == "cuda" else {}), "device": device}
    setting |= {"precision": options.precision, "compile": options.compile}
    rows = []
    for name, start in STARTS.items():
        loss = setting["loss"] | {"disc_start": start}
        rows.append({"step": name, **measure(setting | {"loss": loss}, peer, options.repeats)})
    logger.info("Processor time of one thread, on a GPU wall time:\n%s", table(rows))
    name = f"training_{device}_{options.precision}{'_compiled' if options.compile else ''}"
    logger.info("saved %s", save(name, rows))


if __name__ == "__main__":
    run(main)
