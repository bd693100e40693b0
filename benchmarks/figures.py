"""Draw the turns of a latent in the loop, in a plane of sixteen codes.

python benchmarks/figures.py docs/images/loop.png

`Attract` steps toward the nearest code until the latent is within the threshold of it. The others
add codes until their sum is within the threshold of z; crosses are the codes of the second turn,
scaled by a number (`Residual`) or mapped by a matrix (`LinearResidual`), around the first code.
"""

from __future__ import annotations

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from taming.modules.vqvae.codebook import k_means
from taming.modules.vqvae.loop import Cascade
from taming.modules.vqvae.rate import lengths_within
from taming.modules.vqvae.transforms import LinearResidual, Residual
from taming.run.cli import script_parser

STEP, MAX_LOOPS, TAU, SIDE = 0.5, 4, 0.1, 2.4


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Make a cloud of latents (N, 2), sixteen codes fitted to it (16, 2), and a latent (1, 2)."""
    generator = torch.Generator().manual_seed(4)
    shape = torch.tensor([[0.9, 0.5], [-0.1, 0.35]])
    latents = torch.randn(2000, 2, generator=generator) @ shape
    return latents, k_means(latents, latents[:16], iterations=30), torch.tensor([[0.95, 0.3]])


def draw_frame(axis: Axes, latents: Tensor, codebook: Tensor, z: Tensor, center: Tensor) -> None:
    """Draw the latents, the codes, the one latent, and the circle in which the loop ends."""
    axis.scatter(*latents.T, color="0.9", s=3)
    axis.scatter(*codebook.T, color="0.4", s=20, label="codes")
    axis.scatter(*z.T, color="tab:red", marker="*", s=120, zorder=4, label="latent z")
    middle = (float(center[0]), float(center[1]))
    axis.add_patch(plt.Circle(middle, TAU, fill=False, linestyle=":", color="tab:red", zorder=5))
    axis.set_aspect("equal")
    axis.set(xticks=[], yticks=[], xlim=(-SIDE, SIDE), ylim=(-SIDE / 1.5, SIDE / 1.5))


def draw_attract(axis: Axes, latents: Tensor, codebook: Tensor, z: Tensor) -> None:
    """Draw the turns r <- r + step (e_k - r); the circle is around the code."""
    code = codebook[(codebook - z).norm(dim=1).argmin()]
    points = [z[0]]
    while (points[-1] - code).norm() > TAU:
        points.append(torch.lerp(points[-1], code, STEP))
    draw_frame(axis, latents, codebook, z, code)
    axis.plot(*torch.stack(points).T, "o-", color="tab:blue", markersize=4, linewidth=1.2)
    axis.set_title("Attract: " + ",".join(["D"] * (len(points) - 1) + ["A'"]), fontsize=10)


def draw_cascade(
    axis: Axes, latents: Tensor, codebook: Tensor, z: Tensor, transform: Cascade
) -> None:
    """Fit a transform to the latents and draw its sums of codes; the circle is around z."""
    everywhere = torch.zeros(len(latents))
    for step in range(MAX_LOOPS + 100):
        codes = transform.search(latents, codebook, everywhere, MAX_LOOPS).codes[:, -1]
        searches = transform.retrace(latents, codes, codebook)
        update = transform.initialize if step < MAX_LOOPS else transform.learn
        update(latents, searches, codebook)
    path = transform.search(z, codebook, torch.zeros(1), MAX_LOOPS)
    length = lengths_within(path.distances, torch.tensor([TAU]))
    searches = transform.retrace(z, path.end_at(length), codebook)
    draw_frame(axis, latents, codebook, z, z[0])
    seen = searches.approximations[0] + transform.project(codebook, 1)
    axis.scatter(*seen.T, color="tab:orange", marker="x", s=14, label="codes in turn 2")
    sums = torch.cat([torch.zeros(1, 2), searches.approximations])
    axis.plot(*sums.T, "o-", color="tab:blue", markersize=4, linewidth=1.2)
    codes = ",".join(f"A{turn + 1}" for turn in range(int(length)))
    axis.set_title(f"{type(transform).__name__}: {codes}", fontsize=10)


def main() -> None:
    """Save the figure."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("file", help="picture to save")
    options = parser.parse_args()
    matplotlib.use("agg")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    latents, codebook, z = scene()
    draw_attract(axes[0], latents, codebook, z)
    draw_cascade(axes[1], latents, codebook, z, Residual(MAX_LOOPS))
    draw_cascade(axes[2], latents, codebook, z, LinearResidual(MAX_LOOPS, 2))
    axes[2].legend(loc="lower right", fontsize=7)
    figure.savefig(options.file, dpi=100)


if __name__ == "__main__":
    main()
