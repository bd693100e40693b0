"""Train and test the model that YAML files describe: ``python main.py -b configs/x.yaml -t``.

Torch is imported after the command line is parsed, so that ``--help`` answers at once.
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

from taming.run.check import check_experiment
from taming.run.cli import Console, one_line, one_line_errors
from taming.run.config import load_config
from taming.run.folder import without_starts
from taming.run.options import Options, parse_arguments
from taming.run.parser import program
from taming.run.parts import loading
from taming.run.rundir import Experiment, RunDir, is_first_process, run_name
from taming.run.signals import Interrupted, watch
from taming.util import MAIN_NAMES, get_obj_from_str, instantiate_from_config

if TYPE_CHECKING:
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

logger = logging.getLogger("taming")


def __getattr__(name: str) -> Any:
    """Import what configurations refer to as main.*, on first use."""
    if f"main.{name}" not in MAIN_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return get_obj_from_str(f"main.{name}")


def load(options: Options) -> Experiment:
    """Merge and check the configuration, and find or create the run's folder."""
    run, checkpoint = RunDir.resume(options.resume) if options.resume else (None, None)
    given: dict[str, Any] = {"lightning": {"trainer": options.trainer}} if options.trainer else {}
    if run:  # it no longer needs the checkpoint that it once started from
        given.setdefault("lightning", {})["ckpt_path"] = None
    files = [*(run.saved_configs if run else []), *options.base]
    untrusted = run.configs if run and not options.trust_config else None
    config = load_config(files, options.dotlist, given, untrusted)
    check_experiment(config, train=options.train)
    if options.show:
        sys.stdout.write(config.to_yaml())
        sys.exit()
    model, lightning = config.block("model"), config.values.get("lightning") or {}
    if run:  # all weights are in the checkpoint
        model = without_starts(model)
    else:
        name = run_name(options.name, options.base, options.postfix)
        run = RunDir.new(name, "logs/debug_runs" if options.debug else "logs")
        checkpoint = Path(lightning["ckpt_path"]) if lightning.get("ckpt_path") else None
    blocks = model, config.block("data"), lightning
    wandb = options.project if options.wandb else None
    return Experiment(run, checkpoint, *blocks, wandb, options.trust_checkpoint, config.trials)


def build(options: Options, experiment: Experiment) -> tuple[Any, Any, Any]:
    """Build the Trainer, the model with its learning rate, and the data module."""
    from lightning.pytorch import seed_everything

    from taming.run.memory import build_model
    from taming.run.trainer import build_trainer, learning_rate_scale, trainer_arguments

    arguments = trainer_arguments(experiment)
    seed_everything(options.seed, workers=True)
    data = instantiate_from_config(experiment.data)
    model = build_model(experiment.model)
    trainer = build_trainer(experiment, arguments, model)
    if options.train:
        scale = learning_rate_scale(experiment, trainer.world_size) if options.scale_lr else 1
        model.learning_rate = experiment.model["base_learning_rate"] * scale
    return trainer, model, data


def log_to_console() -> None:
    """Show the log of this package: all of it on the first process, warnings on the others."""
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(Console())


@watch.handling()
def main(argv: Sequence[str] | None = None) -> None:
    """Train and test as the command line (by default that of the process) asks."""
    with one_line_errors():
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
        from taming.run.loggers import quiet_lightning
        from taming.run.trainer import MISTAKES, fit, test

    log_to_console()
    quiet_lightning()
    sys.path.append(os.getcwd())
    # Errors that end in one line: any wrong value before training begins, fewer kinds after.
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError)
    experiment = None
    try:
        experiment = load(options)
        with experiment.run.kept_if_used(), loading(options.resume, options.trust_config):
            trainer, model, data = build(options, experiment)
            mistakes = MISTAKES
            if options.train:
                fit(trainer, model, data, experiment.checkpoint)
            else:
                logger.info("not training; -t trains")
            if not options.no_test:
                test(trainer, model, data, None if options.train else experiment.checkpoint)
    except Interrupted:
        if experiment and experiment.run.last_checkpoint.exists():
            run, command = experiment.run.path, program("python main.py")
            logger.info("the run is saved in %s; go on with: %s -r %s -t", run, command, run)
        elif options.train:
            logger.info("interrupted before the first step: nothing is kept")
        raise
    except Exception as error:
        if options.debug:
            traceback.print_exc()
            pdb.post_mortem(error.__traceback__)
        elif isinstance(error, mistakes):
            sys.stderr.write(f"error: {one_line(error)}\n")
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
