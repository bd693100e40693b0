"""Sample many images from a class-conditional or unconditional prior.

python scripts/sample_fast.py -r logs/<run> -n 10 --classes 3,7
python scripts/sample_fast.py -r logs/<run> -n 50000 -k 250 -t 1.0 -p 0.92

Saves to <outdir>/samples/top_k_<k>_temp_<t>_top_p_<p>/<step>/, in a folder for each class. An image
depends on the seed, its class and its number alone.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tqdm import tqdm

from taming.run import cli

logger = logging.getLogger("taming.sample_fast")


def main() -> None:
    """Sample the images of one class after the other."""
    parser = cli.run_parser(__doc__)
    parser.add_argument("-o", "--outdir", type=Path, help="default: the run's folder")
    defaults = {"top_k": 250, "top_p": 1.0, "classes": "imagenet"}
    cli.add_sampling_arguments(parser, num_samples=50000, batch_size=25, **defaults)
    options, saved = cli.parse_run(parser)
    if min(options.num_samples, options.batch_size) < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    from taming.generator import Generator
    from taming.models.prior import Prior
    from taming.models.sampling import numbers_of
    from taming.pictures import save_picture

    device = cli.choose_device(options.device)
    model = cli.check_kind(saved.model(), Prior, options.resume, "a prior")
    generator = Generator(model, options.batch_size).to(device)
    default = model.be_unconditional and options.classes == "imagenet"
    labels = cli.labels_of(model, None if default else options.classes)
    params = {name: getattr(options, name) for name in ("seed", "temperature", "top_k", "top_p")}
    name = f"top_k_{options.top_k}_temp_{options.temperature:.2f}_top_p_{options.top_p}"
    target = (options.outdir or saved.folder) / "samples" / name / str(saved.step())

    for label in tqdm(labels or [None], desc="classes"):
        folder = target / ("" if label is None else str(label))
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(options.num_samples)
        for start in tqdm(numbers[:: options.batch_size], desc="batches", leave=False):
            part = numbers[start : start + options.batch_size]
            first = numbers_of(model.sos_token if label is None else label, part)[0]
            pictures = generator.sample(len(part), label, first=first, **params)
            for number, picture in zip(part, pictures, strict=True):
                save_picture(picture, folder / f"{number:06}.png")
    logger.info("pictures in %s", target)


if __name__ == "__main__":
    cli.run(main)
