"""LPIPS, a perceptual distance between images (Zhang et al. 2018, arXiv:1801.03924).

Axis letters: B images, C channels, H W image, h w feature map.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from taming.downloads import get_ckpt_path
from taming.extras import naming_extras

logger = logging.getLogger(__name__)

WITHOUT = "perceptual_weight: 0 in the loss's params trains without LPIPS"

# Widths of VGG16's convolutions; every group but the first starts with a pooling.
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a state dict from a path given by the user.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It holds something else than weights, such as code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the weights of LPIPS there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} does not hold weights alone") from error


def fetch_heads() -> Path:
    """Return the path of the linear heads in torch's cache, downloaded and checked.

    Raises:
        ConnectionError: They cannot be downloaded.
        ValueError: The download is another file.
    """
    try:
        return Path(get_ckpt_path("vgg_lpips", Path(torch.hub.get_dir(), "taming"), check=True))
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}, or set the environment variable TAMING_LPIPS to its path; the pip package "
            f"lpips holds the same file as lpips/weights/v0.1/vgg.pth; {WITHOUT}"
        ) from error


def vgg16_file() -> Path:
    """Return the path of torchvision's VGG16 weights in torch's cache, there or not."""
    from torchvision.models import VGG16_Weights

    return Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_Weights.IMAGENET1K_V1.url).name)


def fetch_vgg16() -> dict[str, Tensor]:
    """Return torchvision's VGG16 weights (ImageNet), downloaded to torch's cache and checked.

    Raises:
        ConnectionError: They cannot be downloaded.
    """
    with naming_extras():  # slow, and only a training without them needs it
        from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, map_location="cpu"))
    except URLError as error:
        raise ConnectionError(
            f"cannot download {weights.url} ({error}); without a network, fetch it elsewhere and "
            f"put it at {vgg16_file()}, or set the environment variable TAMING_VGG16 to its path; "
            f"{WITHOUT}"
        ) from error


class ScalingLayer(nn.Module):
    """Map values in [-1, 1] to the range on which VGG was trained."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to the same shape."""
        return (x - self.shift) / self.scale


def max_pool(channels: int) -> list[nn.Module]:
    """Return the pooling of VGG16."""
    return [nn.MaxPool2d(2)]


Pooling = Callable[[int], Sequence[nn.Module]]


