"""The smallest models, data and trainer that go through every part."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

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
