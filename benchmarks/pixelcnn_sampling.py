"""Time the PixelCNN's sampling with and without its cache.

python benchmarks/pixelcnn_sampling.py --grid 8 16

Compares three ways to sample the same codes, by default at the sizes of
configs/pixelcnn_cifar10.yaml: the whole grid for each site; only the rows down to the site's own;
and `PixelCNN.sample`, which goes over each row and each site once.

Axis letters: B images, h w grid, T turns, V values.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from taming.modules.pixelcnn.model import PixelCNN
from taming.modules.pixelcnn.site import SiteSymbols
from taming.modules.pixelcnn.stacks import GatedStacks
from taming.run.cli import choose_device, run, script_parser

logger = logging.getLogger("taming.pixelcnn_sampling")

Sampler = Callable[[PixelCNN, Tensor, Tensor], Tensor]


def sample_symbol(logits: Tensor) -> Tensor:
    """Sample symbols (B,) from logits (B, V)."""
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1)


@torch.no_grad()
def sample_anew(net: PixelCNN, codes: Tensor, labels: Tensor, crop: bool = False) -> Tensor:
    """Sample codes (B, h, w, T), running the stacks anew for each site.

    Args:
        net: The network.
        codes: Give the shape; overwritten.
        labels: (B,) classes.
        crop: Leave out the rows below the site's own.
    """
    codes[..., :1], codes[..., 1:] = 0, -1
    _, h, w, _ = codes.shape
    for row in range(h):
        rows = row + 1 if crop else h
        for column in range(w):
            embedded = net.embed(net.site.of_codes(codes[:, :rows])).permute(0, 3, 1, 2)
            context = net.stacks(embedded, net.classes(labels))[:, :, row, column]
            symbols = labels.new_empty(len(labels), 0)
            for _ in net.site.sizes:
                symbols = torch.cat(
                    [symbols, sample_symbol(net.head(context, symbols))[:, None]], dim=1
                )
            codes[:, row, column] = net.site.to_codes(symbols)
    return codes


SAMPLERS: dict[str, Sampler] = {
    "whole grid": sample_anew,
    "cropped": partial(sample_anew, crop=True),
    "kept": lambda net, codes, labels: net.sample(codes, labels, sample_symbol),
}


def measure(
    net: PixelCNN, shape: tuple[int, ...], device: torch.device, repeats: int
) -> dict[str, float]:
    """Time each way of sampling codes of a shape (B, h, w, T).

    Returns:
        Name of a way -> median seconds of ``repeats`` rounds, after one warm-up round. A round
        runs all ways in turn.
    """
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for _ in range(1 + repeats):
        for name, sample in SAMPLERS.items():
            codes = torch.empty(shape, dtype=torch.int64, device=device)
            start = time.perf_counter()
            sample(net, codes, labels).cpu()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    """Print median seconds and ratios as a table."""
    parser = script_parser(__doc__)
    parser.add_argument("--grid", nargs="+", type=int, default=[8, 16], help="sides in sites")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds for the median")
    options = parser.parse_args()
    device = choose_device(options.device)
    site = SiteSymbols(n_e=256, max_loops=6, dummies=False)
    net = PixelCNN(site, 10, GatedStacks(options.channels, options.layers)).to(device).eval()
    logger.info("grid     %s", "  ".join(f"{name:>12}" for name in SAMPLERS))
    for side in options.grid:
        shape = (options.batch, side, side, site.max_loops)
        seconds = measure(net, shape, device, options.repeats)
        cells = [f"{s:6.2f} s {s / seconds['kept']:3.0f}x" for s in seconds.values()]
        logger.info("%-8s %s", f"{side}x{side}", "  ".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    run(main)
