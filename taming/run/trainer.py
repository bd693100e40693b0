"""Builds the Trainer of a run: what surrounds it, learning rate, start.

Everything may be given in the ``lightning`` block of a configuration; the rest is chosen here.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.plugins import environments
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from taming.checkpoint import SafeCheckpointIO
from taming.run.config import ConfigError, instantiate_from_config
from taming.run.devices import choose_strategy
from taming.run.folder import PreparationError, RunDir
from taming.run.observers import build_callbacks, build_checkpoints, build_loggers

logger = logging.getLogger(__name__)

# Messages of Lightning about things that are as they should be.
_KNOWN_WARNINGS = (
    r".*does not have many workers",
    r"Consider setting `persistent_workers=True`",  # a resumed run needs new ones each epoch
    r"Total length of `list` across ranks is zero",
    r"The dirpath has changed from",
    r"You're resuming from a checkpoint that ended before the epoch ended",  # fit() says it
    r"`ModelCheckpoint\(monitor=.*could not find the monitored key",
    r".*number of training batches .* is smaller than the logging interval",
    r".*Checkpoint directory .* exists and is not empty",
    r".*Using ModelCheckpoint with manual optimization and every_n_train_steps",
    r".*Found .* in eval mode at the start of training",
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
)


@runtime_checkable
class ManualOptimization(Protocol):
    """A model that accumulates and clips gradients itself, since Lightning then refuses to."""

    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str


def trainer_arguments(lightning: Mapping[str, Any], run: RunDir) -> dict[str, Any]:
    """Complete the ``lightning.trainer`` block, and build the blocks in it, before data and model.

    Raises:
        ValueError: More GPUs are asked for than are visible, or an argument cannot be meant.
    """
    given = {name: _built(value) for name, value in (lightning.get("trainer") or {}).items()}
    arguments = {"default_root_dir": run.path, **given}
    if arguments.get("precision") in ("bf16-true", "16-true"):
        raise ValueError(
            f"precision {arguments['precision']}: codebooks and the codes of a frozen tokenizer "
            "need weights in float32; train with bf16-mixed"
        )
    if isinstance(arguments.get("max_time"), int | float):  # YAML reads 12:00:00 to the base of 60
        raise ValueError("max_time needs quotes in YAML: '00:12:00:00' is twelve hours")
    if not {"max_epochs", "max_steps", "max_time"} & set(arguments):
        arguments["max_epochs"] = 1000  # Lightning's default, without its warning
    return arguments | choose_strategy(arguments)


def _built(value: Any) -> Any:
    """Build the blocks in a Trainer argument, such as a list of plugins."""
    if isinstance(value, Mapping) and "target" in value:
        return instantiate_from_config(value)
    return [_built(item) for item in value] if isinstance(value, list) else value


def build_trainer(
    arguments: Mapping[str, Any],
    lightning: Mapping[str, Any],
    project: Mapping[str, Any],
    model: pl.LightningModule,
    run: RunDir,
    wandb_project: str | None = None,
    trust_checkpoint: bool = False,
) -> pl.Trainer:
    """Build the Trainer of a run.

    Args:
        arguments: See :func:`trainer_arguments`.
        lightning: Checked ``lightning`` block.
        project: The ``model`` and ``data`` blocks, to be saved with the run.
        model: The model; takes over accumulation and clipping if it optimizes manually.
        run: Where the run writes.
        wandb_project: Weights & Biases project to log to as well.
        trust_checkpoint: Whether a checkpoint to resume from may hold objects of any class.

    Raises:
        ValueError: The Trainer refuses an argument, or wandb is asked for and not installed.
    """
    now = run.start_time()
    arguments = dict(arguments)
    if not model.automatic_optimization:
        arguments = hand_over_optimization(arguments, model)
    loggers = []
    if arguments.pop("logger", True) is not False:
        loggers = build_loggers(lightning.get("logger"), run, now, wandb_project)
    callbacks = build_callbacks(lightning, project, run, now)
    if not loggers:  # Lightning's monitor takes it for a mistake that there is nobody to tell
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if arguments.get("enable_checkpointing", True) and not arguments.get("fast_dev_run"):
        callbacks += build_checkpoints(lightning, model, run)
    # Lightning would otherwise add a checkpoint of its own.
    arguments["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)
    plugins = [*_plugins(arguments.pop("plugins", None)), SafeCheckpointIO(trust_checkpoint)]
    try:
        return pl.Trainer(**arguments, logger=loggers, callbacks=callbacks, plugins=plugins)
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"lightning.trainer: {error}") from error


def _plugins(given: Any) -> list[Any]:
    """The plugins that were given, and Slurm without Lightning's own requeueing.

    That looks for its checkpoint in the folder of the first start, which no other start shares. A
    signal before the end of a job's time saves ``last.ckpt`` instead (`LastCheckpoint`).
    """
    plugins = [*given] if isinstance(given, list | tuple) else [given] if given else []
    known = any(isinstance(plugin, environments.ClusterEnvironment) for plugin in plugins)
    elastic = environments.TorchElasticEnvironment.detect()
    if not known and not elastic and environments.SLURMEnvironment.detect():
        plugins.append(environments.SLURMEnvironment(auto_requeue=False))
    return plugins


def hand_over_optimization(
    arguments: Mapping[str, Any], model: pl.LightningModule
) -> dict[str, Any]:
    """Give accumulation and clipping to a model that optimizes manually.

    Returns:
        The Trainer arguments that are left.

    Raises:
        ValueError: The model cannot take them, or one is out of range.
    """
    names = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
    batches, algorithm = (arguments.get(name) for name in names[::2])
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        raise ValueError(
            f"accumulate_grad_batches must be a whole number of at least 1, got {batches!r}"
        )
    if algorithm not in (None, "norm", "value"):
        raise ValueError(f"gradient_clip_algorithm must be 'norm' or 'value', got {algorithm!r}")
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    if given and not isinstance(model, ManualOptimization):
        raise ValueError(
            f"{type(model).__name__} optimizes manually and has no {', '.join(names)}, "
            f"so leave out {', '.join(given)}"
        )
    for name, value in given.items():
        setattr(model, name, value)
    return {name: value for name, value in arguments.items() if name not in names}


def learning_rate_scale(
    arguments: Mapping[str, Any], data: Mapping[str, Any], world_size: int
) -> int:
    """Return the number of images per optimizer step: accumulate x devices and nodes x batch size.

    Args:
        arguments: Trainer arguments.
        data: The ``data`` block.
        world_size: Number of training processes.

    Raises:
        ConfigError: The batch size is not known.
    """
    accumulate = arguments.get("accumulate_grad_batches") or 1
    batch_size = (data.get("params") or {}).get("batch_size")
    if batch_size is None:
        raise ConfigError("data.params.batch_size is needed; or pass --scale_lr false")
    scale = accumulate * world_size * batch_size
    logger.info(
        "learning rate = %s x base: %s (accumulate) x %s (devices) x %s (batch size)",
        *(scale, accumulate, world_size, batch_size),
    )
    return scale


def fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    checkpoint: Path | str | None,
) -> None:
    """Train, from a checkpoint if there is one.

    Raises:
        PreparationError: Something was wrong before the data could be read.
    """
    if checkpoint is not None:
        logger.info(
            "resuming from %s: optimizers keep the learning rates stored there; if it was saved "
            "within an epoch, as many batches as were left are drawn anew from all images",
            checkpoint,
        )
    try:
        trainer.fit(model, datamodule=data, **_resume_arguments(trainer, checkpoint))
    except (ValueError, OSError, RuntimeError, UnpicklingError, MisconfigurationException) as error:
        if trainer.val_dataloaders is not None or trainer.train_dataloader is not None:
            raise
        text = str(error).strip() or type(error).__name__
        title, *details = [line.strip() for line in text.splitlines()]
        if title.startswith("Error(s) in loading state_dict"):
            title = f"{checkpoint} does not fit the model:"
        raise PreparationError(" ".join([title, *details])) from error


def test(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    checkpoint: Path | str | None,
) -> None:
    """Test the model, if it defines how; data without a test set are passed over."""
    if is_overridden("test_step", model) and is_overridden("test_dataloader", data):
        trainer.test(model, datamodule=data, **_resume_arguments(trainer, checkpoint))


def _resume_arguments(trainer: pl.Trainer, checkpoint: Path | str | None) -> dict[str, Any]:
    """Return the arguments by which the Trainer continues from a checkpoint.

    Where Lightning can (2.6 and later), only plain tensors and values are read from the file, so
    that a downloaded checkpoint cannot run code.
    """
    if checkpoint is None:
        return {}
    safe = "weights_only" in inspect.signature(trainer.fit).parameters
    return {"ckpt_path": str(checkpoint), **({"weights_only": True} if safe else {})}


def quiet_lightning() -> None:
    """Hide Lightning's advertisements and its warnings about things that are as they should be."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
