"""ST-LPIPS, a perceptual distance that tolerates shifts (Ghildyal and Liu 2022, arXiv:2207.13686).

Axis letters: B images, C channels, H W image, h w feature map.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.losses.lpips import LPIPS, load_file

FILE = "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth"


class BlurPool(nn.Module):
    """Halve a feature map after a binomial blur (Zhang 2019, arXiv:1904.11486).

    Args:
        channels: C.
    """

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", torch.outer(row, row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w), h and w at least 3, to (B, C, (h + 3) // 2, (w + 3) // 2)."""
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.filt, stride=2, groups=len(self.filt))


def blurred_pool(channels: int) -> list[nn.Module]:
    """Return that of ST-LPIPS (Ghildyal and Liu 2022, arXiv:2207.13686), which tolerates shifts."""
    return [nn.MaxPool2d(2, stride=1), BlurPool(channels)]


def shift_tolerant_file() -> Path:
    """Return the path of the weights inside the package stlpips-pytorch, which is not imported.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        package = distribution("stlpips-pytorch")
    except PackageNotFoundError as error:
        command = "pip install 'loopy-taming[eval]'"
        raise ValueError(f"stlpips-pytorch is not installed: {command}") from error
    return Path(str(package.locate_file(FILE)))


class STLPIPS(LPIPS):
    """LPIPS with blurred pooling; its VGG16 and heads come with the package stlpips-pytorch.

    ``perceptual_config: {target: taming.modules.losses.st_lpips.STLPIPS}`` trains by it.

    Args:
        pretrained: Let `fetch_weights` load the weights, unless a checkpoint had them.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__(pretrained=pretrained, pool=blurred_pool)

    def load_pretrained(self) -> None:
        """Load the weights of the package.

        Raises:
            ValueError: The package is not installed, or holds other weights.
        """
        path = shift_tolerant_file()
        try:
            self.load_state_dict(load_file(path))
        except RuntimeError as error:  # of load_state_dict
            raise ValueError(f"{path} holds other weights than ST-LPIPS: {error}") from error