class VGG16(nn.Module):
    """Convolutions of VGG16 (arXiv:1409.1556) in five slices, under torchvision's layer numbers.

    Args:
        pool: Returns the layers by which a feature map of so many channels is halved.
    """

    def __init__(self, pool: Pooling = max_pool) -> None:
        super().__init__()
        number, before = 0, 3
        for i, widths in enumerate(VGG_WIDTHS, start=1):
            layers = nn.Sequential()
            for layer in pool(before) if i > 1 else ():
                layers.add_module(str(number), layer)
                number += 1
            for channels_in, channels_out in pairwise((before, *widths)):
                layers.add_module(str(number), nn.Conv2d(channels_in, channels_out, 3, padding=1))
                layers.add_module(str(number + 1), nn.ReLU(inplace=True))
                number += 2
            before = widths[-1]
            self.add_module(f"slice{i}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to the features (B, C, h, w) after each slice, largest first."""
        features = []
        for layers in self.children():
            x = layers(x)
            features.append(x)
        return features


class Head(nn.Module):
    """Weighted sum over channels.

    Args:
        channels: C.
        use_dropout: Name the weight as if dropout came before it; nothing is dropped.
    """

    def __init__(self, channels: int, use_dropout: bool) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        self.model = nn.Sequential(*[nn.Identity()] * use_dropout, convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, 1, h, w)."""
        return self.model(x)


def normalize(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale (B, C, h, w) to length 1 over C.

    eps under the root gives a gradient where all channels are 0, as in flat regions after ReLU.
    """
    return x * (x.square().sum(dim=1, keepdim=True) + eps).rsqrt()


class LPIPS(nn.Module):
    """Perceptual distance of two images; frozen, and the same in training and evaluation mode.

    Args:
        use_dropout: Name the heads' weights as in the original with dropout; nothing is dropped.
        pretrained: Let `fetch_weights` load the weights, unless a checkpoint had them; otherwise
            they stay random.
        weights: Path of the linear heads (``vgg.pth``); None takes the environment variable
            TAMING_LPIPS, or downloads them.
        vgg_weights: Path of torchvision's VGG16 weights; None takes the environment variable
            TAMING_VGG16, or downloads them.
        pool: Pooling of the VGG16; another than its own has other weights.
    """

    def __init__(
        self,
        use_dropout: bool = True,
        pretrained: bool = True,
        weights: str | None = None,
        vgg_weights: str | None = None,
        pool: Pooling = max_pool,
    ) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16(pool)
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = (
            Head(widths[-1], use_dropout) for widths in VGG_WIDTHS
        )
        self.weights = weights or os.environ.get("TAMING_LPIPS")
        self.vgg_weights = vgg_weights or os.environ.get("TAMING_VGG16")
        self.needs_weights = pretrained
        self.requires_grad_(False)

    def fetch_weights(self) -> LPIPS:
        """Load the pretrained weights unless a checkpoint had them; return self.

        Raises:
            ConnectionError: A download fails; names the address and the path to put the file at.
            FileNotFoundError: A given path does not exist.
            ValueError: A file holds other weights.
        """
        if self.needs_weights and not self.scaling_layer.shift.is_meta:
            self.load_pretrained()
            self.needs_weights = False
        return self

    def load_pretrained(self) -> None:
        """Load the heads and the VGG16; raises as `fetch_weights`."""
        self.load_heads(self.weights)
        self.load_vgg16(self.vgg_weights)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        heads = {prefix + "lin4.model.1.weight", prefix + "lin4.model.0.weight"}
        self.needs_weights &= heads.isdisjoint(state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def heads(self) -> list[Head]:
        """The heads of the five slices in order."""
        return [self.lin0, self.lin1, self.lin2, self.lin3, self.lin4]

    def load_heads(self, path: str | None) -> None:
        """Load the linear heads from a file, or from the download if ``path`` is None."""
        path = path or str(fetch_heads())
        state = load_file(path)
        for i, head in enumerate(self.heads):
            if (name := f"lin{i}.model.1.weight") not in state:
                raise ValueError(f"{path} is not the linear heads of LPIPS: {name} is missing")
            head.load_state_dict(dict(zip(head.state_dict(), [state[name]], strict=True)))
        logger.info("loaded the linear heads of LPIPS from %s", path)

    def load_vgg16(self, path: str | None) -> None:
        """Load VGG16 from a file, or from the download if ``path`` is None."""
        state = load_file(path) if path else fetch_vgg16()
        names = {name: "features." + name.partition(".")[2] for name in self.net.state_dict()}
        if missing := sorted(set(names.values()) - set(state)):
            raise ValueError(f"{path} is not torchvision's VGG16: {missing[0]} is missing")
        self.net.load_state_dict({name: state[source] for name, source in names.items()})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compare images.

        Args:
            x: (B, C, H, W) in [-1, 1], C 3, or 1 for grey.
            y: The same shape.

        Returns:
            (B, 1, 1, 1) distances, at least 0.

        Raises:
            ValueError: C is neither 1 nor 3.
            ConnectionError: Weights that were not fetched before cannot be downloaded.
        """
        return self.compare(self.features(x), self.features(y))

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the features (B, C, h, w) of images after each slice, as `forward` takes them."""
        self.fetch_weights()
        if x.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS compares images of 1 or 3 channels, got {x.shape[1]}; {WITHOUT}"
            )
        return self.net(self.scaling_layer(x.expand(-1, 3, -1, -1)))

    def compare(self, x_features: Sequence[Tensor], y_features: Sequence[Tensor]) -> Tensor:
        """Compare images by their `features`: (B, 1, 1, 1) distances."""
        distances = [
            head((normalize(a) - normalize(b)).square()).mean(dim=(2, 3), keepdim=True)
            for head, a, b in zip(self.heads, x_features, y_features, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)
