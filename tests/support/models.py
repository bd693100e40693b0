"""The smallest models, data and trainer that go through every part."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqvae2 import VQVAE2
from taming.util import NonFiniteError, instantiate_from_config

DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
GAN = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 2, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1},
}
PLAIN = {"target": "taming.modules.losses.reconstruction.ReconstructionLoss"}
LOOPY = {
    "target": "taming.modules.vqvae.quantize.LoopyVectorQuantizer",
    "params": {"n_e": 16, "e_dim": 4, "threshold": 0.5, "max_loops": 3},
}
GPT = {
    "target": "taming.modules.transformer.mingpt.GPT",
    "params": {"vocab_size": 17, "block_size": 200, "n_layer": 1, "n_head": 2, "n_embd": 8},
}
TWO_LEVEL = {
    "target": "taming.modules.transformer.two_level.TwoLevelGPT",
    "params": {
        **GPT["params"],
        "site_shape": (8, 8, 4),
        "depth": {"n_layer": 1, "n_head": 2, "n_embd": 8},
    },
}

# Kind of a tokenizer -> parameters of its loopy quantizer; None for the ordinary quantizer.
TRANSFORMS = {
    "residual": {},
    "attract": {
        "transform_config": {
            "target": "taming.modules.vqvae.transforms.Attract",
            "params": {"step": 0.5},
        }
    },
    "plain": None,
}
every_tokenizer = pytest.mark.parametrize("kind", list(TRANSFORMS))

# A VQ-VAE-2: kinds of quantizers, the most codes of a site of each, and the levels' names.
QUANTIZERS = {
    "ema": {
        "target": "taming.modules.vqvae.quantize.EMAVectorQuantizer",
        "params": {"n_embed": 16, "embedding_dim": 4, "beta": 0.25, "sane_index_shape": True},
    },
    "flat": {
        "target": "taming.modules.vqvae.quantize.VectorQuantizer2",
        "params": {"n_e": 16, "e_dim": 4, "beta": 0.25},
    },
    "loopy": {**LOOPY, "params": {**LOOPY["params"], "start_batches": 0, "threshold": 0.2}},
}
TURNS = {"ema": 1, "flat": 1, "loopy": 3}
BETWEEN = {
    **{"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1},
    **{"attn_resolutions": [], "resolution": 8},
}
LEVELS = {2: ["top", "bottom"], 3: ["top", "middle", "bottom"]}
every_pair = pytest.mark.parametrize("kinds", [("ema", "flat"), ("loopy", "loopy")], ids="-".join)


def images(amount: int, batch_size: int = 2) -> DataLoader:
    """Batches of noise (B, 16, 16, 3) in [-1, 1] with classes; the same ones each time."""
    generator = torch.Generator().manual_seed(3)
    data = [
        {"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1, "class_label": i % 10}
        for i in range(amount)
    ]
    return DataLoader(data, batch_size=batch_size)


def trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
    """A silent trainer of one epoch."""
    return pl.Trainer(
        **{
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **kwargs,
        }
    )


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    """Noise (B, 3, H, W) in [-1, 1]."""
    return torch.rand(count, 3, height, width) * 2 - 1


def vqmodel_config(channels: int = 3, **kwargs: Any) -> dict[str, Any]:
    """A VQModel of 16 codes for images of 16 x 16, on 8 x 8 sites."""
    ddconfig = {**DDCONFIG, "in_channels": channels, "out_ch": channels}
    params = {"ddconfig": ddconfig, "lossconfig": PLAIN, "n_embed": 16, "embed_dim": 4, **kwargs}
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def tokenizer_config(kind: str) -> dict[str, Any]:
    """The same with the quantizer of a kind of `TRANSFORMS`."""
    if TRANSFORMS[kind] is None:
        return vqmodel_config()
    loopy = {**LOOPY["params"], "start_batches": 0, "threshold": 0.3, **TRANSFORMS[kind]}
    return vqmodel_config(quantizer_config={**LOOPY, "params": loopy})


def prior(
    kind: str = "residual", gpt: dict[str, Any] | None = None, levels: int = 1, **kwargs: Any
) -> Net2NetTransformer:
    """A small prior whose tokenizer spreads latents over its codes."""
    sites = {"site_shape": (8, 8, 4)} if kind != "plain" else {}
    config = GPT if levels == 1 else TWO_LEVEL
    config = {**config, "params": {**config["params"], **sites, **(gpt or {})}}
    built = Net2NetTransformer(
        config,
        **{
            "first_stage_config": tokenizer_config(kind),
            "cond_stage_config": "__is_unconditional__",
            **kwargs,
        },
    )
    with torch.no_grad():
        quantize = built.first_stage_model.quantize
        codes = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        quantize.embedding.weight.copy_(codes * 0.5)
    return built


def hierarchy_config(*kinds: str) -> dict[str, Any]:
    """A Hierarchy of quantizers of these kinds, the top first; the finest grid is 8 x 8."""
    quantizers = zip(LEVELS[len(kinds)], map(QUANTIZERS.get, kinds), strict=True)
    return {
        "target": "taming.modules.vqvae.hierarchy.Hierarchy",
        "params": {"quantizers": dict(quantizers), "ddconfig": BETWEEN},
    }


def vqvae2_config(*kinds: str) -> dict[str, Any]:
    """A VQVAE2 of such a hierarchy, for images of 16 x 16."""
    params = {"n_embed": 16 * len(kinds), "embed_dim": 4 * len(kinds)}
    params |= {"ddconfig": DDCONFIG, "lossconfig": PLAIN}
    params["quantizer_config"] = hierarchy_config(*kinds)
    return {"target": "taming.models.vqvae2.VQVAE2", "params": params}


def spread_codes(tokenizer: VQVAE2) -> VQVAE2:
    """Spread the codes over the latents; the same ones each time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for quantizer in tokenizer.quantize.levels:
            weight = quantizer.embedding.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return tokenizer


