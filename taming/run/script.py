"""What the programs in ``scripts/`` share: device, saved runs, and mistakes told in one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taming.checkpoint import load_checkpoint
from taming.models.prior import Prior
from taming.modules.util import Labelator
from taming.run.config import ConfigError, LoadedConfig, check_block, load_config, split_overrides
from taming.run.folder import RunDir, trained_model
from taming.util import instantiate_from_config


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name; ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: There is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error


def check_folder(path: Path) -> None:
    """Refuse a file where a folder of results is to be, before the work is done.

    Raises:
        ValueError: It is one.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file, but results go into a folder")


def parse_classes(text: str, n_classes: int) -> list[int]:
    """Read ``3,7`` as labels; ``imagenet`` names all of its 1000.

    Raises:
        ValueError: It is no list of labels, or the model does not know one of them.
    """
    names = list(map(str, range(1000))) if text == "imagenet" else text.split(",")
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"expected class labels such as 3,7, got {text!r}")
    labels = list(map(int, names))
    if max(labels) >= n_classes:
        raise ValueError(
            f"there is no class {max(labels)}: this prior knows the labels 0 to {n_classes - 1}"
        )
    return labels


def labels_of(prior: Prior, classes: str | None, amount: int) -> list[int]:
    """Return the condition of each sample: its class, or the start token of no condition.

    Args:
        prior: Unconditional or class-conditional.
        classes: Labels, such as ``3,7``; None for an unconditional prior.
        amount: Samples, for each class if there are any.

    Raises:
        ValueError: The classes are not what the prior takes.
    """
    if prior.be_unconditional:
        if classes:
            raise ValueError("--classes: this prior is unconditional")
        return [prior.sos_token] * amount
    stage = prior.cond_stage_model
    if not isinstance(stage, Labelator):
        raise ValueError(f"only classes can be given here, not what a {type(stage).__name__} takes")
    if not classes:
        raise ValueError("this prior is class-conditional: give --classes, such as 3,7")
    return [label for label in parse_classes(classes, stage.n_classes) for _ in range(amount)]


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every script takes: ``--device``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for scripts that use a saved run as the original's did; see `parse_run`."""
    parser = script_parser(description)
    parser.add_argument("-r", "--resume", required=True, help="a run's folder, or a checkpoint")
    parser.add_argument(
        "-b",
        "--base",
        nargs="*",
        default=[],
        metavar="CONFIG",
        help="YAML files, merged from left to right into the run's own; key=value items override",
    )
    parser.add_argument(
        "-c",
        "--config",
        nargs="?",
        const=True,
        metavar="CONFIG",
        help="this YAML file instead of the run's own; without a value, the last of --base",
    )
    parser.add_argument(
        "--ignore_base_data",
        action="store_true",
        help="forget the data of the YAML files, to give another on the command line:\n"
        "data='{target: main.DataModuleFromConfig, params: {...}}'",
    )
    return parser


def samples_parser(description: str | None, seed: int) -> argparse.ArgumentParser:
    """Return a parser for scripts that draw samples for a data set."""
    parser = run_parser(description)
    parser.add_argument("-o", "--outdir", type=Path, required=True)
    parser.add_argument("--top_k", type=int, default=100, help="draw among the k likeliest tokens")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("-s", "--seed", type=int, default=seed)
    return parser


@dataclass(frozen=True)
class SavedRun:
    """What a run left, and the configuration to use it with.

    Attributes:
        folder: The run's folder.
        checkpoint: File with the weights.
        config: Configuration, overrides included.
    """

    folder: Path
    checkpoint: Path
    config: LoadedConfig

    def model(self) -> Any:
        """Build the model with its trained weights, in evaluation mode.

        Raises:
            ValueError: The configuration or the checkpoint does not fit.
        """
        return trained_model(self._block("model", extra=["base_learning_rate"]), self.checkpoint)

    def step(self) -> int:
        """Read how many steps the model was trained for."""
        return load_checkpoint(self.checkpoint, lazy=True).get("global_step", 0)

    def data(self) -> Any:
        """Build the data module with all its data sets.

        Raises:
            ValueError: The configuration does not fit.
        """
        data = instantiate_from_config(self._block("data"))
        data.prepare_data()
        data.setup()
        return data

    def _block(self, name: str, extra: list[str] | None = None) -> dict[str, Any]:
        block = self.config.values.get(name)
        if block is None:
            raise ConfigError(f"there is no {name!r} block; name a YAML file that has one with -b")
        check_block(self.config, name, block, extra=extra or [])
        return block


def samples_folder(options: argparse.Namespace, saved: SavedRun) -> Path:
    """Return where the scripts of `samples_parser` write."""
    return options.outdir / f"{saved.step():06}_{options.top_k}_{options.temperature}"


def parse_run(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, SavedRun]:
    """Read a command line with ``key=value`` items, and find the run that it names.

    Returns:
        The options, and the run.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is no run, or a configuration does not fit.
    """
    dotlist, rest = split_overrides(parser, sys.argv[1:])
    options = parser.parse_args(rest)
    run, checkpoint, files = _find_run(options)
    if options.ignore_base_data:
        model = {"model": load_config(files).values.get("model")}
        config = load_config([], dotlist, overrides=model)
    else:
        config = load_config(files, dotlist)
    return options, SavedRun(run.path, checkpoint, config)


def _find_run(options: argparse.Namespace) -> tuple[RunDir, Path, list[Path | str]]:
    """Find a run, its checkpoint, and the configuration files to merge.

    A checkpoint without a run's folder will do if files are given that say what it holds.
    """
    path = Path(options.resume)
    given: list[Path | str] = [options.config] if isinstance(options.config, str) else options.base
    run = RunDir(path.absolute().parents[2])
    if path.is_file() and given and not run.saved_configs:
        checkpoint, files = path, given
    else:
        run, checkpoint = RunDir.resume(path)
        files = [run.project_config, *given]
    return run, checkpoint, files if options.config is None else files[-1:]


def load_network(hub: str, entry: str, **options: Any) -> Any:
    """Load a network, or what prepares its input, as a torch hub repository makes it.

    Args:
        hub: ``owner/name`` on GitHub, or a folder that holds such a repository.
        entry: Name of a function in its ``hubconf.py``.
        **options: Arguments of that function.

    Raises:
        ConnectionError: The repository, or weights that it fetches, cannot be had.
        ValueError: The folder is no such repository, or lacks a package.
    """
    folder = Path(hub)
    is_local = folder.is_dir()
    if is_local and not (folder / "hubconf.py").is_file():
        raise ValueError(f"{folder} has no hubconf.py, so it is no torch hub repository")
    source = "local" if is_local else "github"
    trusted: Any = True  # by naming it; torch declares str alone
    try:
        return torch.hub.load(hub, entry, source=source, trust_repo=trusted, **options)
    except ImportError as error:
        raise ValueError(f"the network {entry} of {hub} needs another package: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"the network {entry} of {hub} is neither a folder here nor to be had from torch hub "
            f"({error}); without a network connection, get https://github.com/{hub} elsewhere and "
            "give its folder with --hub"
        ) from error


def run(program: Callable[[], None]) -> None:
    """Run a program with its log on the console; a user's mistake becomes one line and exit 2.

    Ctrl-C becomes exit 130, as shells have it.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("taming").setLevel(logging.INFO)
    # Configurations name main.*, which stands beside the package, and the user's own modules. The
    # user may have a main.py too.
    sys.path += [str(Path(__file__).parents[2]), os.getcwd()]
    try:
        program()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
