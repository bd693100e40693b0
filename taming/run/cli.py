"""Command lines of ``main.py`` and of the programs in ``scripts/``."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from omegaconf import OmegaConf

from taming.extras import naming_extras
from taming.run.check import TRAINER
from taming.run.folder import SavedRun
from taming.run.legacy import OLD_TRAINER_ARGUMENTS
from taming.run.values import members
from taming.signatures import parameters_of
from taming.util import get_obj_from_str, home, nearest, usable_device

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_USAGE = """\
main.py -b CONFIG [CONFIG ...] -t [options] [key=value ...]
       main.py -r logs/RUN -t [options] [key=value ...]"""

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

TRUST_HELP = "build whatever the configuration of a saved run names: it may run any code"

_ONLY_IN_YAML = ("callbacks", "plugins")

_OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]]*=")


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


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
    known, unknown = parser.parse_known_args(rest)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            parser.error(f"unexpected argument {flag!r}; an override looks like key=value")
        valid = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown flag {flag}{nearest(flag, valid)}")
    values = vars(known)
    if values["name"] and values["resume"]:
        parser.error("-n/--name names a new run and -r/--resume continues an old one: give one")
    names = (*trainer_types, *OLD_TRAINER_ARGUMENTS)
    trainer = {name: values.pop(name) for name in names if name in values}
    return Options(**values, trainer=trainer, dotlist=dotlist)


def split_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Split a command line into ``key=value`` items, wherever they stand, and the rest.

    Args:
        parser: Parser of the rest; an argument after a flag that needs a value is that value.
        argv: Arguments without the program's name.

    Returns:
        The items, and the arguments for the parser.
    """
    actions = [action for action in parser._actions if action.nargs is None]
    flags = {flag for action in actions for flag in action.option_strings}
    overrides, rest = [], []
    for before, argument in zip(["", *argv], argv, strict=False):
        is_override = _OVERRIDE.match(argument) and before not in flags
        (overrides if is_override else rest).append(argument)
    return overrides, rest


