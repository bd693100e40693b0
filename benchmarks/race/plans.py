"""Sizes, durations and images of a race."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from race.contenders import BETA, Contender, contenders
from taming.data.custom import ImageFolder
from taming.data.hub import CIFAR10, ParquetImages


@dataclass(frozen=True)
class Plan:
    """Sizes and durations of a race.

    Attributes:
        ddconfig: Parameters of the encoder and the decoder.
        channels: D, channels of a latent.
        codes: K, number of codes of a codebook.
        base_steps: Training steps of the autoencoder without codes, from which all contenders of a
            seed start. Without it, a short training could not separate them: latents that are
            quantized from the first step learn to use few directions.
        steps: Further steps of each contender.
        batch_size: Images per step.
        learning_rate: Learning rate of the autoencoder; contenders start from a quarter of it.
            Both fall to 2% along a cosine.
        prior_steps: Training steps of a prior.
        prior_rate: Learning rate of a prior; falls likewise.
        prior: Parameters of the prior's GPT.
        seeds: Number of seeds.
        names: Names of the contenders.
        test_images: Number of held-out images.
        calibration_images: Number of training images for calibrating rates.
        linear_shortcut: Start from a linear code, so that a small network is not the limit.
        beta: Weight of the commitment of all contenders.
    """

    ddconfig: dict[str, Any]
    channels: int
    codes: int
    base_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    prior_steps: int
    prior_rate: float
    prior: dict[str, int]
    seeds: int
    names: tuple[str, ...]
    test_images: int
    calibration_images: int
    linear_shortcut: bool = False
    beta: float = BETA

    def contenders(self) -> dict[str, Contender]:
        """Return all contenders of these sizes by name."""
        return contenders(self.codes, self.channels, self.beta)


SMALL = {
    "double_z": False,
    "z_channels": 64,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 16,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
    "num_groups": 8,
}
PHOTOS = SMALL | {"resolution": 64, "ch_mult": [1, 1, 2, 4]}
LARGE = SMALL | {
    "resolution": 256,
    "ch": 64,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 2,
    "num_groups": 32,
}
MODERN = {"rms_norm": True, "qk_norm": True, "swiglu": True}
# Learns lengths in fewer steps than the original's GPT.
SMALL_PRIOR = {"n_layer": 2, "n_head": 4, "n_embd": 96, "rotary": True, **MODERN}
LARGE_PRIOR = {"n_layer": 8, "n_head": 8, "n_embd": 512, "rotary": True, **MODERN}
PEERS = (
    *("rvq-2-separate", "rvq-3-separate", "rvq-4-separate", "ema-vq-1x", "ema-vq-4x"),
    *("vq-rate-1x", "vq-rate-4x", "fixed-rate-2", "fixed-rate-3", "fixed-rate-4"),
)
RATED = ("rate-one", "rate-one-loss", "rate-2", "rate-2-loss", "rate-4", "rate-4-loss")
DECISIVE = ("loopy-one", *PEERS, *RATED, "rvq-dropout", "loopy-2", "loopy-3", "loopy-4", "attract")
ALL = tuple(contenders(256, 16))
PLANS = {
    "quick": Plan(
        SMALL, 16, 256, 300, 150, 32, 1e-3, 40, 4e-3, SMALL_PRIOR, 1,
        ("loopy-one", "vq", "rvq-2-separate", "rvq-4-separate"), 500, 500,
    ),
    "standard": Plan(
        SMALL, 32, 256, 6000, 1500, 16, 4e-3, 500, 4e-3, SMALL_PRIOR, 3, DECISIVE, 2000, 2000
    ),
    "photos": Plan(
        PHOTOS, 32, 256, 2000, 800, 16, 2e-3, 500, 4e-3, SMALL_PRIOR, 3,
        ("loopy-one", *PEERS, *RATED), 2000, 2000, linear_shortcut=True, beta=1.0,
    ),
    "full": Plan(
        LARGE, 32, 1024, 100_000, 50_000, 16, 4e-4, 20_000, 1e-3, LARGE_PRIOR, 3, ALL,
        10_000, 2000,
    ),
}  # fmt: skip


def images_of(path: str | None, split: str, size: int, train: bool) -> Any:
    """Open a folder of images or a Parquet file; None downloads CIFAR-10."""
    if path is None:
        return CIFAR10(split=split, size=size, random_flip=train)  # type: ignore[arg-type]
    if Path(path).is_dir():
        return ImageFolder(path, size=size, random_crop=train, random_flip=train)
    return ParquetImages(path, size=size, random_flip=train)
