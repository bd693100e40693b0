"""Draw how a latent goes round the loop, in a plane of twelve codes.

python benchmarks/figures.py docs/images/loop.png

Left, `Attract`: steps toward the nearest code until it is within the threshold. Right, `Residual`:
codes are added, each turn on a smaller scale, until their sum is within the threshold of z.
"""

from __future__ import annotations

import argparse

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from taming.modules.vqvae.codebook import k_means
from taming.modules.vqvae.rate import turns_within
from taming.modules.vqvae.transforms import Residual

STEP, MAX_LOOPS = 0.5, 6


def scene() -> tuple[Tensor, Tensor]:
    """Twelve codes fitted to a plane of latents, and one latent; (12, 2) and (1, 2)."""
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2000, 2, generator=generator)
    return k_means(latents, latents[:12], iterations=30), torch.tensor([[1.05, 0.9]])


def draw_frame(axis: Axes, codebook: Tensor, z: Tensor, center: Tensor, tau: float) -> None:
    """Draw the codes, the latent, and the circle in which the loop ends."""
    axis.scatter(*codebook.T, color="0.6", s=18, label="codes")
    axis.scatter(*z.T, color="tab:red", marker="*", s=130, zorder=4, label="latent z")
    middle = (float(center[0]), float(center[1]))
    axis.add_patch(plt.Circle(middle, tau, fill=False, linestyle=":", color="tab:red"))
    axis.set_aspect("equal")
    axis.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))


def draw_attract(axis: Axes, codebook: Tensor, z: Tensor, tau: float) -> None:
    """Steps r <- r + step (e_k - r); the circle is around the code."""
    code = codebook[(codebook - z).norm(dim=1).argmin()]
    points = [z[0]]
    while (points[-1] - code).norm() > tau:
        points.append(torch.lerp(points[-1], code, STEP))
    draw_frame(axis, codebook, z, code, tau)
    axis.plot(*torch.stack(points).T, "o-", color="tab:blue", markersize=4, linewidth=1.2)
    dummies = ",".join(["D"] * (len(points) - 1) + ["A'"])
    axis.set_title(f"Attract: {dummies} decodes to the code", fontsize=10)


def draw_residual(axis: Axes, codebook: Tensor, z: Tensor, tau: float) -> None:
    """Sums e_1, e_1 + s_0 e_2, ...; the circle is around the latent."""
    residual = Residual(MAX_LOOPS)
    residual.scales.copy_(0.45 ** torch.arange(MAX_LOOPS))
    path = residual.walk(z, codebook, torch.zeros(1), MAX_LOOPS)
    length = turns_within(path.distances, torch.tensor([tau]))
    searches = residual.retrace(z, path.end_at(length), codebook)
    draw_frame(axis, codebook, z, z[0], tau)
    sums = torch.cat([torch.zeros(1, 2), searches.approximations])
    axis.plot(*sums.T, "o-", color="tab:blue", markersize=4, linewidth=1.2)
    codes = ",".join(f"A{turn + 1}" for turn in range(int(length)))
    axis.set_title(f"Residual: {codes} decodes to the end of the path", fontsize=10)


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", help="picture to write")
    options = parser.parse_args()
    matplotlib.use("agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6))
    codebook, z = scene()
    draw_attract(left, codebook, z, tau=0.12)
    draw_residual(right, codebook, z, tau=0.12)
    left.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(options.file, dpi=110)


if __name__ == "__main__":
    main()
