"""Measure a trained tokenizer or prior on the validation set of its run.

python scripts/evaluate.py -r logs/<run> -o results/evaluation.json
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from taming.run import cli
from taming.run.folder import SavedRun
from taming.util import replacing

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from taming.models.vqgan import VQModel

logger = logging.getLogger("taming.evaluate")


def tokens_per_image(model: VQModel, data: LightningDataModule) -> list[int]:
    """Return the length of each validation image's token sequence."""
    lengths = []
    for batch in tqdm(data.val_dataloader(), desc="sequences"):
        x = model.get_input(batch, model.image_key).to(model.device)
        codes = model.encode_to_codes(x)  # (B, h, w, T)
        lengths += model.quantize.sequence.encode(codes)[1].tolist()
    return lengths


def main() -> None:
    """Print the validation metrics, and save them with the histograms as JSON."""
    parser = cli.script_parser(__doc__)
    cli.add_run_arguments(parser, "run, or one of its checkpoints")
    parser.add_argument("-o", "--output", default="results/evaluation.json", type=Path)
    options = parser.parse_args()

    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import LambdaCallback

    from taming.models.vqgan import VQModel
    from taming.run.trainer import quiet_lightning

    device = cli.choose_device(options.device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.is_dir():
        raise ValueError(f"{options.output} is a folder; -o names the file to be written")
    quiet_lightning()
    about = {"tokenizer": options.tokenizer, "trust_config": options.trust_config}
    saved = SavedRun.load(options.resume, **about)
    model, data = saved.model(), saved.data("validate")
    histograms: dict[str, list[int]] = {}

    def keep_histograms(trainer: Trainer, model: LightningModule) -> None:
        """Copy a tokenizer's counts of codes and lengths, which the end of an epoch clears."""
        counts = getattr(model, "codebook_histograms", dict)()
        histograms.update({name: values.tolist() for name, values in counts.items()})

    trainer = Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.index is None else [device.index],
        logger=False,
        callbacks=[LambdaCallback(on_validation_epoch_end=keep_histograms)],
        enable_model_summary=False,
    )
    metrics: dict[str, Any] = dict(trainer.validate(model, data, verbose=False)[0])
    for name, value in sorted(metrics.items()):
        logger.info("%-30s %.4f", name, value)
    metrics["histograms"] = histograms
    if isinstance(model, VQModel) and len(model.levels) == 1:  # several levels, several sequences
        with torch.no_grad():
            metrics["tokens_per_image"] = tokens_per_image(model.to(device).eval(), data)
    with replacing(options.output) as part:
        part.write_text(json.dumps(metrics, indent=2))
    logger.info("written to %s", options.output)


if __name__ == "__main__":
    cli.run(main)
