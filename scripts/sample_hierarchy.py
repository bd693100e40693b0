"""Draw new images from the priors of all levels of a VQ-VAE-2, from the top down.

python scripts/sample_hierarchy.py -r logs/<top prior's run> logs/<bottom prior's run> -n 16
python scripts/sample_hierarchy.py -r logs/<top> logs/<bottom> --classes 3,7 --guidance 2

Classes are those of the top's prior. Guidance is that of the levels whose priors were trained with
condition_dropout; the condition of a lower level are the codes above it.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.level_prior import check_priors, sample_levels
from taming.models.pixelcnn import PixelCNNPrior
from taming.models.sampling import Prior
from taming.modules.transformer.generate import SamplingParams, generators_of
from taming.pictures import save_picture, tile
from taming.run.cli import check_folder, choose_device, labels_of, run, script_parser
from taming.run.folder import model_from_run

logger = logging.getLogger("taming.sample_hierarchy")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "-r", "--resume", nargs="+", required=True, help="runs of the priors, the top's first"
    )
    parser.add_argument("-o", "--outdir", default="results/samples", type=Path)
    parser.add_argument("-n", "--num_samples", type=int, default=16, help="for each class, if any")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("-t", "--temperature", type=float, default=1.0)
    parser.add_argument("-k", "--top_k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("-p", "--top_p", type=float, help="draw among the likeliest of this mass")
    parser.add_argument("--min_p", type=float, help="draw among those this likely, relatively")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1 for none"
    )
    parser.add_argument("--classes", help="labels, such as 3,7, if the top's prior takes them")
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
    check_folder(options.outdir)
    device = choose_device(options.device)
    priors = load_priors(options.resume, device)
    tokenizer: Any = priors[-1].first_stage_model
    labels = torch.tensor(labels_of(priors[0], options.classes, options.num_samples), device=device)
    filters = SamplingParams(
        options.temperature,
        options.top_k,
        options.top_p,
        min_p=options.min_p,
        guidance=options.guidance,
    )
    parts = []
    for part in tqdm(torch.arange(len(labels)).split(options.batch_size), desc="batches"):
        drawing = filters._replace(generators=generators_of(options.seed, part.tolist()))
        codes = sample_levels(priors, labels[part.to(device), None], drawing)
        parts.append(priors[-1].show(tokenizer.model.decode_code(codes)).cpu())
    images = torch.cat(parts)
    for number, (label, image) in enumerate(zip(labels.tolist(), images, strict=True)):
        suffix = "" if priors[0].be_unconditional else f"_class{label}"
        save_picture(image, options.outdir / f"{number:06}{suffix}.png")
    save_picture(tile(images, 8), options.outdir / "grid.png")
    logger.info("pictures in %s", options.outdir)


if __name__ == "__main__":
    run(main)
