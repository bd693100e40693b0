"""Time a prior's epoch from images and from cached tokens.

python scripts/encode.py -r logs/<run of the tokenizer> -o cache
python benchmarks/token_cache.py -r logs/<run of the prior> --cache cache/train

Prints milliseconds per image until its tokens are available, and for a whole training step with
the optimizer, at the batch size and number of loader processes of the prior's run. The speed-up of
an epoch depends on the transformer's share of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from race.classifier import endless
from torch.utils.data import DataLoader
from tqdm import tqdm

from taming.data.tokens import TokenCache
from taming.data.utils import custom_collate
from taming.models.prior import Prior, is_cached
from taming.run.cli import choose_device, run, script_parser
from taming.run.folder import data_from_run, model_from_run

logger = logging.getLogger("taming.benchmark")
Work = Callable[[Mapping[str, Any]], None]  # on a batch


def seconds_per_image(loader: DataLoader[Any], batches: int, work: Work) -> float:
    """Measure the time per image, loading included.

    The first batch and the batches prefetched meanwhile are not timed. Epochs follow each other,
    as in training.

    Args:
        loader: Batches.
        batches: Number of batches to time.
        work: Called with each batch.
    """
    unmeasured = 1 + loader.num_workers * (loader.prefetch_factor or 0)
    images, start = 0, 0.0
    rounds = tqdm(range(unmeasured + batches), leave=False)
    for number, batch in zip(rounds, endless(loader), strict=False):
        work(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number + 1 == unmeasured:
            start = time.monotonic()
        elif number >= unmeasured:
            images += len(next(iter(batch.values())))
    return (time.monotonic() - start) / images


def training_step_of(model: Prior) -> Work:
    """Return a function that trains a prior on a batch as Lightning does, without the schedule."""
    configured: Any = model.configure_optimizers()
    optimizer = configured[0][0] if isinstance(configured, tuple) else configured

    def step(batch: Mapping[str, Any]) -> None:
        batch = move_data_to_device(batch, model.device)
        nats, lengths = model.measure_nats(model.tokenize_batch(batch))
        optimizer.zero_grad()
        (nats.sum() / lengths.sum()).backward()
        optimizer.step()

    return step


def main() -> None:
    """Time both data sets and print the results."""
    parser = script_parser(__doc__)
    parser.add_argument("-r", "--resume", required=True, help="run of the prior")
    parser.add_argument("--cache", required=True, help="token cache of its training images")
    parser.add_argument("--batches", type=int, default=50, help="number of batches to time")
    options = parser.parse_args()
    data, model = data_from_run(options.resume), model_from_run(options.resume)
    data.setup("fit")
    if not isinstance(model, Prior):
        raise ValueError(f"{options.resume} holds a {type(model).__name__}, not a prior")
    if is_cached(data.datasets["train"][0]):
        raise ValueError(f"{options.resume} was trained from a token cache, not from images")
    model = model.to(choose_device(options.device)).train()

    def tokenize(batch: Mapping[str, Any]) -> None:
        model.tokenize_batch(move_data_to_device(batch, model.device))

    cached = TokenCache(options.cache)
    loaders = [
        DataLoader(
            dataset,
            data.batch_size,
            shuffle=True,
            num_workers=data.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=custom_collate,
        )
        for dataset in (data.datasets["train"], cached)
    ]
    for title, work in (
        ("until the tokens are available", tokenize),
        ("for a training step", training_step_of(model)),
    ):
        images, tokens = (seconds_per_image(it, options.batches, work) for it in loaders)
        logger.info(
            "%s: %.2f ms per image from images, %.2f ms from tokens: %.1f times faster",
            *(title, 1000 * images, 1000 * tokens, images / tokens),
        )


if __name__ == "__main__":
    run(main)
