"""Calls scripts as from the command line, and looks at what they wrote."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from taming.script import run


def call(script: str, *argv: Any) -> None:
    """Run a script of ``scripts/`` as from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        importlib.import_module(f"scripts.{script}").main()


def fails(capsys: pytest.CaptureFixture[str], script: str, *argv: Any) -> str:
    """Return the one line that a script ends with."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: call(script, *argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.count("\n") == 1
    return error


def pixels(path: Path) -> np.ndarray:
    """Read a picture as (H, W, C) uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture)
