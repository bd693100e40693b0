"""Plot a logged value of several runs against the step.

python benchmarks/curves.py val/psnr logs/<run> logs/<run> -o curves.png
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from taming.run.cli import run, script_parser


def read(folder: Path, key: str) -> tuple[list[int], list[float]]:
    """Read the steps and values that a run logged, over all starts and resumptions.

    Raises:
        ValueError: The run did not log the value.
    """
    rows = [row for file in sorted(folder.glob("csv/*/metrics.csv")) for row in _rows(file, key)]
    if not rows:
        raise ValueError(f"{folder} has no logs of {key!r}")
    steps, values = zip(*sorted(dict(rows).items()), strict=True)
    return list(steps), list(values)


def _rows(file: Path, key: str) -> list[tuple[int, float]]:
    with file.open(newline="") as lines:
        return [(int(r["step"]), float(r[key])) for r in csv.DictReader(lines) if r.get(key)]


def main() -> None:
    """Save the figure."""
    parser = script_parser(__doc__, device=False)
    parser.add_argument("key", help="name of the value, such as val/psnr")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", default="results/curves.png", type=Path)
    options = parser.parse_args()
    matplotlib.use("agg")
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for folder in options.runs:
        name = folder.resolve().name.partition("_")[2]  # without the time
        axes.plot(*read(folder, options.key), ".-", label=name)
    axes.set(xlabel="steps", ylabel=options.key)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
