"""Feature networks, and the files of their weights.

Axis letters: B images, C channels, H W image, h w feature map, d features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from taming.downloads import file_hash
from taming.evaluation.measures import Measure, pixel_measures, tool
from taming.extras import naming_extras
from taming.modules.losses.lpips import LPIPS, WITHOUT, fetch_heads, load_file, vgg16_file
from taming.modules.losses.st_lpips import STLPIPS, shift_tolerant_file
from taming.pictures import from_levels

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
FID_SIDE = 299
FRECHET = "Frechet distance (ST-LPIPS VGG16)"


def about_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Name a file of weights with its hash, for the protocol."""
    return {"file": Path(path).name, "sha256": file_hash(path, "sha256")}


def perceptual(name: str, lpips: LPIPS, about: Mapping[str, Any], **sets: Any) -> Measure:
    """Return the measure of a perceptual distance; ``sets`` are further fields of it."""
    lpips.eval()

    @torch.no_grad()
    def see(levels: Tensor) -> list[Tensor]:
        return lpips.features(from_levels(levels))

    @torch.no_grad()
    def compare(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return lpips.compare(x, y).flatten()

    return Measure(name, about, see, compare, channels=(1, 3), **sets)


def lpips(device: torch.device) -> Measure:
    """Return LPIPS with the VGG16 of torchvision.

    Raises:
        ConnectionError: Weights are missing and cannot be downloaded.
        FileNotFoundError: A file that an environment variable names does not exist.
        ValueError: A file holds other weights.
    """
    network = LPIPS()
    try:
        network.fetch_weights()
    except ConnectionError as error:
        raise ConnectionError(str(error).removesuffix(f"; {WITHOUT}")) from error
    about = {"tool": tool("loopy-taming"), "network": "VGG16 of torchvision, ImageNet"}
    about |= {"heads": about_file(network.weights or fetch_heads())}
    about |= about_file(network.vgg_weights or vgg16_file())
    return perceptual("LPIPS", network.to(device), about, least=16)


def shift_tolerant(device: torch.device) -> Measure:
    """Return ST-LPIPS (arXiv:2207.13686), in whose VGG16 sets of pictures are compared too.

    The weights come from the wheel of stlpips-pytorch, whose code is not imported.

    Raises:
        ValueError: The package is not installed, or holds other weights.
    """
    network = STLPIPS()
    network.fetch_weights()
    about = {"tool": tool("stlpips-pytorch"), "network": "VGG16 with blurred pooling"}
    about |= {
        "features": "mean over the places of relu5_3, 512 numbers",
        **about_file(shift_tolerant_file()),
    }

    def vectors(seen: list[Tensor]) -> Tensor:
        return seen[-1].mean(dim=(2, 3))  # (B, 512)

    sets = {"vectors": vectors, "distance": FRECHET, "least": 18}
    return perceptual("ST-LPIPS", network.to(device), about, **sets)


def inception_file() -> Path:
    """Return the weights of the original FID's network, downloaded if they are missing.

    Raises:
        ConnectionError: They cannot be downloaded; names the address and where to put them.
        FileNotFoundError: The environment variable TAMING_INCEPTION names no file.
    """
    if given := os.environ.get("TAMING_INCEPTION"):
        if not Path(given).is_file():
            raise FileNotFoundError(f"{given}, which TAMING_INCEPTION names, does not exist")
        return Path(given)
    with naming_extras():
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            prefix = path.stem.rpartition("-")[2]  # of its SHA-256
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise ConnectionError(
                f"cannot download {url} ({error}); without a network, fetch it elsewhere and put "
                f"it at {path}, or set the environment variable TAMING_INCEPTION to its path"
            ) from error
    return path


def inception(device: torch.device, kind: str) -> Measure:
    """Return the FID (Heusel et al. 2017, arXiv:1706.08500) in the original's network.

    Args:
        device: Device of the network.
        kind: "r" for reconstructions, "g" for generated pictures.

    Raises:
        ConnectionError: The weights are missing and cannot be downloaded.
        ValueError: torch-fidelity is not installed, or the file holds other weights.
    """
    with naming_extras():
        from torch_fidelity import feature_extractor_inceptionv3 as networks

    extractor = networks.FeatureExtractorInceptionV3
    path = inception_file()
    load_file(path)  # refuses code, which the extractor would run
    try:
        network = extractor("inception-v3-compat", ["2048"], str(path)).to(device)
    except RuntimeError as error:  # of load_state_dict
        raise ValueError(f"{path} holds other weights than Inception's: {error}") from error

    def see(levels: Tensor) -> Tensor:
        return network(levels.expand(-1, 3, -1, -1))[0]  # (B, 2048)

    about = {"tool": tool("torch-fidelity"), "network": "Inception v3 of the original FID"}
    about |= {"input": f"{FID_SIDE}x{FID_SIDE}, bilinear as in TensorFlow 1, no antialiasing"}
    about |= {"features": "pool3, 2048 numbers", **about_file(path)}
    name = f"{kind}FID"
    return Measure(name, about, see, vectors=lambda x: x, distance=name, channels=(1, 3))


def all_measures(
    device: torch.device, kind: str, pretrained: bool = True
) -> tuple[list[Measure], dict[str, str]]:
    """Return what can be measured here, and the reason for what cannot, by name.

    Args:
        device: Device of the networks.
        kind: "r" for reconstructions, which pixels are compared for too; "g" for generated ones.
        pretrained: Also measure by pretrained networks, whose weights are downloaded if missing.
    """
    builders: dict[str, Callable[[], Measure]] = {
        "LPIPS": lambda: lpips(device),
        f"ST-LPIPS, {FRECHET}": lambda: shift_tolerant(device),
        f"{kind}FID": lambda: inception(device, kind),
    }
    if kind == "g":
        del builders["LPIPS"]  # compares pictures in pairs, which generated ones have not
    measures, missing = pixel_measures() if kind == "r" else [], {}
    for name, build in builders.items() if pretrained else ():
        try:
            measures.append(build())
        except (ValueError, OSError) as error:
            missing[name] = " ".join(str(error).split())
    return measures, missing
