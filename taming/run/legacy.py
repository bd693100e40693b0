"""Translate old spellings in configurations: of taming-transformers, and of this project.

taming-transformers was written for PyTorch Lightning 1.0; its YAML files and command lines use
Trainer arguments and classes that no longer exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

_DROPPED = {
    "amp_backend": "mixed precision is PyTorch's own; see precision",
    "amp_level": "mixed precision is PyTorch's own; see precision",
    "auto_lr_find": "set model.base_learning_rate",
    "auto_scale_batch_size": "set data.params.batch_size",
    "auto_select_gpus": "use devices",
    "automatic_optimization": "the model decides",
    "enable_pl_optimizer": "it is always on",
    "flush_logs_every_n_steps": "loggers have their own setting",
    "log_gpu_memory": "use lightning.pytorch.callbacks.DeviceStatsMonitor",
    "move_metrics_to_cpu": "it no longer exists",
    "multiple_trainloader_mode": "it no longer exists",
    "prepare_data_per_node": "the data module decides",
    "process_position": "it belongs to the progress bar",
    "stochastic_weight_avg": "use lightning.pytorch.callbacks.StochasticWeightAveraging",
    "terminate_on_nan": "training always stops at a value that is not finite",
    "track_grad_norm": "it no longer exists",
    "truncated_bptt_steps": "it no longer exists",
    "weights_save_path": "checkpoints are saved in the run's folder",
}

_OLD_STRATEGIES = ("ddp", "ddp2", "ddp_cpu", "ddp_spawn", "dp", "horovod")

# Modules of an earlier version of this project, which saved configurations may name, and
# the modules that hold their classes now.
_MOVED = {
    "taming.callbacks": "taming.run.callbacks",
    "taming.data.imagenet_depth": "taming.data.imagenet",
    "taming.data.imagenet_scale": "taming.data.imagenet",
    "taming.experiment": "taming.run.folder",
    "taming.modules.diffusionmodules.decoders": "taming.modules.diffusionmodules.model",
    "taming.modules.transformer.clusters": "taming.modules.transformer.mingpt",
    "taming.modules.vqvae.classic": "taming.modules.vqvae.quantize",
    "taming.modules.vqvae.gumbel": "taming.modules.vqvae.quantize",
    "taming.modules.vqvae.sequence": "taming.modules.sequence.notations",
    "taming.observers": "taming.run.advice",
    "taming.resume": "taming.run.checkpoints",
}

# Targets that moved alone, or that another one replaces.
_TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
_REPLACED = {
    "cutlit.DataModuleFromConfig": "main.DataModuleFromConfig",
    "taming.checkpoint.SafeCheckpointIO": "taming.run.checkpoints.SafeCheckpointIO",
    "taming.run.callbacks.LastCheckpoint": "taming.run.checkpoints.LastCheckpoint",
    "taming.run.callbacks.RngState": "taming.run.checkpoints.RngState",
    "pytorch_lightning.loggers.TestTubeLogger": _TENSORBOARD,
    "pytorch_lightning.loggers.test_tube.TestTubeLogger": _TENSORBOARD,
}


def parse_gpus(value: Any) -> dict[str, Any]:
    """Translate the original's ``gpus`` to accelerator and devices.

    Args:
        value: ``"0,"`` or ``[0]`` (GPU 0), ``"0,1"`` (GPUs 0 and 1), 2 (any two), -1 (all),
            0 (the CPU) or None (the default).

    Returns:
        Trainer arguments.

    Raises:
        ValueError: The value is anything else.
    """
    if value is None:
        return {}
    text = ",".join(map(str, value)) + "," if isinstance(value, list | tuple) else str(value)
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or isinstance(value, bool) or ("," in text and min(numbers) < 0):
        raise ValueError(
            f"gpus takes '0,' (GPU 0), '0,1' (GPUs 0 and 1), 2 (any two) or -1 (all), got {value!r}"
        )
    if "," in text:
        return {"accelerator": "gpu", "devices": numbers}
    count = numbers[0]
    return {"accelerator": "gpu", "devices": count} if count else {"accelerator": "cpu"}


def _parse_backend(value: Any) -> dict[str, Any]:
    if value in ("dp", "horovod"):
        raise ValueError(f"strategy {value!r} no longer exists; use 'ddp'")
    if value == "ddp_cpu":
        return {"accelerator": "cpu", "strategy": "ddp"}
    return {"strategy": "ddp" if value in ("ddp2", "ddp_spawn") else value} if value else {}


_TRANSLATED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "gpus": parse_gpus,
    "distributed_backend": _parse_backend,
    "num_processes": lambda value: {"devices": value} if value else {},
    "tpu_cores": lambda value: {"accelerator": "tpu", "devices": value} if value else {},
    "progress_bar_refresh_rate": lambda value: {"enable_progress_bar": value != 0},
    "weights_summary": lambda value: {"enable_model_summary": value is not None},
    "reload_dataloaders_every_epoch": (
        lambda value: {"reload_dataloaders_every_n_epochs": int(bool(value))}
    ),
    "checkpoint_callback": lambda value: {"enable_checkpointing": value},
    "replace_sampler_ddp": lambda value: {"use_distributed_sampler": value},
    **{old: (lambda value: {}) for old in _DROPPED},
}

OLD_TRAINER_ARGUMENTS = (*_TRANSLATED, "resume_from_checkpoint")


def modernize(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the old spellings in one configuration (one file, or the command line).

    Args:
        config: Plain nested mapping, with or without ``lightning.trainer``.

    Returns:
        A copy in current spelling. ``lightning.trainer.resume_from_checkpoint`` becomes
        ``lightning.ckpt_path``.

    Raises:
        ValueError: A value has no equivalent.
    """
    result = _modernize_targets(config)
    lightning = result.get("lightning")
    if not isinstance(lightning, dict) or not isinstance(lightning.get("trainer"), dict):
        return result
    trainer = dict(lightning["trainer"])
    if "resume_from_checkpoint" in trainer:
        lightning["ckpt_path"] = trainer.pop("resume_from_checkpoint")
        logger.info("lightning.trainer.resume_from_checkpoint is now lightning.ckpt_path")
    lightning["trainer"] = _modernize_trainer(trainer)
    return result


