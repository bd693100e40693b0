"""Time several functions in turn, and keep the results with the machine and the versions.

Shared machines are noisy: one slow second must not fall on one side alone. So the sides alternate,
and processor time stands beside wall time.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Seconds of one side.

    Attributes:
        wall: Median wall time of a call.
        cpu: Median processor time of a call, of all threads of this process.
        spread: Difference of the quartiles of ``cpu``, over its median.
    """

    wall: float
    cpu: float
    spread: float


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Call each side once untimed, then all sides in turn.

    Args:
        sides: Name -> function.
        repeats: Number of timed rounds, at least 2.

    Returns:
        Name -> its times.
    """
    for function in sides.values():
        function()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, function in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: summary(rounds) for name, rounds in times.items()}


def summary(rounds: list[tuple[float, float]]) -> Timing:
    """Summarise the (wall, processor) seconds of the rounds of one side."""
    walls, cpus = zip(*rounds, strict=True)
    low, middle, high = statistics.quantiles(cpus, n=4, method="inclusive")
    return Timing(statistics.median(walls), middle, (high - low) / max(middle, 1e-9))


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table; floats have three digits."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Save the rows of a table, and the machine and versions they were measured with, as JSON.

    Args:
        name: Stem of the file in ``benchmarks/results``.
        rows: One mapping per row.

    Returns:
        The file.
    """
    machine = {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return file


def _processor() -> str:
    """Return the processor's name; Linux has it in /proc/cpuinfo only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
