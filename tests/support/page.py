"""The demo's page, served by the program that a user starts."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def page(folder: Path, *command: Any, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """Run a command of ``taming`` that serves the page; gives its address.

    Args:
        folder: Where the process keeps its temporary files.
        *command: Its name and arguments.
        end: What ends it.
    """
    pytest.importorskip("gradio")
    options = ("--port", "0", "--no_browser", "--device", "cpu")
    process = subprocess.Popen(
        [sys.executable, "-m", "taming", *map(str, command), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr as log:
        try:
            written = ""
            while not (found := re.search(r"open (http://\S+) in a browser", written)):
                line = log.readline()
                assert line, written
                written += line
            yield found[1]
        finally:
            process.send_signal(end)
            rest = log.read()
            assert process.wait(60) == 0, rest
