"""What the programs in ``scripts/`` share: device, seeds, and mistakes told in one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


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


def run(program: Callable[[], None]) -> None:
    """Run a program with its log on the console; a user's mistake becomes one line and exit 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("taming").setLevel(logging.INFO)
    # Configurations name main.*, which stands beside the package, and the user's own modules.
    sys.path += [os.getcwd(), str(Path(__file__).parents[1])]
    try:
        program()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
