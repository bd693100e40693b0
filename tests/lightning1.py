"""Runs as the original left them: a configuration, and a checkpoint that Lightning 1 wrote."""

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


def save_as_lightning_1(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint as Lightning 1.0 did: a callback's class is the key of its state."""
    callback = type("ModelCheckpoint", (), {"__module__": _CALLBACK})
    module = types.ModuleType(_CALLBACK)
    vars(module)["ModelCheckpoint"] = callback
    state = {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.3)}
    state |= {"best_model_path": "a", "current_score": torch.tensor(0.4), "dirpath": "b"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:  # pickling looks the class up by its name
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, _CALLBACK, module)
        torch.save({"callbacks": {callback: state}, **content}, path)


def save_checkpoint(path: Path, weights: Mapping[str, Tensor], step: int) -> None:
    """Write weights, and what else Lightning 1.0 saved with them."""
    content = {
        "epoch": 4,
        "global_step": step,
        "pytorch-lightning_version": "1.0.8",
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 4.5e-6, "params": [0]}]}],
        "lr_schedulers": [],
        "state_dict": dict(weights),
    }
    save_as_lightning_1(path, content)


def save_run(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Write ``configs/*-project.yaml`` and ``checkpoints/last.ckpt``, trained for 1234 steps."""
    save_checkpoint(folder / "checkpoints/last.ckpt", weights, step=1234)
    (folder / "configs").mkdir()
    OmegaConf.save(OmegaConf.create(dict(config)), folder / "configs/2021-01-01-project.yaml")
    return folder


def with_masks(weights: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """Add the causal masks that the original stored in every attention layer."""
    mask = torch.ones(1, 1, block_size, block_size).tril()
    layers = {k.removesuffix("key.weight") for k in weights if k.endswith("attn.key.weight")}
    return {**weights, **{f"{layer}mask": mask for layer in sorted(layers)}}
