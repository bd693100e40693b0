"""A run: its folder, the configuration it was made with, and the model it left.

``logs/<time>_<name>/`` holds ``checkpoints`` (``last.ckpt`` and the best ones), ``configs`` (what
was run) and ``images``. Nothing here imports torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from taming.config import (
    ConfigError,
    LoadedConfig,
    check_block,
    check_keys,
    instantiate_from_config,
    load_config,
)
from taming.signature import signature_of

# Processes that Lightning starts by running the command again find their parent's run here.
_RUN_VARIABLE = "TAMING_RUN"

DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "setup_callback": {"target": "taming.callbacks.SetupCallback"},
    "rng_state": {"target": "taming.resume.RngState"},
    "image_logger": {"target": "taming.callbacks.ImageLogger"},
    "codebook_telemetry": {"target": "taming.callbacks.CodebookTelemetry"},
    "learning_rate_logger": {
        "target": "lightning.pytorch.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "last_checkpoint": {"target": "taming.resume.LastCheckpoint"},
}
DEFAULT_LOGGER = {"target": "lightning.pytorch.loggers.TensorBoardLogger"}
DEFAULT_CHECKPOINT = {"target": "lightning.pytorch.callbacks.ModelCheckpoint"}

# Arguments that main adds when it builds these.
_INJECTED = ("now", "logdir", "ckptdir", "cfgdir", "config", "lightning_config", "save_dir")


def _unused_time(is_used: Callable[[str], bool]) -> str:
    """Return the time, to the second, or the next one that is free."""
    now = datetime.now()
    while is_used(text := now.strftime("%Y-%m-%dT%H-%M-%S")):
        now += timedelta(seconds=1)
    return text


class PreparationError(ValueError):
    """Training could not begin because of something the user gave."""


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        """Folder of the configurations that the run was started and resumed with."""
        return self.path / "configs"

    @property
    def images(self) -> Path:
        """Folder of the logged images."""
        return self.path / "images"

    @property
    def last_checkpoint(self) -> Path:
        """Newest checkpoint, from which the run can be resumed."""
        return self.checkpoints / "last.ckpt"

    @property
    def saved_configs(self) -> list[Path]:
        """All saved configurations, oldest first."""
        return sorted(self.configs.glob("*.yaml"))

    @property
    def project_config(self) -> Path:
        """File with the blocks that the run was last trained with.

        A published model has a single one of any name, such as ``model.yaml``.

        Raises:
            ValueError: There is no such file, or it cannot be told which one it is.
        """
        saved = self.saved_configs
        projects = [path for path in saved if path.name.endswith("-project.yaml")]
        if not projects and len(saved) != 1:
            raise ValueError(f"{self.path} has no configs/*-project.yaml, which names its model")
        return (projects or saved)[-1]

    def start_time(self) -> str:
        """Return the time that names the files of this start of the run."""
        return _unused_time(lambda time: any(self.configs.glob(f"{time}-*.yaml")))

    @classmethod
    def new(cls, name: str, root: str | Path = "logs") -> RunDir:
        """Choose a folder that does not exist yet; nothing is written.

        Args:
            name: What stands behind the time.
            root: Folder of all runs.
        """
        if _RUN_VARIABLE in os.environ and int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return cls(Path(os.environ[_RUN_VARIABLE]))
        time = _unused_time(lambda time: (Path(root) / f"{time}_{name}").exists())
        path = Path(root) / f"{time}_{name}"
        os.environ[_RUN_VARIABLE] = str(path.absolute())
        return cls(path)

    @classmethod
    def resume(cls, path: str | Path) -> tuple[RunDir, Path]:
        """Find the run that a run folder or one of its checkpoints belongs to.

        Args:
            path: ``logs/<run>`` or ``logs/<run>/checkpoints/<file>.ckpt``.

        Returns:
            The run and the checkpoint (``last.ckpt`` for a folder).

        Raises:
            FileNotFoundError: There is no such path, or the run has no checkpoint yet.
            ValueError: It is not a run.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"the run {path} does not exist")
        run = cls(path if path.is_dir() else path.absolute().parent.parent)
        if not run.saved_configs:
            raise ValueError(
                f"{path}: {run.path} is no run, for it has no configs/*.yaml; "
                "give logs/<run> or logs/<run>/checkpoints/<file>.ckpt"
            )
        checkpoint = run.last_checkpoint if path.is_dir() else path
        if not checkpoint.exists():
            raise FileNotFoundError(f"the run {path} has no {checkpoint}")
        return run, checkpoint


