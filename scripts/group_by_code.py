"""Show how a tokenizer with one code per image groups a data set.

python scripts/group_by_code.py -r logs/<run of vqvae_single_code.yaml>

Each row shows a code: its decoded image, then input images with this code. The rows are evenly
spaced from the most to the least frequent code.

Axis letters: N images, H W image, K codes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from taming.run import cli
from taming.run.folder import SavedRun

if TYPE_CHECKING:
    from torch import Tensor

    from taming.models.vqgan import VQModel

logger = logging.getLogger("taming.group_by_code")


def encode(model: VQModel, data: Any, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encode the first ``count`` validation images, or all if there are fewer.

    Returns:
        Images (N, 3, H, W) in [-1, 1], their codes (N,) and their classes (N,), if known.
    """
    import torch

    images, codes, classes = [], [], []
    for batch in tqdm(data.val_dataloader(), desc="images"):
        images.append(model.get_input(batch, model.image_key))
        codes.append(model.encode(images[-1].to(model.device)).info.indices.flatten().cpu())
        classes += [batch["class_label"]] if "class_label" in batch else []
        if sum(map(len, images)) >= count:
            break
    labels = torch.cat(classes)[:count] if classes else None
    return torch.cat(images)[:count], torch.cat(codes)[:count], labels


def purity(codes: Tensor, classes: Tensor) -> float:
    """Return the fraction of images (N,) whose class is the most common one of their code."""
    import torch

    table = torch.zeros(int(codes.max()) + 1, int(classes.max()) + 1)
    table.index_put_((codes, classes), torch.ones(len(codes)), accumulate=True)
    return float(table.max(dim=1).values.sum() / len(codes))


def rows_of(model: VQModel, images: Tensor, codes: Tensor, rows: int, columns: int) -> list[Tensor]:
    """Collect (1 + columns, 3, H, W) per code: its decoded image, then images with it or white."""
    import torch

    counts = torch.bincount(codes)
    used = counts.argsort(descending=True)[: int((counts > 0).sum())]
    pictures = []
    for code in used[torch.linspace(0, len(used) - 1, min(rows, len(used))).long()]:
        decoded = model.decode_code(code.view(1, 1, 1, 1).to(model.device)).cpu()
        own = images[codes == code][:columns]
        white = own.new_ones(columns - len(own), *own.shape[1:])
        pictures.append(torch.cat([decoded, own, white]))
    return pictures


def main() -> None:
    """Save the picture and log how pure the codes' classes are."""
    parser = cli.script_parser(__doc__)
    add, n_help = parser.add_argument, "number of validation images to encode"
    add("-r", "--resume", required=True, type=cli.existing_run, help="run of the tokenizer")
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add("-o", "--output", default="results/groups.png", type=Path)
    add("-n", "--num_images", type=int, default=2000, help=n_help)
    add("--rows", type=int, default=12, help="number of codes to show")
    add("--columns", type=int, default=12, help="number of images per code")
    options = parser.parse_args()
    if min(options.num_images, options.rows, options.columns) < 1:
        raise ValueError("--num_images, --rows and --columns must be at least 1")
    import torch

    from taming.models.vqgan import VQModel
    from taming.pictures import arrange, save_picture

    device = cli.choose_device(options.device)
    saved = SavedRun.load(options.resume, trust_config=options.trust_config)
    model = cli.check_kind(saved.model(), VQModel, options.resume, "a tokenizer")
    model.to(device).requires_grad_(False)
    most = model.grid[0] * model.grid[1] * model.quantize.sequence.max_loops
    if most != 1:
        raise ValueError(
            f"the tokenizer of {options.resume} has up to {most} codes per image instead of one; "
            "train one with configs/vqvae_single_code.yaml"
        )
    images, codes, classes = encode(model, saved.validation(), options.num_images)
    rows = rows_of(model, images, codes, options.rows, options.columns)
    save_picture(arrange(torch.cat(rows), options.columns + 1), options.output)
    logger.info("%d images, %d codes", len(codes), len(codes.unique()))
    if classes is not None:
        own, random = purity(codes, classes), purity(codes[torch.randperm(len(codes))], classes)
        message = "share of images in the most common class of their code: %.2f (random: %.2f)"
        logger.info(message, own, random)
    logger.info("saved %s", options.output)


if __name__ == "__main__":
    cli.run(main)
