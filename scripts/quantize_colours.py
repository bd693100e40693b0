"""Reduce the colours of an image by k-means: the simplest vector quantizer.

python scripts/quantize_colours.py                      # a photograph of scikit-image
python scripts/quantize_colours.py photo.jpg -k 4 16 64

Each pixel is a vector of three channels and each colour of the palette is a code. A VQ-VAE with
moving averages alternates the same two steps, nearest code and mean, but a network computes its
vectors, so a code can represent more than a colour.

Axis letters: H W image, N pixels, K colours.
"""

from __future__ import annotations

import logging
import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from taming.run import cli

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("taming.quantize_colours")


class Painting(NamedTuple):
    """Palette (K, 3) in [-1, 1], and the palette index of each pixel, (H, W) int64."""

    palette: Tensor
    codes: Tensor

    def decode(self) -> Tensor:
        """Look up the colours: (3, H, W) in [-1, 1]."""
        return self.palette[self.codes].permute(2, 0, 1)


def quantize(image: Tensor, colours: int, iterations: int = 20) -> Painting:
    """Find a palette for an image and the nearest colour of each pixel.

    Args:
        image: (3, H, W) in [-1, 1].
        colours: K.
        iterations: Rounds of k-means, which starts from K random pixels.

    Raises:
        ValueError: ``colours`` is below 1 or exceeds the number of pixels.
    """
    import torch

    from taming.modules.vqvae.codebook import k_means
    from taming.modules.vqvae.nearest import nearest_codes

    pixels = image.permute(1, 2, 0).flatten(0, 1)  # (N, 3)
    if not 1 <= colours <= len(pixels):
        raise ValueError(f"the number of colours must be in 1..{len(pixels)}, got {colours}")
    palette = k_means(pixels, pixels[torch.randperm(len(pixels))[:colours]], iterations)
    return Painting(palette, nearest_codes(pixels, palette).view(image.shape[1:]))


def main() -> None:
    """Save the image beside its quantized versions; log the rate and PSNR of each."""
    parser = cli.script_parser(__doc__, device=False)
    default = files("skimage") / "data" / "coffee.png"
    parser.add_argument("image", nargs="?", default=str(default), type=cli.existing)
    parser.add_argument("-k", "--colours", nargs="+", type=int, default=[4, 16, 64], metavar="K")
    parser.add_argument("-o", "--output", default="results/colours.png", type=Path)
    parser.add_argument("--size", type=int, help="short side in pixels; default: unchanged")
    parser.add_argument("-s", "--seed", type=int, default=23)
    options = parser.parse_args()

    import torch

    from taming.pictures import load_image, psnr_of, save_picture, side_by_side

    torch.manual_seed(options.seed)
    image, shown = load_image(Path(options.image), options.size), []
    for colours in options.colours:
        shown.append(quantize(image, colours).decode())
        psnr = psnr_of(image, shown[-1])
        bits = math.log2(colours)
        logger.info("%4d colours: %.1f bits per pixel, PSNR %.1f dB", colours, bits, psnr)
    save_picture(side_by_side(image, *shown), options.output)
    logger.info("image | %s in %s", " | ".join(map(str, options.colours)), options.output)


if __name__ == "__main__":
    cli.run(main)
