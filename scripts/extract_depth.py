"""Estimate depth maps of ImageNet with MiDaS, for data sets and configurations with depth.

python scripts/extract_depth.py
python scripts/extract_depth.py --root /data --outdir /data/imagenet_depth --splits val

Saves <outdir>/{val,train}/<synset>/<name>.png: float32 stored as the bytes of an RGBA image.
Existing maps are skipped. The maps take more disk space than ImageNet itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from taming.downloads import load_network
from taming.run import cli
from taming.util import get_obj_from_str

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

logger = logging.getLogger("taming.extract_depth")

_DATA = "taming.data.imagenet.ImageNet"
SPLITS = {"val": f"{_DATA}Validation", "train": f"{_DATA}Train"}


def estimate_depth(
    network: nn.Module, prepare: Callable[[np.ndarray], Tensor], image: np.ndarray
) -> np.ndarray:
    """Estimate the inverse depth (H, W) float32 of an image (H, W, 3) in [-1, 1]."""
    import torch
    import torch.nn.functional as F

    device = next(network.parameters()).device
    with torch.no_grad():
        depth = network(prepare((image + 1) * 127.5).to(device))
    depth = F.interpolate(depth[:, None], image.shape[:2], mode="bicubic", align_corners=False)
    return depth[0, 0].float().cpu().numpy()


def save_depth(depth: np.ndarray, path: Path) -> None:
    """Save (H, W) float32 as the bytes of an RGBA image; missing folders are created."""
    import numpy as np
    from PIL import Image

    from taming.pictures import save_picture

    save_picture(
        Image.fromarray(np.ascontiguousarray(depth[..., None], "<f4").view(np.uint8)), path
    )


def main() -> None:
    """Save a map for every image without one; name images that cannot be read, and go on."""
    parser = cli.script_parser(__doc__)
    add, hub = parser.add_argument, "intel-isl/MiDaS"
    add("-o", "--outdir", type=Path, help="default: imagenet_depth in the data root")
    add("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    add("--root", help="folder that contains ImageNet; default: TAMING_DATA")
    add("--hub", default=hub, help="torch hub repository, or a local copy of it")
    options = parser.parse_args()
    from taming.data.preprocessing import error_context, refuse_failed, skipping, to_unit_range
    from taming.data.roots import data_root
    from taming.decoding import decode_image

    device = cli.choose_device(options.device)
    outdir = options.outdir or data_root(options.root) / "imagenet_depth"
    config = {"root": options.root}
    datasets = {split: get_obj_from_str(SPLITS[split])(config) for split in options.splits}
    network = load_network(options.hub, "MiDaS").eval().to(device)
    prepare = load_network(options.hub, "transforms").default_transform
    failed: list[str] = []
    total = 0
    for split, dataset in datasets.items():
        names = dataset.labels["relpath"]
        paths = [(outdir / split / name).with_suffix(".png") for name in names]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        total += len(missing)
        for number in tqdm(missing, desc=split):
            file = dataset.labels["file_path_"][number]
            with skipping(failed), error_context(f"image {file}"):
                image = to_unit_range(decode_image(file, upright=False))  # as the data sets do
                save_depth(estimate_depth(network, prepare, image), paths[number])
    logger.info("depth maps in %s", outdir)
    refuse_failed(failed, total)


if __name__ == "__main__":
    cli.run(main)
