"""Blocks that a configuration need not state: loggers and callbacks of every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "setup_callback": {"target": "taming.run.callbacks.SetupCallback"},
    "rng_state": {"target": "taming.run.checkpoints.RngState"},
    "epoch_values": {"target": "taming.run.epoch_values.EpochValues"},
    "image_logger": {"target": "taming.run.callbacks.ImageLogger"},
    "codebook_telemetry": {"target": "taming.run.callbacks.CodebookTelemetry"},
    "advice": {"target": "taming.run.advice.Advice"},
    "learning_rate_logger": {
        "target": "lightning.pytorch.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "last_checkpoint": {"target": "taming.run.checkpoints.LastCheckpoint"},
}
# Callbacks that a configuration asks for by name, such as callbacks.ema.params.decay=0.999.
CALLBACKS_BY_NAME = {"ema": {"target": "taming.run.averages.MovingAverages"}}
DEFAULT_LOGGER = {"target": "lightning.pytorch.loggers.TensorBoardLogger"}
DEFAULT_CHECKPOINT = {"target": "lightning.pytorch.callbacks.ModelCheckpoint"}


def merge_block(default: Mapping[str, Any], block: Any) -> Any:
    """Complete a ``{target, params}`` block with the defaults for its target.

    A block without a target takes the default's; one with another target takes no defaults.
    `taming.run.check` refuses what is not a mapping.
    """
    block = {} if block is None else block
    if not isinstance(block, Mapping) or block.get("target") not in (None, default["target"]):
        return block
    params = block.get("params") or {}
    if isinstance(params, Mapping):
        params = {**(default.get("params") or {}), **params}
    return {**default, **block, "target": default["target"], "params": params}


def callback_blocks(lightning: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Merge the configured callbacks into the default ones; a null entry removes a default."""
    configured = lightning.get("callbacks") or {}
    known = {**DEFAULT_CALLBACKS, **CALLBACKS_BY_NAME}
    names = [*DEFAULT_CALLBACKS, *(name for name in configured if name not in DEFAULT_CALLBACKS)]
    blocks = {
        name: merge_block(known[name], configured.get(name)) if name in known else configured[name]
        for name in names
    }
    return {name: b for name, b in blocks.items() if name not in configured or configured[name]}
