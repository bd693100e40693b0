"""Pictures from image tensors, for scripts and reports.

Axis letters: B images, H W image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def to_picture(image: Tensor) -> Image.Image:
    """Turn an image (3, H, W), clamped to [-1, 1], into an 8-bit picture."""
    levels = (image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).numpy())


def tile(images: Tensor, columns: int) -> Tensor:
    """Arrange images (B, 3, H, W) in [-1, 1] in rows of ``columns`` with white gaps."""
    return make_grid(images.detach().float().cpu(), nrow=columns, padding=2, pad_value=1.0)


def side_by_side(*images: Tensor) -> Tensor:
    """Put images (3, H, W) in [-1, 1] of one size next to each other: (3, H', W')."""
    return tile(torch.stack([image.detach().float().cpu() for image in images]), len(images))


def save_picture(image: Tensor, path: Path) -> None:
    """Save an image (3, H, W) in [-1, 1] to a file; create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(image).save(path)