def _build_parser(trainer_types: Mapping[str, Sequence[Any]]) -> argparse.ArgumentParser:
    """Return the parser, with the given arguments of the Trainer: name -> types."""
    parser = _Parser(
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
    add("--no-test", **off, help="skip the test after training")
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


def script_parser(description: str | None, device: bool = True) -> argparse.ArgumentParser:
    """Return a parser for a script, with ``--device`` if it computes on one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, help: str, **options: Any) -> None:
    """Add ``--resume`` with the options given, and those for what the run's files may name."""
    add = parser.add_argument
    add("-r", "--resume", required=True, help=help, **options)
    add("--trust_config", action="store_true", help=TRUST_HELP)
    tokenizer_help = (
        "run of a prior's tokenizer; default: as when the prior was trained, or as near"
    )
    add("--tokenizer", metavar="RUN", help=tokenizer_help)


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of scripts that sample new images; ``defaults`` by name."""
    add = parser.add_argument
    add("-n", "--num_samples", type=int, help="for each class, if any")
    add("--batch_size", type=int)
    add("-t", "--temperature", type=float, default=1.0)
    add("-k", "--top_k", type=int, help="sample among the k likeliest tokens")
    add("-p", "--top_p", type=float, help="sample among the likeliest of this mass")
    add("--classes", help="labels such as 3,7; imagenet stands for all 1000")
    add("-s", "--seed", type=int, default=23)
    parser.set_defaults(**defaults)


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for scripts that use a saved run and take the original's options for it."""
    parser = script_parser(description)
    add = parser.add_argument
    add_run_arguments(parser, "a run's folder, or a checkpoint")
    base_help = "YAML files, merged from left to right into the run's own; key=value items override"
    add("-b", "--base", nargs="*", default=[], metavar="CONFIG", help=base_help)
    config_help = "this YAML file instead of the run's own; without a value, the last of --base"
    add("-c", "--config", nargs="?", const=True, metavar="CONFIG", help=config_help)
    data_help = "ignore the data of the YAML files, to give another on the command line:\n"
    data_help += "data='{target: main.DataModuleFromConfig, params: {...}}'"
    add("--ignore_base_data", action="store_true", help=data_help)
    return parser


def samples_parser(description: str | None, seed: int) -> argparse.ArgumentParser:
    """Return a `run_parser` for scripts that sample for the items of a data set."""
    parser = run_parser(description)
    add = parser.add_argument
    add("-o", "--outdir", type=Path, required=True)
    add("--top_k", type=int, default=100, help="sample among the k likeliest tokens")
    add("--temperature", type=float, default=1.0)
    add("-s", "--seed", type=int, default=seed)
    return parser


def parse_run(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, SavedRun]:
    """Parse the command line of a script, and load the run that it names.

    Args:
        parser: A `run_parser`.

    Returns:
        The options, and the run.

    Raises:
        FileNotFoundError: The run or the checkpoint does not exist.
        ValueError: The path is not a run, or a configuration is wrong.
    """
    dotlist, rest = split_overrides(parser, sys.argv[1:])
    options = parser.parse_args(rest)
    files = [options.config] if isinstance(options.config, str) else options.base
    saved = SavedRun.load(
        options.resume,
        files,
        dotlist,
        alone=options.config is not None,
        ignore_data=options.ignore_base_data,
        tokenizer=options.tokenizer,
        trust_config=options.trust_config,
    )
    return options, saved


def samples_folder(options: argparse.Namespace, saved: SavedRun) -> Path:
    """Return the folder that the scripts with a `samples_parser` write to."""
    return options.outdir / f"{saved.step():06}_{options.top_k}_{options.temperature}"


def check_kind(model: Any, kind: type[T], run: Any, wanted: str) -> T:
    """Return a loaded model, or a `Tokenizer` or `Generator`, if it is of a kind.

    Raises:
        ValueError: The model of ``run`` is of another kind than ``wanted``.
    """
    if not isinstance(model, kind):
        name = type(getattr(model, "model", model)).__name__
        raise ValueError(f"{run} holds a {name}, not {wanted}")
    return model


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: The device is not available on this machine.
    """
    import torch  # not needed by --help

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(name)


def check_folder(path: Path) -> None:
    """Refuse an output folder that is a file, before any work is done.

    Raises:
        ValueError: The path is a file.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file, but results go into a folder")


def refuse_existing(files: Iterable[Path]) -> None:
    """Refuse to overwrite what is there, before any work is done.

    Raises:
        ValueError: Names the first file that exists.
    """
    if there := next((file for file in files if file.exists()), None):
        raise ValueError(f"{there} exists already: choose another folder with -o, or remove it")


def labels_of(prior: Any, classes: str | None) -> list[int] | None:
    """Return the classes to sample, None for an unconditional prior.

    Args:
        prior: An unconditional or class-conditional `Prior`.
        classes: Labels such as ``3,7``; ``imagenet`` stands for all 1000 of ImageNet.

    Raises:
        ValueError: The prior does not take these classes, or needs some.
    """
    if prior.be_unconditional and classes:
        raise ValueError(f"--classes {classes}: this prior is unconditional")
    if prior.be_unconditional:
        return None
    if not classes:
        raise ValueError("this prior is class-conditional: give --classes, such as 3,7")
    names = list(map(str, range(1000))) if classes == "imagenet" else classes.split(",")
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"expected class labels such as 3,7, got {classes!r}")
    labels = list(map(int, names))
    if max(labels) >= prior.n_classes:
        known = f"the labels of this prior are 0 to {prior.n_classes - 1}"
        raise ValueError(f"there is no class {max(labels)}: {known}")
    return labels


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr and exit code 2 for a user's mistake.

    That is a ValueError or an OSError, or a package that an extra brings and that is missing.
    """
    try:
        with naming_extras():
            yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def run(program: Callable[[], None]) -> None:
    """Run a script with its log on the console.

    A user's mistake ends it with one line on stderr and exit code 2, Ctrl-C with exit code 130.

    Args:
        program: Function without arguments; may raise ValueError or OSError for mistakes.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("taming").setLevel(logging.INFO)
    # Configurations name the user's own modules. The current folder comes last, since it may hold
    # another main.py than the one beside the package.
    sys.path += [str(home()), os.getcwd()]
    try:
        with one_line_errors():
            program()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
