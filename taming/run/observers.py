"""Builds what watches a run, from defaults and configuration: loggers, callbacks, checkpoints."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from taming.run.config import instantiate_from_config
from taming.run.folder import PreparationError, RunDir
from taming.run.lightning_block import (
    DEFAULT_CHECKPOINT,
    DEFAULT_LOGGER,
    callback_blocks,
    merge_block,
)
from taming.run.signature import signature_of
from taming.run.source import nearest

logger = logging.getLogger(__name__)


def build_loggers(
    block: Mapping[str, Any] | None, run: RunDir, now: str, wandb_project: str | None
) -> list[Logger]:
    """Build the CSV and TensorBoard loggers, Weights & Biases if asked for, and a configured one.

    Args:
        block: The ``lightning.logger`` block; its params are merged into those of the logger with
            the same target.
        run: Where they write: ``csv/<now>/metrics.csv``, ``tensorboard`` and ``wandb``.
        now: Time of this start; each start writes its own CSV file.
        wandb_project: Project at Weights & Biases, to log there.

    Raises:
        ValueError: Weights & Biases is asked for and not installed.
    """
    block = block and merge_block(DEFAULT_LOGGER, block)
    module = "lightning.pytorch.loggers"
    name = run.path.name
    defaults = {
        f"{module}.CSVLogger": {"name": f"csv/{now}", "version": ""},
        f"{module}.TensorBoardLogger": {"name": "tensorboard", "version": ""},
    }
    wandb_target = f"{module}.WandbLogger"
    if wandb_project or (block and block["target"] == wandb_target):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("logging to Weights & Biases needs: pip install 'loopy-taming[wandb]'")
        run_id = re.sub(r"[^\w.-]", "-", name)[-64:]
        defaults[wandb_target] = {"name": name, "id": run_id, "project": wandb_project or "taming"}
    blocks = {
        target: {"target": target, "params": {"save_dir": str(run.path), **params}}
        for target, params in defaults.items()
    }
    if block:
        default = blocks.get(block["target"], block)
        blocks[block["target"]] = merge_block(default, block)
    return [instantiate_from_config(block) for block in blocks.values()]


def build_callbacks(
    lightning: Mapping[str, Any], project: Mapping[str, Any], run: RunDir, now: str
) -> list[Callback]:
    """Build the default callbacks and those of the configuration, apart from checkpoints."""
    injected: dict[str, dict[str, Any]] = {
        "setup_callback": {
            "now": now,
            "logdir": run.path,
            "ckptdir": run.checkpoints,
            "cfgdir": run.configs,
            "config": project,
            "lightning_config": lightning,
        },
        "image_logger": {"logdir": run.path},
    }
    callbacks = []
    for name, block in callback_blocks(lightning).items():
        if name == "last_checkpoint":
            continue
        signature = signature_of(block["target"])
        given = {k: v for k, v in injected.get(name, {}).items() if k in signature.names}
        callbacks.append(instantiate_from_config(_with_defaults(block, given)))
    return callbacks


def best_of(monitor: str) -> str:
    """Return whether the best value of a logged metric is its ``"max"`` or its ``"min"``."""
    return "max" if monitor.endswith(("psnr", "ssim", "usage", "perplexity")) else "min"


class MonitorCheck(Callback):
    """Stops a run whose checkpoints would wait for a metric that validation does not log.

    Where there is no validation, a warning says that they wait for good.

    Args:
        monitor: Name of the metric; of one of training, only time can tell.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether there is a validation, once for all processes."""
        waits = self.monitor is not None and self.monitor.startswith("val/")
        if waits and not trainer.enable_validation and trainer.is_global_zero:
            logger.warning(
                "there is no validation and so no %s: the best checkpoints are not kept, only "
                "last.ckpt",
                self.monitor,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether a validation, such as the sanity check, logged it.

        Raises:
            PreparationError: They did not.
        """
        name, logged = self.monitor, list(trainer.callback_metrics)
        if name is None or name.startswith("train/") or name in (*logged, "step", "epoch"):
            return
        raise PreparationError(
            f"validation does not log the monitor {name!r}{nearest(name, logged)}"
        )


def build_checkpoints(
    lightning: Mapping[str, Any], model: pl.LightningModule, run: RunDir
) -> list[Callback]:
    """Build what writes ``last.ckpt`` and, by a monitor, the three best checkpoints."""
    checkpoints = []
    configured = lightning.get("modelcheckpoint")
    monitor = _params_of(configured).get("monitor") or getattr(model, "monitor", None)
    if configured or monitor:
        # Without a counter, a resumed run replaces the files of the run it continues.
        often = {"every_n_train_steps", "train_time_interval"} & {*_params_of(configured)}
        several = often or "val_check_interval" in (lightning.get("trainer") or {})  # in an epoch
        params = {
            "dirpath": str(run.checkpoints),
            "filename": "{epoch:06}-{step:09}" if several else "{epoch:06}",
            "enable_version_counter": False,
            **({"monitor": monitor, "save_top_k": 3, "mode": best_of(monitor)} if monitor else {}),
        }
        block = _with_defaults(merge_block(DEFAULT_CHECKPOINT, configured), params)
        checkpoints = [instantiate_from_config(block), MonitorCheck(block["params"].get("monitor"))]
    last = callback_blocks(lightning).get("last_checkpoint")
    if last:  # after the others, so that last.ckpt knows the best ones
        block = _with_defaults(last, {"ckptdir": run.checkpoints})
        checkpoints.append(instantiate_from_config(block))
    return checkpoints


def _params_of(block: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (block or {}).get("params") or {}


def _with_defaults(block: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    return {**block, "params": {**params, **_params_of(block)}}
