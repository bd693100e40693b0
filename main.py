"""Trains and tests what YAML files describe: ``python main.py -b configs/loopy_vqgan.yaml -t``.

Torch and Lightning are imported only after the command line and the configuration are checked, so
that a misspelt key is reported at once.
"""

from __future__ import annotations

import logging
import os
import pdb
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taming.run.cli import Options, parse_arguments
from taming.run.config import LoadedConfig, get_obj_from_str, instantiate_from_config, load_config
from taming.run.folder import PreparationError, RunDir, is_first_process, run_name, without_starts
from taming.run.lightning_block import check_experiment
from taming.util import DataError, NonFiniteError, WriteError

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LearningRateMonitor

    from taming.data.datamodule import DataModuleFromConfig, WrappedDataset
    from taming.run.callbacks import ImageLogger, SetupCallback

__all__ = [
    "DataModuleFromConfig",
    "ImageLogger",
    "LearningRateMonitor",
    "SetupCallback",
    "WrappedDataset",
    "get_obj_from_str",
    "instantiate_from_config",
    "main",
]

# Configurations name these as main.*; they are imported when somebody asks for them.
_LAZY = {
    "DataModuleFromConfig": "taming.data.datamodule.DataModuleFromConfig",
    "ImageLogger": "taming.run.callbacks.ImageLogger",
    "LearningRateMonitor": "lightning.pytorch.callbacks.LearningRateMonitor",
    "SetupCallback": "taming.run.callbacks.SetupCallback",
    "WrappedDataset": "taming.data.datamodule.WrappedDataset",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return get_obj_from_str(_LAZY[name])


def prepare(options: Options) -> tuple[RunDir, Path | str | None, LoadedConfig]:
    """Find the run, the checkpoint to continue from, and the checked configuration."""
    lightning: dict[str, Any] = {"trainer": options.trainer} if options.trainer else {}
    resumed = RunDir.resume(options.resume) if options.resume else None
    if resumed:  # what the run itself once started from has served
        lightning["ckpt_path"] = None
    overrides = {"lightning": lightning} if lightning else {}
    saved = resumed[0].saved_configs if resumed else []
    config = load_config([*saved, *options.base], options.dotlist, overrides)
    check_experiment(config, train=options.train)
    if resumed:
        return *resumed, config
    root = "logs/debug_runs" if options.debug else "logs"
    run = RunDir.new(run_name(options.name, options.base, options.postfix), root)
    return run, (config.values.get("lightning") or {}).get("ckpt_path"), config


def build(
    options: Options, run: RunDir, config: LoadedConfig
) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
    """Build the Trainer, the model and the data."""
    import lightning.pytorch as pl

    from taming.run import trainer as building

    building.quiet_lightning()
    lightning = config.values.get("lightning") or {}
    arguments = building.trainer_arguments(lightning, run)
    pl.seed_everything(options.seed, workers=True)
    project = {name: config.values[name] for name in ("model", "data")}
    if options.resume:  # all weights are in the checkpoint
        project["model"] = without_starts(project["model"])
    data = instantiate_from_config(project["data"])
    model = instantiate_from_config(project["model"])
    wandb_project = options.project if options.wandb else None
    trainer = building.build_trainer(
        *(arguments, lightning, project, model, run, wandb_project, options.trust_checkpoint)
    )
    if options.train:
        rate = project["model"]["base_learning_rate"]
        if options.scale_lr:
            rate *= building.learning_rate_scale(arguments, project["data"], trainer.world_size)
        model.learning_rate = rate
    return trainer, model, data


def log_to_console() -> None:
    """Show what this package logs; the first of several processes says most."""
    package = logging.getLogger("taming")
    package.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    if not package.handlers:
        package.addHandler(logging.StreamHandler())


def main(argv: Sequence[str] | None = None) -> None:
    """Train and test as the command line (by default, the process's own) asks."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    log_to_console()
    sys.path.append(os.getcwd())
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError)
    try:
        run, checkpoint, config = prepare(options)
        with run.kept_if_used():
            trainer, model, data = build(options, run, config)
            mistakes = (PreparationError, DataError, NonFiniteError, WriteError)
            logging.getLogger("taming").info("the run's folder is %s", run.path)
            from taming.run.trainer import fit, test

            if options.train:
                fit(trainer, model, data, checkpoint)
            else:
                logging.getLogger("taming").info("not training; -t trains")
            if not options.no_test:
                test(trainer, model, data, None if options.train else checkpoint)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
            pdb.post_mortem(error.__traceback__)
        elif isinstance(error, mistakes):
            # A loader process puts its traceback into the message, before the message itself.
            line = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
            sys.stderr.write(f"error: {line}\n")
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
