"""The smallest models, data and trainer that go through every part."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from taming.util import NonFiniteError

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


def images(amount: int, batch_size: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    data = [
        {"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1, "class_label": i % 10}
        for i in range(amount)
    ]
    return DataLoader(data, batch_size=batch_size)


def trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
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
        non_finite: Whether it raises NonFiniteError then.
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
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self._loss(batch))
