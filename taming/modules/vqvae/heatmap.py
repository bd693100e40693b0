"""Pictures of how deep the loop went.

Axis letters: B images, h w grid, H W image.
"""

from __future__ import annotations

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor


def length_heat_map(lengths: Tensor, max_loops: int, size: tuple[int, int]) -> Tensor:
    """Colour each site by its length: dark for one turn, bright for the most.

    Args:
        lengths: (B, h, w) int64 in [1, max_loops].
        max_loops: T, the length of the brightest colour.
        size: (H, W) of the picture.

    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    """
    share = (lengths.cpu() - 1).float() / max(max_loops - 1, 1)
    colours = matplotlib.colormaps["inferno"](share.numpy())[..., :3]
    picture = torch.from_numpy(colours).float().permute(0, 3, 1, 2) * 2 - 1
    return F.interpolate(picture, size=size, mode="nearest").to(lengths.device)
