"""The ``lightning`` block of a configuration: its defaults, and the check of all blocks.

Nothing here imports torch, so that mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taming.run.config import ConfigError, LoadedConfig, check_block, check_keys, check_value
from taming.run.signature import signature_of

DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "setup_callback": {"target": "taming.run.callbacks.SetupCallback"},
    "rng_state": {"target": "taming.run.resume.RngState"},
    "image_logger": {"target": "taming.run.callbacks.ImageLogger"},
    "codebook_telemetry": {"target": "taming.run.callbacks.CodebookTelemetry"},
    "learning_rate_logger": {
        "target": "lightning.pytorch.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "last_checkpoint": {"target": "taming.run.resume.LastCheckpoint"},
}
DEFAULT_LOGGER = {"target": "lightning.pytorch.loggers.TensorBoardLogger"}
DEFAULT_CHECKPOINT = {"target": "lightning.pytorch.callbacks.ModelCheckpoint"}

# Arguments that main adds when it builds these.
_INJECTED = ("now", "logdir", "ckptdir", "cfgdir", "config", "lightning_config", "save_dir")


def merge_block(default: Mapping[str, Any], block: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete a ``{target, params}`` block with the defaults for its target.

    A block without a target takes the default's; one with another target stands alone.
    """
    block = block or {}
    if block.get("target", default["target"]) != default["target"]:
        return dict(block)
    params = {**(default.get("params") or {}), **(block.get("params") or {})}
    return {**default, **block, "params": params}


def callback_blocks(lightning: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Merge the configured callbacks into the default ones; a null entry removes a default."""
    configured = lightning.get("callbacks") or {}
    defaults = {
        name: merge_block(block, configured.get(name)) for name, block in DEFAULT_CALLBACKS.items()
    }
    blocks = {**defaults, **{k: v for k, v in configured.items() if k not in defaults}}
    return {name: b for name, b in blocks.items() if name not in configured or configured[name]}


def check_experiment(config: LoadedConfig, train: bool) -> None:
    """Check a whole configuration before anything of it is built.

    Args:
        config: The merged configuration.
        train: Whether a learning rate is needed.

    Raises:
        ConfigError: Names the file, the key path and the nearest valid name.
    """
    values = config.values
    check_keys(config, "", values, ["model", "data", "lightning", *config.interpolated])
    for name in ("model", "data"):
        if name not in values:
            raise ConfigError(f"there is no {name!r} block; name a YAML file that has one with -b")
    check_block(config, "model", values["model"], extra=["base_learning_rate"])
    check_block(config, "data", values["data"])
    if train and not isinstance(values["model"].get("base_learning_rate"), float | int):
        raise ConfigError(
            f"{config.origin('model')}: model.base_learning_rate must be a number, "
            f"got {values['model'].get('base_learning_rate')!r}"
        )
    _check_lightning(config, values.get("lightning") or {})


def _check_lightning(config: LoadedConfig, lightning: Any) -> None:
    valid = ["trainer", "logger", "modelcheckpoint", "callbacks", "ckpt_path"]
    check_keys(config, "lightning", lightning, valid)
    if lightning.get("ckpt_path") and not Path(lightning["ckpt_path"]).is_file():
        origin = config.origin("lightning.ckpt_path")
        raise ConfigError(f"{origin}: there is no checkpoint {lightning['ckpt_path']} (ckpt_path)")
    trainer = signature_of("lightning.pytorch.Trainer").names
    check_keys(config, "lightning.trainer", lightning.get("trainer") or {}, trainer)
    check_value(config, "lightning.trainer", lightning.get("trainer"))
    for name, default in (("logger", DEFAULT_LOGGER), ("modelcheckpoint", DEFAULT_CHECKPOINT)):
        block = lightning.get(name) or {}
        check_keys(config, f"lightning.{name}", block, ["target", "params"])
        merged = merge_block(default, block)
        check_block(config, f"lightning.{name}", merged, injected=_INJECTED)
        if block:
            lightning[name] = merged  # 1e4 may have become an int
    callbacks = lightning.get("callbacks") or {}
    if not isinstance(callbacks, dict):
        origin = config.origin("lightning.callbacks")
        raise ConfigError(f"{origin}: lightning.callbacks must be name: block, not a list")
    for name, block in callbacks.items():
        check_keys(config, f"lightning.callbacks.{name}", block or {}, ["target", "params"])
    for name, block in callback_blocks(lightning).items():
        check_block(config, f"lightning.callbacks.{name}", block, injected=_INJECTED)
        if name in callbacks:
            callbacks[name] = block