def level_config(name: str, *kinds: str) -> dict[str, Any]:
    """A level of such a model, as the tokenizer of a prior."""
    params = {"model_config": vqvae2_config(*kinds), "level": name}
    return {"target": "taming.models.vqvae2.Level", "params": params}


class ToyData(Dataset):
    """Item i is an image (4, 4, 3) filled with i / size."""

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.full((4, 4, 3), index / self.size)}


class ToyDataModule(pl.LightningDataModule):
    """The same toy data for training, validation and test."""

    def __init__(self, batch_size: int = 2, size: int = 8, validate: bool = True) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.size = size
        self.validate = validate

    def setup(self, stage: str) -> None:
        self.data = ToyData(self.size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return DataLoader(self.data, self.batch_size) if self.validate else []

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size)


class ToyModel(pl.LightningModule):
    """A linear layer with dropout and an unused parameter.

    Args:
        fail_at: Step at which training raises.
        non_finite: Raise a NonFiniteError then, in place of an OSError.
    """

    def __init__(
        self,
        width: int = 2,
        monitor: str | None = None,
        fail_at: int = -1,
        non_finite: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 3))
        self.unused = nn.Parameter(torch.zeros(1))
        self.monitor = monitor
        self.fail_at = fail_at
        self.non_finite = non_finite
        self.learning_rate = 0.0
        self.seen: list[list[float]] = []
        if ckpt_path is not None:
            self.load_state_dict(torch.load(ckpt_path, weights_only=True)["state_dict"])

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.net(batch["image"]) - batch["image"]).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.fail_at:
            raise NonFiniteError("toy loss is not finite") if self.non_finite else OSError("toy")
        self.seen.append(batch["image"][:, 0, 0, 0].tolist())
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)

    def log_images(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        images = batch["image"].permute(0, 3, 1, 2)
        return {"inputs": images, "noise": torch.rand_like(images) * 2 - 1}

    def codebook_histograms(self) -> dict[str, Tensor]:
        return {"train/codes": torch.arange(5), "val/codes": torch.ones(3)}


class ToyManualModel(ToyModel):
    """Optimizes by hand, as GANs do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.gradient_clip_algorithm = "norm"

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = self._loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss


class ToyTestedModel(ToyModel):
    """Has a test step."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self._loss(batch))


ALWAYS = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 0, "max_decay_steps": 9, "lr_min": 1, "lr_max": 1, "lr_start": 1},
}


def _loopy(transform: str = "Residual", max_loops: int = 3, **params: Any) -> dict[str, Any]:
    block = {"target": f"taming.modules.vqvae.transforms.{transform}", "params": params}
    loopy = {"threshold": 0.3, "start_batches": 0, "max_loops": max_loops}
    return vqmodel_config(quantizer_config={**LOOPY, "params": loopy | {"transform_config": block}})


def _variant(name: str, **params: Any) -> dict[str, Any]:
    config = vqmodel_config(**params)
    return {**config, "target": f"taming.models.vqgan.{name}"}


def _quantizer(name: str, **params: Any) -> dict[str, Any]:
    block = {"target": f"taming.modules.vqvae.quantize.{name}", "params": params}
    return vqmodel_config(quantizer_config=block)


# A tokenizer of images of 16 x 16 with each quantizer and transform.
QUANTIZED = {
    "first": _quantizer("VectorQuantizer", beta=0.25),
    "plain": vqmodel_config(),
    "averages": _variant("EMAVQ"),
    "gumbel": _variant("GumbelVQ", temperature_scheduler_config=ALWAYS),
    "residual": _loopy(),
    "one-turn": _loopy(max_loops=1),
    "beam": _loopy(beam=2),
    "linear": _loopy("LinearResidual"),
    "depth": _loopy(depth_embedding=True),
    "attract": _loopy("Attract", depth_embedding=True),
    "levels": vqvae2_config("ema", "flat"),
    "loopy-levels": vqvae2_config("loopy", "loopy"),
}
every_quantizer = pytest.mark.parametrize("quantizer", list(QUANTIZED))


def tokenizer_of(quantizer: str) -> Any:
    """A tokenizer of `QUANTIZED` in eval mode, whose latents fall on many codes and lengths."""
    torch.manual_seed(0)
    built = instantiate_from_config(QUANTIZED[quantizer]).eval()
    for name, parameter in built.quantize.named_parameters():
        if "embed" in name or name.endswith("depth"):
            nn.init.normal_(parameter, std=0.4)
    return built.requires_grad_(False)