def _modernize_trainer(trainer: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in trainer.items():
        if name == "accelerator" and value in _OLD_STRATEGIES:
            new = _parse_backend(value)
        elif name == "max_steps" and value is None:
            new = {"max_steps": -1}
        elif name == "profiler" and isinstance(value, bool):
            new = {"profiler": "simple" if value else None}
        elif name == "num_processes" and "devices" in parse_gpus(trainer.get("gpus")):
            new = {}  # it is the number of processes on the CPU
        elif name in _TRANSLATED:
            new = _TRANSLATED[name](value)
        else:
            result.setdefault(name, value)
            continue
        reason = f" ({_DROPPED[name]})" if name in _DROPPED else ""
        logger.info("Trainer argument %s=%s becomes %s%s", name, value, new or "nothing", reason)
        result.update(new)
    if "gpus" in trainer and result.get("accelerator") == "cpu":
        # The run that is resumed, or another file, may have named GPUs.
        result.setdefault("devices", "auto")
    return result


def modernize_target(target: str) -> str:
    """Return the current path of a target."""
    module, _, name = target.rpartition(".")
    if module in _MOVED:
        return f"{_MOVED[module]}.{name}"
    return _REPLACED.get(target) or target.replace("pytorch_lightning.", "lightning.pytorch.", 1)


def _modernize_targets(value: Any) -> Any:
    if isinstance(value, list):
        return [_modernize_targets(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    result = {key: _modernize_targets(item) for key, item in value.items()}
    target = result.get("target")
    if isinstance(target, str) and modernize_target(target) != target:
        result["target"] = modernize_target(target)
        logger.info("target %s becomes %s", target, result["target"])
    return result
