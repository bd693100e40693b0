"""Sides of a benchmark that need processes of their own, since their packages have one name.

A worker runs a program that has a `Server`. It does one piece of work for each request, so that
the sides can alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """A program that serves requests on its standard input.

    Args:
        program: Python file, and its arguments.
        path: Folders that come first in its module path.
    """

    def __init__(self, program: Sequence[str | Path], path: Sequence[Path]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, program)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._receive()  # ready

    def request(self) -> dict[str, Any]:
        """Let it do its work once; return what it reports, with ``wall`` and ``cpu`` seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # packages print as well
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")


class Server:
    """The worker's end: `turn` once before each piece of work."""

    def __init__(self) -> None:
        self.started: tuple[float, float] | None = None

    def turn(self, **report: Any) -> None:
        """Report the work since the last turn, and wait for the next request.

        Args:
            **report: Values that JSON can hold; ``wall`` and ``cpu`` seconds are added.
        """
        if self.started:
            wall, cpu = self.started
            report |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            sys.exit()
        self.started = time.perf_counter(), time.process_time()
