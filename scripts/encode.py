"""Compute the tokens of a data set once, so that priors need neither images nor tokenizer time.

python scripts/encode.py -r logs/<run of the tokenizer> -o cache
python scripts/encode.py -r logs/<run> -o cache --passes 4 data.params.batch_size=64
python scripts/encode.py -r logs/<run> -o cache --splits validation

Encodes the data of the tokenizer's run, unless -b or key=value items set others, into
<outdir>/train and <outdir>/validation for taming.data.tokens.TokenCache. Numbers, vectors of
numbers and texts of each image are kept, such as its class or layout; images and maps are not. With
random crops or flips, several passes keep some of their variety. ``image_number`` is an image's
index in the data set, and ``pass_number`` its pass, from 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from taming.run import cli

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from taming.models.vqgan import VQModel

logger = logging.getLogger("taming.encode")


def columns_of(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Collect a batch's numbers, vectors of numbers and texts, one per image.

    Raises:
        ValueError: The batch has a key that `encode` adds.
    """
    from torch import Tensor

    if taken := {"image_number", "pass_number"} & batch.keys():
        raise ValueError(f"a token cache has its own {min(taken)}: rename the data set's")
    columns = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim in (1, 2):
            columns[key] = value.tolist()
        elif isinstance(value, list) and all(isinstance(text, str) for text in value):
            columns[key] = value
    return columns


def encode(model: VQModel, loader: DataLoader[Any], folder: Path, passes: int) -> None:
    """Save the tokens of a data set.

    Raises:
        ValueError: Images differ in size, or the folder is not free.
    """
    from taming.data.tokens import CacheInfo, TokenCacheWriter

    sequence, own = model.quantize.sequence, model.fingerprint()
    writer = None
    for number in range(passes):
        first = 0
        for batch in tqdm(loader, desc=folder.name):
            x = model.get_input(batch, model.image_key).to(model.device)
            codes = model.encode_to_codes(x)  # (B, h, w, T)
            grid = [*codes.shape[1:3]]
            about = CacheInfo(own, grid, x.shape[2] * x.shape[3])
            columns = columns_of(batch)
            columns["image_number"] = list(range(first, first + len(x)))
            columns["pass_number"] = [number] * len(x)
            if writer is None:
                writer = TokenCacheWriter(folder, about, sequence.vocab_size)
                if left := [key for key in batch if key not in (*columns, model.image_key)]:
                    logger.info("not a number, vector or text, left out: %s", ", ".join(left))
            if about != writer.info:
                raise ValueError(
                    f"images differ in size: {grid} sites after images of {writer.info.grid}"
                )
            writer.add(sequence.encode(codes)[0], columns)
            first += len(x)
    if writer is not None:
        writer.close()


def main() -> None:
    """Encode all chosen splits."""
    parser = cli.run_parser(__doc__)
    parser.add_argument("-o", "--outdir", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", help="splits of the data; default: all")
    parser.add_argument("--passes", type=int, default=1, help="passes over the training set")
    parser.add_argument("-s", "--seed", type=int, default=23, help="seed of random crops")
    options, saved = cli.parse_run(parser)
    if options.passes < 1:
        raise ValueError("--passes must be at least 1")
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from taming.data.tokens import free_for_cache
    from taming.data.utils import custom_collate
    from taming.models.vqgan import VQModel

    device = cli.choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    model, data = saved.model().to(device), saved.data()
    if not isinstance(model, VQModel) or len(model.levels) > 1:
        raise ValueError(f"{options.resume} holds a {type(model).__name__}, not a VQModel")
    splits = options.splits or list(data.datasets)
    for split in splits:
        if split not in data.datasets:
            raise ValueError(
                f"--splits: unknown split {split!r}, expected {', '.join(data.datasets)}"
            )
        free_for_cache(options.outdir / split)
    for split in splits:
        images = data.datasets[split]
        loader = DataLoader(
            images, data.batch_size, num_workers=data.num_workers, collate_fn=custom_collate
        )
        with torch.no_grad():
            passes = options.passes if split == "train" else 1
            encode(model, loader, options.outdir / split, passes)
    logger.info("tokens in %s", options.outdir)


if __name__ == "__main__":
    cli.run(main)
