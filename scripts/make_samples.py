"""Sample an image for every item of a data set, given its condition.

python scripts/make_samples.py -r logs/<run> --outdir results
python scripts/make_samples.py -r logs/<run> --outdir results --ignore_base_data \\
    data='{target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: \\
    taming.data.ade20k.Examples}}}'

Saves to <outdir>/<step>_<top k>_<temperature>/{originals,reconstructions,samples}. Images larger
than those that the prior was trained on are sampled through a sliding window.
"""

from __future__ import annotations

import logging

from tqdm import tqdm

from taming.run import cli

logger = logging.getLogger("taming.make_samples")


def main() -> None:
    """Sample one image after the other."""
    parser = cli.samples_parser(__doc__, seed=23)
    parser.add_argument("--split", help="train, validation or test; default: the first by alphabet")
    options, saved = cli.parse_run(parser)
    import lightning.pytorch as pl

    from taming.data.loader import is_stream
    from taming.data.utils import custom_collate
    from taming.models.cond_transformer import Net2NetTransformer
    from taming.models.sampling import condition_windows, sample_images
    from taming.modules.transformer.generate import SamplingParams, generators_of
    from taming.pictures import save_picture

    device = cli.choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    datasets = saved.data().datasets
    split = options.split or min(datasets)  # the original's choice
    if split not in datasets:
        raise ValueError(f"--split {split}: the data has only {', '.join(datasets)}")
    if is_stream(datasets[split]):
        raise ValueError(f"--split {split}: it is a stream, whose items have no numbers")
    model = cli.check_kind(saved.model(), Net2NetTransformer, options.resume, "a transformer prior")
    model.to(device)
    target = cli.samples_folder(options, saved)

    for number in tqdm(range(len(datasets[split])), desc=split):
        batch = custom_collate([datasets[split][number]])
        x, c = (part.to(device) for part in model.get_xc(batch))
        codes = model.encode_codes(x)
        grid = codes.shape[1], codes.shape[2]
        condition = condition_windows(model, c, grid)
        generators = generators_of(options.seed, [number])
        params = SamplingParams(options.temperature, options.top_k, generators=generators)
        pictures = {
            "originals": x,
            "reconstructions": model.decode_codes(codes),
            "samples": sample_images(model, condition, params, grid=grid),
        }
        for name, picture in pictures.items():
            save_picture(model.show(picture)[0], target / name / f"{number:06}.png")
    logger.info("pictures in %s", target)


if __name__ == "__main__":
    cli.run(main)
