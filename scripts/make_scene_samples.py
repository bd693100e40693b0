"""Sample images of scenes, given a layout of objects.

python scripts/make_scene_samples.py -r logs/<run> --outdir results
python scripts/make_scene_samples.py -r logs/<run> --outdir results -R 512,384 -N 8

Saves <outdir>/<step>_<top k>_<temperature>/<batch>_<item>.png: samples, and the layout. Images
larger than those that the prior was trained on are sampled through a sliding window, with the
layout as seen in each window. A sample depends on the seed, its own number and its layout's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from taming.run import cli

if TYPE_CHECKING:
    from torch import Tensor

    from taming.data.conditional_builder.builder import ObjectsConditionalBuilder
    from taming.data.helper_types import Annotation
    from taming.models.cond_transformer import Grid, Net2NetTransformer
    from taming.models.sampling import Condition, Window

logger = logging.getLogger("taming.make_scene_samples")


def grid_of(model: Net2NetTransformer, resolution: str) -> Grid:
    """Return rows and columns of sites for a resolution, at least those trained on."""
    sides = resolution.split(",")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--resolution expects height,width such as 256,256, got {resolution!r}")
    factor = model.first_stage_model.factor
    rows, columns = (round(int(side) / factor) for side in sides)
    height, width = model.grid
    return max(rows, height), max(columns, width)


def layout_windows(
    builder: ObjectsConditionalBuilder[Any],
    annotations: Sequence[Annotation],
    grid: Grid,
    like: Tensor,
) -> Condition:
    """Return the layout's tokens (B, L) in a window, for samples ``like`` (B, ...)."""

    def tokens(window: Window) -> Tensor:
        (h, w), (top, left, height, width) = grid, window
        crop = (left / w, top / h, width / w, height / h)
        return builder.build(annotations, crop).to(like.device).repeat(len(like), 1)

    return tokens


def builder_of(scenes: Any, name: str) -> ObjectsConditionalBuilder[Any]:
    """Return the builder of layouts of a name; refuse data that has none."""
    from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset

    if not isinstance(scenes, AnnotatedObjectsDataset):
        raise ValueError(
            "layouts come from data.params.validation, which is not a set of annotated objects"
        )
    if name not in scenes.conditional_builders:
        known = ", ".join(scenes.conditional_builders)
        raise ValueError(f"--conditional {name}: the data has {known}")
    return scenes.conditional_builders[name]


def main() -> None:
    """Sample images for one layout after the other."""
    parser = cli.samples_parser(__doc__, seed=42424242)
    add, kinds = parser.add_argument, "objects_bbox or objects_center_points"
    add("-R", "--resolution", default="256,256", help="height,width of the images in pixels")
    add("-C", "--conditional", default="objects_bbox", help=kinds)
    add("-N", "--n_samples_per_layout", type=int, default=4)
    options, saved = cli.parse_run(parser)
    import lightning.pytorch as pl
    import torch

    from taming.models.cond_transformer import Net2NetTransformer
    from taming.models.sampling import numbers_of, sample_images
    from taming.modules.transformer.generate import SamplingParams, generators_of
    from taming.pictures import arrange, save_picture

    device = cli.choose_device(options.device)
    pl.seed_everything(options.seed, verbose=False)
    data = saved.data()
    scenes: Any = data.datasets.get("validation")
    builder = builder_of(scenes, options.conditional)
    model = cli.check_kind(saved.model(), Net2NetTransformer, options.resume, "a transformer prior")
    model.to(device)
    grid = grid_of(model, options.resolution)
    target, samples = cli.samples_folder(options, saved), range(options.n_samples_per_layout)
    layouts = count()

    for batch_number, batch in enumerate(tqdm(data.val_dataloader(), desc="batches")):
        for number, objects in enumerate(tqdm(batch["annotations"], desc="layouts", leave=False)):
            annotations = [
                o._replace(category_no=scenes.get_category_number(o.category_id)) for o in objects
            ]
            codes = model.empty_codes(len(samples), grid)
            generators = generators_of(options.seed, numbers_of(next(layouts), samples))
            params = SamplingParams(options.temperature, options.top_k, generators=generators)
            torch.manual_seed(options.seed)  # a builder puts objects in random order
            windows = layout_windows(builder, annotations, grid, codes)
            images = model.show(sample_images(model, windows, params, codes=codes)).cpu()
            size = images.shape[3], images.shape[2]
            label = scenes.get_textual_label_for_category_no
            layout = builder.plot(builder.build(annotations), label, size)
            row = arrange(torch.cat([images, layout[None]]), len(images) + 1)
            save_picture(row, target / f"{batch_number:04}_{number:02}.png")
    logger.info("pictures in %s", target)


if __name__ == "__main__":
    cli.run(main)
