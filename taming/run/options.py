"""The command line of ``main.py``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf

from taming.run.check import TRAINER
from taming.run.cli import TRUST_HELP
from taming.run.legacy import OLD_TRAINER_ARGUMENTS
from taming.run.parser import Parser, split_overrides
from taming.run.values import members
from taming.signatures import parameters_of
from taming.util import get_obj_from_str

_USAGE = """\
%(prog)s -b CONFIG [CONFIG ...] -t [options] [key=value ...]
       %(prog)s -r logs/RUN -t [options] [key=value ...]"""

_DESCRIPTION = """\
Train the model that one or more YAML files describe. Several files are merged from left to right,
then key=value items override single keys, such as model.params.n_embed=64. A run is saved
in logs/<time>_<name>/{checkpoints,configs,images}."""

_TRAINER_DESCRIPTION = """\
Any other argument of lightning.pytorch.Trainer is taken as --name value. Values are YAML."""

# The common arguments of the Trainer, for --help. Reading all of them from its signature would
# import torch, which takes seconds.
_TRAINER_HELP = {
    "gpus": "'0,' is GPU 0, '0,1' GPUs 0 and 1, 2 any two, -1 all, 0 the CPU (in PowerShell, quote "
    "a value with a comma)",
    "max_epochs": "stop after this many epochs (default: 1000; -1: never)",
    "max_steps": "stop after this many steps of the generator",
    "max_time": "stop after this time, such as 00:12:00:00 for twelve hours",
    "accelerator": "cpu, gpu, mps or auto (default: auto)",
    "devices": "number of devices, or their indices, such as [0,1]",
    "num_nodes": "number of machines",
    "strategy": "such as ddp, the default on several devices",
    "precision": "32-true (default), bf16-mixed or 16-mixed",
    "accumulate_grad_batches": "batches per optimizer step",
    "gradient_clip_val": "clip gradients at this norm",
    "val_check_interval": "validate after this many batches, or this share of an epoch",
    "num_sanity_val_steps": "validation batches before training begins",
    "limit_train_batches": "batches of an epoch (int), or share of them (float)",
    "limit_val_batches": "batches of a validation (int), or share of them (float)",
    "limit_test_batches": "batches of the test (int), or share of them (float)",
    "log_every_n_steps": "steps between logged values",
    "fast_dev_run": "run one batch of everything and save nothing",
    "deterministic": "use deterministic algorithms",
    "enable_progress_bar": "show a progress bar (default: true)",
}

_ONLY_IN_YAML = ("callbacks", "plugins")


@dataclass(frozen=True)
class Options:
    """Command line of ``main.py``.

    Attributes:
        base: YAML files, merged from left to right.
        name: Name of a new run; if empty, the stem of the first file.
        postfix: Appended to the name.
        resume: Run folder or checkpoint to continue; empty for a new run.
        trust_checkpoint: Allow that checkpoint to hold objects of any class.
        trust_config: Build any targets that its run's own configurations name.
        train: Train; otherwise only test.
        no_test: Skip the test after training.
        show: Print the merged configuration and do nothing else.
        debug: Open a debugger at an error; a new run is saved in ``logs/debug_runs``.
        seed: Seed of all random number generators.
        project: Name of the Weights & Biases project.
        wandb: Log to Weights & Biases.
        scale_lr: Multiply the learning rate by accumulation, devices, nodes and batch size.
        trainer: Trainer arguments given as flags, old spellings included.
        dotlist: ``key=value`` items.
    """

    base: list[str]
    name: str
    postfix: str
    resume: str
    trust_checkpoint: bool
    trust_config: bool
    train: bool
    no_test: bool
    show: bool
    debug: bool
    seed: int
    project: str
    wandb: bool
    scale_lr: bool
    trainer: dict[str, Any]
    dotlist: list[str]


def parse_arguments(argv: Sequence[str]) -> Options:
    """Parse the command line of ``main.py``.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The options.

    Raises:
        SystemExit: With status 2 and one line on stderr for a mistake, 0 after ``--help``.
    """
    if {"-h", "--help"} & set(argv):  # which must not import torch
        trainer_types = dict.fromkeys(_TRAINER_HELP, ())
    else:
        parameters, _ = parameters_of(get_obj_from_str(TRAINER))
        trainer_types = {name: members(p.annotation) for name, p in parameters.items()}
    parser = _build_parser(trainer_types)
    dotlist, rest = split_overrides(parser, argv)
    values = vars(parser.parse_args(rest))
    if values["name"] and values["resume"]:
        parser.error("-n/--name names a new run and -r/--resume continues an old one: give one")
    names = (*trainer_types, *OLD_TRAINER_ARGUMENTS)
    trainer = {name: values.pop(name) for name in names if name in values}
    return Options(**values, trainer=trainer, dotlist=dotlist)


def _build_parser(trainer_types: Mapping[str, Sequence[Any]]) -> Parser:
    """Return the parser, with the given arguments of the Trainer: name -> types."""
    parser = Parser(
        prog="main.py",
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=100
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the run").add_argument
    switch: Any = {"nargs": "?", "const": True, "type": _parse_bool, "metavar": "BOOL"}
    off, on = {**switch, "default": False}, {**switch, "default": True}
    add("-b", "--base", nargs="*", action="extend", default=[], metavar="CONFIG", help="YAML files")
    add("-n", "--name", default="", help="name of the run (default: the first file's)")
    add("-f", "--postfix", default="", help="appended to the run's name")
    add("-r", "--resume", default="", metavar="RUN", help="continue a run folder or a checkpoint")
    add("--trust_checkpoint", **off, help="resume from a file that may run code when it is loaded")
    add("--trust_config", **off, help=TRUST_HELP)
    add("-t", "--train", **off, help="train; without it, only test")
    add("--no_test", **off, help="skip the test after training")
    show = "print the configuration, with the file that each value comes from, and do nothing else"
    add("--show", **off, help=show)
    add("-d", "--debug", **off, help="open a debugger at an error")
    add("-s", "--seed", type=int, default=23, help="random seed (default: 23)")
    rate = "learning rate = accumulate x devices x nodes x batch size x base (default: true)"
    add("--scale_lr", **on, help=rate)
    add("--wandb", **off, help="log to Weights & Biases as well")
    add("-p", "--project", default="taming", help="Weights & Biases project (default: taming)")
    add = parser.add_argument_group("the Trainer", _TRAINER_DESCRIPTION).add_argument
    for name, types in {**dict.fromkeys(OLD_TRAINER_ARGUMENTS, (bool,)), **trainer_types}.items():
        value: dict[str, Any] = {"metavar": "VALUE", "default": argparse.SUPPRESS}
        value["type"] = _parse_time if name == "max_time" else _parse_yaml
        if bool in types and name != "gpus":  # a switch needs no value
            value |= {"nargs": "?", "const": True}
        if name not in _ONLY_IN_YAML:
            add(f"--{name}", **value, help=_TRAINER_HELP.get(name, argparse.SUPPRESS))
    return parser


def _parse_yaml(text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"cannot be read as YAML: {text!r}") from error


def _parse_time(text: str) -> Any:
    value = _parse_yaml(text)
    return text if isinstance(value, int | float) else value  # YAML reads 12:00:00 as base 60


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "y", "t", "1"):
        return True
    if text.lower() in ("false", "no", "n", "f", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
