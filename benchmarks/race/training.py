"""Training of contenders and of priors over their tokens; results are saved and reused."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader, Subset

from race.contenders import Contender
from race.peers import ResidualVQ
from race.plans import Plan
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.prior import Prior
from taming.models.vqgan import VQModel
from taming.modules.vqvae.loop import Cascade
from taming.modules.vqvae.quantize import LoopyVectorQuantizer
from taming.run.loggers import quiet_lightning
from taming.util import instantiate_from_config

logger = logging.getLogger("taming.benchmark")

BASE = ("encoder", "decoder", "quant_conv", "post_quant_conv", "shortcut")


def schedule(steps: int) -> dict[str, Any]:
    """Return the block of a learning rate that warms up, then falls to 2% along a cosine."""
    return {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {
            "warm_up_steps": min(50, steps // 4),
            "lr_start": 0.02,
            "lr_max": 1.0,
            "lr_min": 0.02,
            "max_decay_steps": steps,
        },
    }


def loader(data: Any, batch_size: int, shuffle: bool = False, workers: int = 0) -> DataLoader:
    """Build a data loader; its shuffling depends only on the global seed."""
    return DataLoader(data, batch_size, shuffle=shuffle, drop_last=shuffle, num_workers=workers)


def fit(model: pl.LightningModule, data: DataLoader, steps: int, precision: str) -> None:
    """Train for a number of steps, on a GPU if there is one, without saving anything."""
    quiet_lightning()
    warnings.filterwarnings("ignore", "You defined a `validation_step`")  # measured afterwards
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        precision=precision,  # type: ignore[arg-type]
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)


def build_tokenizer(
    plan: Plan, contender: Contender, steps: int | None = None, quantize_start: int = 0
) -> VQModel:
    """Build a contender's tokenizer; all have the same encoder, decoder and loss.

    Args:
        plan: Sizes and durations.
        contender: Names the quantizer.
        steps: Training steps of the learning rate's schedule; None for the plan's.
        quantize_start: Generator step from which the decoder sees codes.
    """
    block = contender.quantizer
    n_e = instantiate_from_config(block).n_e
    return VQModel(
        ddconfig=plan.ddconfig,
        lossconfig={
            "target": "taming.modules.losses.reconstruction.ReconstructionLoss",
            "params": {"distance": "l2"},
        },
        n_embed=n_e,
        embed_dim=plan.channels,
        quantizer_config=block,
        betas=(0.9, 0.99),
        scheduler_config=schedule(steps or plan.steps),
        quantize_start=quantize_start,
        orthogonal_start=not plan.linear_shortcut,
        linear_shortcut=plan.linear_shortcut,
    )


def trained_base(
    plan: Plan, seed: int, data: Any, folder: Path, precision: str
) -> dict[str, torch.Tensor]:
    """Train an encoder and a decoder without codes, or load an earlier result."""
    file = folder / f"base-{seed}.pt"
    if not file.exists():
        logger.info("training the autoencoder of seed %d", seed)
        pl.seed_everything(seed, verbose=False)
        some = plan.contenders()["vq"]  # any: its codes are never decoded
        model = build_tokenizer(plan, some, plan.base_steps, quantize_start=plan.base_steps)
        model.learning_rate = plan.learning_rate
        fit(model, loader(data, plan.batch_size, shuffle=True), plan.base_steps, precision)
        state = {k: v for k, v in model.state_dict().items() if k.split(".")[0] in BASE}
        torch.save(state, file)
    return torch.load(file, map_location="cpu")


def trained_tokenizer(
    plan: Plan, contender: Contender, seed: int, data: Any, folder: Path, precision: str
) -> VQModel:
    """Train a contender, or load an earlier result."""
    file = folder / f"{contender.name}-{seed}.pt"
    scratch = contender.from_scratch
    base = {} if scratch or file.exists() else trained_base(plan, seed, data, folder, precision)
    steps = plan.steps + (plan.base_steps if scratch else 0)
    pl.seed_everything(seed, verbose=False)
    model = build_tokenizer(plan, contender, steps)
    if file.exists():
        model.load_state_dict(torch.load(file, map_location="cpu"))
    else:
        logger.info("training %s, seed %d", contender.name, seed)
        model.load_state_dict(base, strict=False)
        model.learning_rate = plan.learning_rate * (1 if scratch else 0.25)
        fit(model, loader(data, plan.batch_size, shuffle=True), steps, precision)
        torch.save(model.state_dict(), file)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def widen_search(model: VQModel, contender: Contender) -> None:
    """Set a trained tokenizer's search to its contender's beam width."""
    if contender.beam is None:
        return
    if isinstance(model.quantize, ResidualVQ):
        model.quantize.widen(contender.beam)
    else:
        assert isinstance(model.quantize, LoopyVectorQuantizer)
        assert isinstance(model.quantize.transform, Cascade)
        model.quantize.transform.beam = contender.beam


def prior_bits(plan: Plan, tokenizer: VQModel, train: Any, test: Any, precision: str) -> float:
    """Train a small transformer on a tokenizer's tokens; return its bits per held-out image.

    The tokenizer keeps its current rate. Lengths are part of the tokens, so their bits count.
    """
    pl.seed_everything(0, verbose=False)
    device = tokenizer.device  # training moves the tokenizer to the CPU together with the prior
    side = tokenizer.grid[0]
    sequence = tokenizer.quantize.sequence
    model = Net2NetTransformer(
        transformer_config={
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": {
                "vocab_size": sequence.vocab_size,
                "block_size": side * side * sequence.site_tokens + 1,
                "site_shape": (side, side, sequence.site_tokens),
                **plan.prior,
            },
        },
        first_stage_config={"target": "race.training.keep", "params": {"model": tokenizer}},
        cond_stage_config="__is_unconditional__",
        scheduler_config=schedule(plan.prior_steps),
    )
    model.learning_rate = plan.prior_rate
    if not torch.cuda.is_available():
        precision = "32-true"  # faster on a CPU for so small a transformer
    fit(model, loader(train, plan.batch_size, shuffle=True), plan.prior_steps, precision)
    return bits_per_image(model.to(device).eval(), loader(test, 100))


def keep(model: VQModel) -> VQModel:
    """Return a model unchanged, for use as a configuration's target."""
    return model


@torch.no_grad()
def bits_per_image(model: Prior, data: DataLoader) -> float:
    """Return the mean negative log-likelihood of the tokens of an image, in bits."""
    total, images = 0.0, 0
    for batch in data:
        batch = move_data_to_device(batch, model.device)
        nats, _ = model.measure_nats(model.tokenize_batch(batch))
        total, images = total + float(nats.sum()), images + len(nats)
    return total / images / math.log(2)


def first(data: Any, amount: int) -> Subset:
    """Take the first images of a data set."""
    return Subset(data, range(min(amount, len(data))))


def last(data: Any, amount: int) -> Subset:
    """Take the last images of a data set."""
    return Subset(data, range(max(len(data) - amount, 0), len(data)))
