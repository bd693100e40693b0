"""What the programs in ``scripts/`` share: their command lines, checks and errors."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from taming.extras import naming_extras
from taming.run.folder import SavedRun
from taming.run.parser import Parser, split_overrides
from taming.run.parts import place_of
from taming.run.rundir import RunDir
from taming.util import IncompleteError, home, usable_device

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

COMPRESSED = ".loop"  # ending of compressed pictures
TRUST_HELP = "build whatever the configuration of a saved run names: it may run any code"


def existing(text: str) -> str:
    """Return an option's path of a file or folder.

    Raises:
        FileNotFoundError: It is not there; raised before torch is imported.
    """
    if not Path(text).expanduser().exists():
        raise FileNotFoundError(f"there is no file or folder {text}")
    return text


def existing_run(text: str) -> str:
    """Return an option's run, checkpoint or shared model.

    Raises:
        FileNotFoundError: It is not there, and no model of this name ships.
    """
    if not (place := place_of(text)).exists():
        RunDir.resume(place)  # whose error names what is missing
    return text


def rate(text: str) -> float:
    """Return an option's rate.

    Raises:
        ValueError: It is no finite number, or below 0.
    """
    if not 0 <= (value := float(text)) < math.inf:
        raise ValueError
    return value


def script_parser(description: str | None, device: bool = True) -> Parser:
    """Return a parser for a script, with ``--device`` if it computes on one."""
    parser = Parser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, help: str, **options: Any) -> None:
    """Add ``--resume`` with the options given, and those for what the run's files may name."""
    add = parser.add_argument
    add("-r", "--resume", required=True, type=existing_run, help=help, **options)
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


def run_parser(description: str | None) -> Parser:
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


def samples_parser(description: str | None, seed: int) -> Parser:
    """Return a `run_parser` for scripts that sample for the items of a data set."""
    parser = run_parser(description)
    add = parser.add_argument
    add("-o", "--outdir", type=Path, required=True)
    add("--top_k", type=int, default=100, help="sample among the k likeliest tokens")
    add("--temperature", type=float, default=1.0)
    add("-s", "--seed", type=int, default=seed)
    return parser


def parse_run(parser: Parser) -> tuple[argparse.Namespace, SavedRun]:
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
    """Refuse an output folder that cannot be written to, before any work is done.

    Raises:
        ValueError: It, or the folder to create it in, is a file or not writable.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, but results go into a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {there} cannot be written to: choose another with -o")


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


def one_line(error: Exception) -> str:
    """Return the message of an error in one line."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    # A loader process puts its traceback into the message, before the message itself.
    text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(line.strip() for line in text.splitlines())


class Console(logging.StreamHandler[TextIO]):
    """Log to stderr, above the progress bars that stand there instead of behind them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; bars are taken away first, and drawn again below it."""
        from tqdm import tqdm  # not needed by --help

        with tqdm.external_write_mode(self.stream):
            super().emit(record)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr: status 1 for inputs that cannot be used, 2 else.

    Mistakes are ValueErrors and OSErrors, or a package that an extra brings and that is missing.
    """
    try:
        with naming_extras():
            yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(1 if isinstance(error, IncompleteError) else 2)


def run(program: Callable[[], None]) -> None:
    """Run a script with its log on the console.

    Its exit status is that of `one_line_errors`, or 130 after Ctrl-C; docs/quickstart.md has all.

    Args:
        program: Function without arguments; may raise ValueError or OSError for mistakes.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Console()])
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
