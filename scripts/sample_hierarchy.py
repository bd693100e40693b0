"""Draw new images from the priors of all levels of a VQ-VAE-2, from the top down.

python scripts/sample_hierarchy.py -r logs/<top prior's run> logs/<bottom prior's run> -n 16

All levels are drawn in the same way, so there is no guidance: the top has no condition to guide it.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from taming.experiment import model_from_run
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.level_prior import check_priors, sample_levels
from taming.models.pixelcnn import PixelCNNPrior
from taming.models.sampling import Prior
from taming.modules.transformer.sampling import Drawing, generators_of
from taming.pictures import save_picture, tile
from taming.script import choose_device, run, script_parser

logger = logging.getLogger("taming.sample_hierarchy")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "-r", "--resume", nargs="+", required=True, help="runs of the priors, the top's first"
    )
    parser.add_argument("-o", "--outdir", default="results/samples", type=Path)
    parser.add_argument("-n", "--num_samples", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("-t", "--temperature", type=float, default=1.0)
    parser.add_argument("-k", "--top_k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("-p", "--top_p", type=float, help="draw among the likeliest of this mass")
    parser.add_argument("--min_p", type=float, help="draw among those this likely, relatively")
    parser.add_argument("-s", "--seed", type=int, default=23)
    options = parser.parse_args()
    if options.num_samples < 1 or options.batch_size < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    return options


def load_priors(runs: list[str], device: torch.device) -> list[Prior]:
    """Load the priors, and check that they belong together."""
    priors: list[Any] = [model_from_run(name) for name in runs]
    for name, prior in zip(runs, priors, strict=True):
        if not isinstance(prior, Net2NetTransformer | PixelCNNPrior):
            raise ValueError(f"{name} holds a {type(prior).__name__}, not a prior of one level")
    check_priors(priors)
    return [prior.to(device) for prior in priors]


def main() -> None:
    """Write new images, one file each, and a grid of all."""
    options = parse_options()
    device = choose_device(options.device)
    priors = load_priors(options.resume, device)
    tokenizer: Any = priors[-1].first_stage_model
    filters = Drawing(options.temperature, options.top_k, options.top_p, min_p=options.min_p)
    parts = []
    for part in tqdm(torch.arange(options.num_samples).split(options.batch_size), desc="batches"):
        drawing = filters._replace(generators=generators_of(options.seed, part.tolist()))
        parts.append(tokenizer.model.decode_code(sample_levels(priors, len(part), drawing)).cpu())
    images = torch.cat(parts)
    for number, image in enumerate(images):
        save_picture(image, options.outdir / f"{number:06}.png")
    save_picture(tile(images, 8), options.outdir / "grid.png")
    logger.info("pictures in %s", options.outdir)


if __name__ == "__main__":
    run(main)
