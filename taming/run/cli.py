"""The command line of ``main.py``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf

from taming.run.config import split_overrides
from taming.run.legacy import OLD_TRAINER_ARGUMENTS
from taming.run.signature import Signature, signature_of
from taming.run.source import nearest

_USAGE = """\
main.py -b CONFIG [CONFIG ...] -t [options] [key=value ...]
       main.py -r logs/RUN -t [options] [key=value ...]"""

_DESCRIPTION = """\
Trains what one or more YAML files describe. Several files are merged from left to right, then
key=value items override single keys, such as model.params.n_embed=64. Everything that a run leaves
lies in logs/<time>_<name>/{checkpoints,configs,images}."""

# An argument's name and the first sentence about it in a Google-style docstring.
_ARGUMENT_DOC = re.compile(r"^ {4}(\w+): (.+?)(?:\.\s|\n\n)", re.MULTILINE | re.DOTALL)

_ONLY_IN_YAML = ("callbacks", "plugins")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        base: YAML files, merged from left to right.
        name: Name of a new run; empty takes the first file's.
        postfix: Appended to the name.
        resume: Run folder or checkpoint to continue; empty starts a new run.
        trust_checkpoint: Whether that checkpoint may hold objects of any class.
        train: Whether to train.
        no_test: Whether to skip the test after training.
        debug: Whether an error opens a debugger and a new run goes to ``logs/debug_runs``.
        seed: Seed of all random number generators.
        project: Name of the Weights & Biases project.
        wandb: Whether to log to Weights & Biases.
        scale_lr: Whether the learning rate grows with accumulation, devices and batch size.
        trainer: Trainer arguments given as flags, old spellings included.
        dotlist: ``key=value`` items.
    """

    base: list[str]
    name: str
    postfix: str
    resume: str
    trust_checkpoint: bool
    train: bool
    no_test: bool
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
    """Read the command line.

    Args:
        argv: Arguments without the program's name.

    Returns:
        What they ask for.

    Raises:
        SystemExit: With status 2 and one line on stderr for a mistake, 0 after ``--help``.
    """
    trainer_signature = signature_of("lightning.pytorch.Trainer")
    parser = _build_parser(trainer_signature)
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
    names = [*trainer_signature.names, *OLD_TRAINER_ARGUMENTS]
    trainer = {name: values.pop(name) for name in names if name in values}
    return Options(**values, trainer=trainer, dotlist=dotlist)


def _build_parser(trainer: Signature) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=100
        ),
        allow_abbrev=False,
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "-b", "--base", nargs="*", action="extend", default=[], metavar="CONFIG", help="YAML files"
    )
    run.add_argument("-n", "--name", default="", help="name of the run (default: the first file's)")
    run.add_argument("-f", "--postfix", default="", help="appended to the run's name")
    run.add_argument(
        "-r", "--resume", default="", metavar="RUN", help="continue a run folder or a checkpoint"
    )
    _add_switch(
        run,
        "--trust_checkpoint",
        default=False,
        help="resume from a file that may run code when it is read",
    )
    _add_switch(run, "-t", "--train", default=False, help="train; without it, only test")
    _add_switch(run, "--no-test", default=False, help="skip the test after training")
    _add_switch(run, "-d", "--debug", default=False, help="open a debugger at an error")
    run.add_argument("-s", "--seed", type=int, default=23, help="random seed (default: 23)")
    _add_switch(
        run,
        "--scale_lr",
        default=True,
        help="learning rate = accumulate x devices x batch size x base rate (default: true)",
    )
    _add_switch(run, "--wandb", default=False, help="log to Weights & Biases as well")
    run.add_argument(
        "-p", "--project", default="taming", help="Weights & Biases project (default: taming)"
    )
    _add_trainer_flags(parser, trainer)
    return parser


def _add_switch(group: Any, *flags: str, default: bool, help: str) -> None:
    group.add_argument(
        *flags, nargs="?", const=True, default=default, type=_parse_bool, metavar="BOOL", help=help
    )


def _add_trainer_flags(parser: argparse.ArgumentParser, trainer: Signature) -> None:
    """Add every argument of the current Trainer, and hide the old spellings beside them."""
    group = parser.add_argument_group(
        "the Trainer", "Any argument of lightning.pytorch.Trainer; values are read as YAML."
    )
    group.add_argument(
        "--gpus",
        type=_parse_yaml,
        default=argparse.SUPPRESS,
        help="the original's spelling: '0,' is GPU 0, '0,1' GPUs 0 and 1, 2 any two, -1 all, 0 the "
        "CPU (in PowerShell, quote a value with a comma)",
    )
    described = dict(re.findall(_ARGUMENT_DOC, trainer.doc))
    hidden = {name: "bool" for name in OLD_TRAINER_ARGUMENTS if name != "gpus"}
    kinds = {parameter.name: parameter.annotation for parameter in trainer.parameters} | hidden
    for name, annotation in kinds.items():
        if name in _ONLY_IN_YAML:
            continue
        help = " ".join(described.get(name, "").replace("%", "%%").replace("``", "").split())
        # Only a switch means something without a value.
        bare: dict[str, Any] = {"nargs": "?", "const": True} if "bool" in annotation else {}
        group.add_argument(
            f"--{name}",
            **bare,
            default=argparse.SUPPRESS,
            type=_parse_time if name == "max_time" else _NUMBERS.get(annotation, _parse_yaml),
            metavar="VALUE",
            help=argparse.SUPPRESS if name in hidden else help,
        )


def _parse_float(text: str) -> int | float | None:
    value = _parse_yaml(text)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value  # an int stays one: 1 is one batch, 1.0 all of them
    raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")


def _parse_int(text: str) -> int | None:
    value = _parse_float(text)
    if value is not None and not float(value).is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return None if value is None else int(value)


def _parse_yaml(text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"cannot be read as YAML: {text!r}") from error


def _parse_time(text: str) -> Any:
    value = _parse_yaml(text)
    return text if isinstance(value, int | float) else value  # 12:00:00 to the base of 60


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "y", "t", "1"):
        return True
    if text.lower() in ("false", "no", "n", "f", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


# How the Trainer's arguments that are numbers are read, by their type as its source writes it.
_NUMBERS = {
    "int": _parse_int,
    "Optional[int]": _parse_int,
    "Union[int, float]": _parse_float,
    "Optional[Union[int, float]]": _parse_float,
}
