"""Segment images into the 182 classes of COCO-Stuff with DeepLab.

python scripts/extract_segmentation.py data/sflckr_segmentations
python scripts/extract_segmentation.py my/segmentations --images my/images

Saves <dest>/<name>.png with a class from 0 to 181 per pixel. The weights come from
https://github.com/kazuto1011/deeplab-pytorch/releases/tag/v1.0
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from taming.downloads import load_network
from taming.run import cli

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

logger = logging.getLogger("taming.extract_segmentation")

N_LABELS = 182
MEAN = (104.008, 116.669, 122.675)  # blue, green, red
WEIGHTS = "downloads/deeplabv2_resnet101_msc-cocostuff164k-100000.pth"


def images_of(options: argparse.Namespace) -> dict[Path, Path]:
    """List the images to segment: path of an image -> path of its segmentation."""
    from taming.data.custom import find_files
    from taming.data.roots import data_root, read_list

    root = data_root(options.root)
    folder = (options.images or root / f"{options.prefix}_images").expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder of the images")
    if options.images:
        names = [path.relative_to(folder) for path in find_files([str(folder)])]
    else:
        names = list(map(Path, read_list(root / f"{options.prefix}_examples.txt")))
    return {folder / name: options.dest / name.with_suffix(".png") for name in names}


def load_segmenter(options: argparse.Namespace) -> nn.Module:
    """Load DeepLab and its weights."""
    from taming.checkpoint import load_checkpoint

    if not options.weights.is_file():
        raise FileNotFoundError(
            f"the weights {options.weights} do not exist: get them from https://github.com/"
            f"kazuto1011/deeplab-pytorch/releases/download/v1.0/{Path(WEIGHTS).name}"
        )
    network = load_network(options.hub, "deeplabv2_resnet101", n_classes=N_LABELS)
    network.load_state_dict(load_checkpoint(options.weights))
    return network.eval()


def segment(network: nn.Module, image: Tensor) -> np.ndarray:
    """Predict the class of each pixel of an image (3, H, W) uint8; returns (H, W) uint8."""
    import torch
    import torch.nn.functional as F

    x = image.flip(0) - torch.tensor(MEAN, device=image.device)[:, None, None]  # RGB to BGR
    with torch.no_grad():
        scores = network(x[None])
    scores = F.interpolate(scores, image.shape[1:], mode="bilinear", align_corners=True)
    return scores[0].argmax(dim=0).to(torch.uint8).cpu().numpy()


def main() -> None:
    """Save a segmentation of every image; warn of images that cannot be read and skip them."""
    parser = cli.script_parser(__doc__)
    add, hub = parser.add_argument, "kazuto1011/deeplab-pytorch"
    add("dest", type=Path, help="folder of the segmentations")
    add("prefix", nargs="?", default="sflckr", help="data set whose examples to segment")
    add("--images", type=Path, help="folder of images to segment instead")
    add("--root", help="folder of the data sets; default: TAMING_DATA, or data")
    add("--weights", type=Path, default=WEIGHTS, help=f"default: {WEIGHTS}")
    add("--hub", default=hub, help="torch hub repository, or a local copy of it")
    options = parser.parse_args()
    from PIL import Image

    from taming.data.preprocessing import error_context, refuse_failed, skipping
    from taming.decoding import decode_image
    from taming.pictures import save_picture

    device = cli.choose_device(options.device)
    paths = images_of(options)
    if clash := {path.resolve() for path in paths} & {path.resolve() for path in paths.values()}:
        raise ValueError(f"{min(clash)} would be overwritten by its map; choose another folder")
    if len({*paths.values()}) < len(paths):
        raise ValueError("images whose names differ only in the extension would share a map")
    network = load_segmenter(options).to(device)
    failed: list[str] = []
    for path, target in tqdm(paths.items(), desc="images"):
        with skipping(failed), error_context(f"image {path}"):
            image = decode_image(path, upright=False)  # as the data sets do
            save_picture(Image.fromarray(segment(network, image.to(device))), target)
    done = len(paths) - len(failed)
    logger.info("%d of %d segmentations in %s", done, len(paths), options.dest)
    refuse_failed(failed, len(paths))


if __name__ == "__main__":
    cli.run(main)