def run_name(name: str, base: Sequence[str], postfix: str = "") -> str:
    """Return the name of a new run: ``name``, or the first file's, and the postfix."""
    return (name or (Path(base[0]).stem if base else "run")) + postfix


def model_from_run(run: str | Path, **params: Any) -> Any:
    """Build the model of a run with its trained weights, in evaluation mode.

    A prior's YAML names its tokenizer so:
    ``first_stage_config: {target: taming.experiment.model_from_run, params: {run: logs/<run>}}``.

    Args:
        run: Run folder (its ``last.ckpt`` is read) or one of its checkpoints.
        **params: Replace entries of the saved ``model.params``.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is no run.
    """
    project, checkpoint = _project(run)
    block = project["model"]
    params = {**(block.get("params") or {}), **params}
    return trained_model({"target": block["target"], "params": params}, checkpoint)


def trained_model(block: Mapping[str, Any], checkpoint: str | Path) -> Any:
    """Build a model with the weights of a checkpoint, in evaluation mode.

    Args:
        block: ``{target, params}``. A ``ckpt_path`` anywhere in it is where a part once started
            from; since the checkpoint holds all weights, that file is neither needed nor read, and
            nothing of the checkpoint is left out.
        checkpoint: File with all weights of the model.
    """
    params = {**without_starts(block.get("params") or {}), "ckpt_path": str(checkpoint)}
    return instantiate_from_config({"target": block["target"], "params": params}).eval()


def without_starts(block: Mapping[str, Any]) -> dict[str, Any]:
    """Leave every ``ckpt_path``, and its ``ignore_keys``, out of a block and those inside it."""
    return {
        key: without_starts(value) if isinstance(value, Mapping) else value
        for key, value in block.items()
        if key not in ("ckpt_path", "ignore_keys")
    }


def data_from_run(run: str | Path) -> Any:
    """Build the data module of a run, ready for validation.

    Args:
        run: Run folder or one of its checkpoints.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is no run.
    """
    data = instantiate_from_config(_project(run)[0]["data"])
    data.prepare_data()
    data.setup("validate")
    return data


def _project(run: str | Path) -> tuple[dict[str, Any], Path]:
    """The model and data blocks that a run was last trained with, and its checkpoint."""
    folder, checkpoint = RunDir.resume(run)
    return load_config([folder.project_config]).values, checkpoint


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
    check_keys(config, "", values, ["model", "data", "lightning"])
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
    for name, default in (("logger", DEFAULT_LOGGER), ("modelcheckpoint", DEFAULT_CHECKPOINT)):
        block = lightning.get(name) or {}
        check_keys(config, f"lightning.{name}", block, ["target", "params"])
        merged = merge_block(default, block)
        check_block(config, f"lightning.{name}", merged, injected=_INJECTED)
    callbacks = lightning.get("callbacks") or {}
    if not isinstance(callbacks, Mapping):
        origin = config.origin("lightning.callbacks")
        raise ConfigError(f"{origin}: lightning.callbacks must be name: block, not a list")
    for name, block in callbacks.items():
        check_keys(config, f"lightning.callbacks.{name}", block or {}, ["target", "params"])
    for name, block in callback_blocks(lightning).items():
        check_block(config, f"lightning.callbacks.{name}", block, injected=_INJECTED)
