"""Sample many images from a class-conditional or unconditional prior.

python scripts/sample_fast.py -r logs/<run> -n 10 --classes 3,7
python scripts/sample_fast.py -r logs/<run> -n 50000 -k 250 -t 1.0 -p 0.92

Saves to <outdir>/samples/top_k_<k>_temp_<t>_top_p_<p>/<step>/, in a folder for each class. An image
depends on the seed, its class and its number alone.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from taming.models.prior import Prior
from taming.models.sampling import numbers_of, sample_images
from taming.modules.transformer.generate import SamplingParams, generators_of
from taming.pictures import save_picture
from taming.run.cli import choose_device, parse_classes, parse_run, run, run_parser

logger = logging.getLogger("taming.sample_fast")


def build_parser() -> argparse.ArgumentParser:
    """Declare the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("-o", "--outdir", type=Path, help="default: the run's folder")
    parser.add_argument(
        "-n", "--num_samples", type=int, default=50000, help="for each class, if any"
    )
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument(
        "-k", "--top_k", type=int, default=250, help="sample among the k likeliest tokens"
    )
    parser.add_argument("-t", "--temperature", type=float, default=1.0)
    parser.add_argument(
        "-p", "--top_p", type=float, default=1.0, help="sample among the likeliest of this mass"
    )
    parser.add_argument(
        "--classes", default="imagenet", help="labels such as 3,7; imagenet means all 1000"
    )
    parser.add_argument("-s", "--seed", type=int, default=23)
    return parser


def folders_of(model: Prior, classes: str) -> dict[int, str]:
    """Return the folder of the samples of each condition, by its token."""
    if model.be_unconditional:
        if classes != "imagenet":
            raise ValueError(f"--classes {classes}: the prior is unconditional")
        return {model.sos_token: ""}
    if model.cond_stage_model is model.first_stage_model:
        raise ValueError("the prior is of one level of a VQ-VAE-2: use scripts/sample_hierarchy.py")
    if model.n_classes is None:
        raise ValueError(
            f"the condition is what a {type(model.cond_stage_model).__name__} takes, not a class: "
            "use scripts/make_samples.py"
        )
    return {label: str(label) for label in parse_classes(classes, model.n_classes)}


def main() -> None:
    """Sample the images of one class after the other."""
    options, saved = parse_run(build_parser())
    if options.num_samples < 1 or options.batch_size < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    device = choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    model = saved.model().to(device)
    if not isinstance(model, Prior):
        raise ValueError(f"{options.resume} holds a {type(model).__name__}, not a prior")
    filters = SamplingParams(options.temperature, options.top_k, options.top_p)
    name = f"top_k_{options.top_k}_temp_{options.temperature:.2f}_top_p_{options.top_p}"
    target = (options.outdir or saved.folder) / "samples" / name / str(saved.step())

    for token, folder in tqdm(folders_of(model, options.classes).items(), desc="classes"):
        numbers = torch.arange(options.num_samples)
        for part in tqdm(numbers.split(options.batch_size), desc="batches", leave=False):
            condition = torch.full((len(part), 1), token, device=device)
            generators = generators_of(options.seed, numbers_of(token, part.tolist()))
            params = filters._replace(generators=generators)
            images = model.show(sample_images(model, condition, params))
            for number, image in zip(part.tolist(), images, strict=True):
                save_picture(image, target / folder / f"{number:06}.png")
    logger.info("pictures in %s", target)


if __name__ == "__main__":
    run(main)
