"""Build the Trainer of a run with its loggers, callbacks and devices, and start it.

The ``lightning`` block of a configuration may set everything; the rest has defaults here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from taming.run.advice import MonitorCheck
from taming.run.checkpoints import SafeCheckpointIO
from taming.run.cli import one_line
from taming.run.defaults import DEFAULT_CHECKPOINT, callback_blocks, merge_block
from taming.run.devices import choose_strategy
from taming.run.loggers import build_loggers
from taming.run.processes import take_over, with_environment
from taming.run.progress import Progress, Summary
from taming.run.rundir import Experiment, PreparationError
from taming.signatures import parameters_of
from taming.util import (
    DataError,
    NonFiniteError,
    WriteError,
    get_obj_from_str,
    instantiate_from_config,
)

logger = logging.getLogger(__name__)

# Errors of a running training that end in one line; others are bugs.
MISTAKES = (PreparationError, DataError, NonFiniteError, WriteError)

# Arguments that a model with manual optimization takes over, since Lightning then refuses them.
_MANUAL = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def trainer_arguments(experiment: Experiment) -> dict[str, Any]:
    """Complete the ``lightning.trainer`` block, and build the blocks inside it.

    Raises:
        ValueError: More GPUs are asked for than are visible, or an argument is out of range.
    """
    if experiment.trials:
        message = "for this start alone, unless a YAML file sets them: %s"
        logger.info(message, ", ".join(f"{k}={v}" for k, v in experiment.trials.items()))
    built = {name: _built(value) for name, value in experiment.trainer.items()}
    arguments: dict[str, Any] = {"default_root_dir": experiment.run.path, **built}
    if arguments.get("precision") in ("bf16-true", "16-true"):
        raise ValueError(
            f"precision {arguments['precision']}: codebooks and the codes of a frozen tokenizer "
            "need weights in float32; train with bf16-mixed"
        )
    if isinstance(arguments.get("max_time"), int | float):  # YAML reads 12:00:00 as base 60
        raise ValueError("max_time needs quotes in YAML: '00:12:00:00' is twelve hours")
    if not {"max_epochs", "max_steps", "max_time"} & arguments.keys():
        arguments["max_epochs"] = 1000  # Lightning's default, without its warning
    return arguments | choose_strategy(arguments)


def _built(value: Any) -> Any:
    """Build the blocks in a Trainer argument, such as a list of plugins."""
    if isinstance(value, Mapping) and "target" in value:
        return instantiate_from_config(value)
    return [_built(item) for item in value] if isinstance(value, list) else value


def build_trainer(
    experiment: Experiment, arguments: Mapping[str, Any], model: LightningModule
) -> Trainer:
    """Build the Trainer of a run from `trainer_arguments`.

    Raises:
        ValueError: The Trainer refuses an argument, or wandb is asked for and not installed.
    """
    arguments = dict(arguments)
    if not model.automatic_optimization:
        if "fsdp" in str(arguments.get("strategy")).lower():
            raise ValueError(
                f"strategy {arguments['strategy']} is for models with one optimizer, such as "
                f"priors; a {type(model).__name__} optimizes manually: use ddp"
            )
        arguments = hand_over_optimization(arguments, model)
    logs = arguments.pop("logger", True) is not False and not arguments.get("fast_dev_run")
    loggers = build_loggers(experiment) if logs else []
    callbacks = build_callbacks(experiment)
    if not loggers:  # with which Lightning's monitor raises an error
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if arguments.get("enable_checkpointing", True) and not arguments.get("fast_dev_run"):
        callbacks += build_checkpoints(experiment, model)
    if arguments.get("enable_progress_bar") is not False:
        callbacks += [] if any(isinstance(c, ProgressBar) for c in callbacks) else [Progress()]
    if arguments.get("enable_model_summary", True):
        has_own = any(isinstance(c, ModelSummary) for c in callbacks)
        callbacks += [] if has_own else [Summary()]
    arguments["enable_model_summary"] = False  # it would add one of its own
    # Lightning would otherwise add a checkpoint callback of its own.
    arguments["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in callbacks)
    io = SafeCheckpointIO(experiment.trust_checkpoint)
    plugins = [*with_environment(arguments.pop("plugins", None)), io]
    try:
        trainer = Trainer(**arguments, logger=loggers, callbacks=callbacks, plugins=plugins)
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"lightning.trainer: {' '.join(str(error).split())}") from error
    take_over(trainer)
    return trainer


def hand_over_optimization(arguments: Mapping[str, Any], model: LightningModule) -> dict[str, Any]:
    """Move accumulation and clipping from Trainer arguments to a model that optimizes manually.

    Raises:
        ValueError: The model has no such attributes, or a value is out of range.
    """
    given = {name: arguments[name] for name in _MANUAL if arguments.get(name) is not None}
    batches = given.get("accumulate_grad_batches")
    algorithm = given.get("gradient_clip_algorithm")
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        raise ValueError(f"accumulate_grad_batches must be an int of at least 1, got {batches!r}")
    if algorithm not in (None, "norm", "value"):
        raise ValueError(f"gradient_clip_algorithm must be 'norm' or 'value', got {algorithm!r}")
    if given and not all(hasattr(model, name) for name in _MANUAL):
        raise ValueError(
            f"{type(model).__name__} optimizes manually and has no {', '.join(_MANUAL)}, "
            f"so leave out {', '.join(given)}"
        )
    for name, value in given.items():
        setattr(model, name, value)
    return {name: value for name, value in arguments.items() if name not in _MANUAL}


def build_callbacks(experiment: Experiment) -> list[Callback]:
    """Build the default and the configured callbacks, except those that save checkpoints.

    Those of a ``fast_dev_run`` save nothing.
    """
    run, blocks = experiment.run, callback_blocks(experiment.lightning)
    added: dict[str, dict[str, Any]] = {
        "setup_callback": {
            "now": experiment.start_time,
            "logdir": run.path,
            "ckptdir": run.checkpoints,
            "cfgdir": run.configs,
            "config": {"model": experiment.model, "data": experiment.data},
            "lightning_config": experiment.lightning,
        },
        "image_logger": {"logdir": run.path},
    }
    if experiment.trainer.get("fast_dev_run"):
        added["image_logger"]["logdir"] = None
        blocks.pop("setup_callback", None)
    callbacks = []
    for name, block in blocks.items():
        if name != "last_checkpoint":
            taken, _ = parameters_of(get_obj_from_str(block["target"]))
            params = {k: v for k, v in added.get(name, {}).items() if k in taken}
            callbacks.append(instantiate_from_config(_with_defaults(block, params)))
    return callbacks


def build_checkpoints(experiment: Experiment, model: LightningModule) -> list[Callback]:
    """Build the callbacks for ``last.ckpt`` and, given a monitor, the three best checkpoints."""
    checkpoints, lightning, directory = [], experiment.lightning, experiment.run.checkpoints
    configured = lightning.get("modelcheckpoint")
    given = (configured or {}).get("params") or {}
    monitor = given.get("monitor") or getattr(model, "monitor", None)
    if configured or monitor:
        often = {"every_n_train_steps", "train_time_interval"} & {*given}
        several = often or "val_check_interval" in experiment.trainer  # in an epoch
        params: dict[str, Any] = {
            "dirpath": str(directory),
            "filename": "{epoch:06}-{step:09}" if several else "{epoch:06}",
            "enable_version_counter": False,  # a resumed run replaces the files
        }
        if monitor:
            is_gain = monitor.endswith(("psnr", "ssim", "usage", "perplexity"))
            params |= {"monitor": monitor, "save_top_k": 3, "mode": "max" if is_gain else "min"}
        block = _with_defaults(merge_block(DEFAULT_CHECKPOINT, configured), params)
        checkpoints = [instantiate_from_config(block), MonitorCheck(block["params"].get("monitor"))]
    if last := callback_blocks(lightning).get("last_checkpoint"):
        # After the others, so that last.ckpt holds the paths of the best ones.
        checkpoints.append(instantiate_from_config(_with_defaults(last, {"ckptdir": directory})))
    return checkpoints


def _with_defaults(block: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    return {**block, "params": {**params, **(block.get("params") or {})}}


def learning_rate_scale(experiment: Experiment, devices: int) -> int:
    """Return the images per optimizer step: accumulation x devices x nodes x batch size.

    Raises:
        ValueError: The ``data`` block has no batch size.
    """
    accumulate = experiment.trainer.get("accumulate_grad_batches") or 1
    batch_size = (experiment.data.get("params") or {}).get("batch_size")
    if batch_size is None:
        raise ValueError("data.params.batch_size is missing; set it, or pass --scale_lr false")
    scale = accumulate * devices * batch_size
    logger.info(
        "learning rate = %s x base: %s (accumulate) x %s (devices x nodes) x %s (batch size)",
        *(scale, accumulate, devices, batch_size),
    )
    return scale


class _Steps(Callback):
    """Know if this start has taken a step."""

    def __init__(self) -> None:
        self.first: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step

    def taken(self, trainer: Trainer) -> bool:
        return self.first is not None and trainer.global_step > self.first


def fit(
    trainer: Trainer, model: LightningModule, data: LightningDataModule, checkpoint: Path | None
) -> None:
    """Train, from a checkpoint if there is one.

    Raises:
        PreparationError: An error before the first step, such as sizes that do not fit.
    """
    if checkpoint is not None:
        logger.info(
            "resuming from %s: optimizers keep the learning rates stored there, the run its seed",
            checkpoint,
        )
    steps = _Steps()
    trainer.callbacks.insert(0, steps)  # type: ignore[attr-defined]
    try:
        if checkpoint is None and (fetch := getattr(model, "fetch_weights", None)):
            fetch()  # before the data are built, which may take long
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if checkpoint is not None and not steps.taken(trainer):
            logger.info("this training was at its end; %s lets it go on", _raise_limit(trainer))
    except MISTAKES:
        raise
    except (ValueError, OSError, RuntimeError, UnpicklingError, MisconfigurationException) as error:
        if steps.taken(trainer):
            raise
        line = one_line(error)
        if line.startswith("Error(s) in loading state_dict"):
            line = f"{checkpoint} does not fit the model:{line.partition(':')[2]}"
        raise PreparationError(line) from error


def _raise_limit(trainer: Trainer) -> str:
    """Return the flag to raise for a training that has ended to go on."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    flags = {"--max_epochs": 0 <= epochs <= trainer.current_epoch}
    flags |= {"--max_steps": 0 <= steps <= trainer.global_step}
    return "a larger " + (" and ".join(flag for flag in flags if flags[flag]) or "limit")


def test(
    trainer: Trainer, model: LightningModule, data: LightningDataModule, checkpoint: Path | None
) -> None:
    """Test the model if it has a ``test_step`` and the data have a test set."""
    if is_overridden("test_step", model) and is_overridden("test_dataloader", data):
        trainer.test(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
