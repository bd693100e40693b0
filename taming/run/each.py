"""The same work on each of several files, as the scripts do it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from taming.data.preprocessing import error_context, refuse_failed, skipping
from taming.util import replacing

logger = logging.getLogger("taming.files")
Output = TypeVar("Output")


def means_of(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the means of what all files have a number of, such as ``codes 61.5, psnr 24.31``.

    Args:
        numbers: File -> name -> value. Values that are no numbers are left out.
    """
    rows, means = [*numbers.values()], []
    for name in rows[0]:
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if len(values) == len(rows):
            mean = sum(values) / len(values)
            means.append(f"{name} {mean:.0f}" if abs(mean) >= 1e4 else f"{name} {mean:.4g}")
    return ", ".join(means)


def each_file(
    work: Callable[[Path, Output], dict[str, Any]],
    paths: Sequence[Path],
    outputs: Sequence[Output],
    report: Path,
) -> None:
    """Work on each file, save a report with the numbers of all as JSON, and log their means.

    A file that cannot be used is named, and the others go on. What was done before a fault is in
    the report.

    Args:
        work: File and output -> numbers of the file.
        paths: The files.
        outputs: Where the work on each file saves what it makes.
        report: The report, in the folder of the outputs.

    Raises:
        IncompleteError: A file could not be used; counts them.
    """
    numbers: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    try:
        for path, output in tqdm(zip(paths, outputs, strict=True), report.stem, len(paths)):
            with skipping(failed), error_context(f"file {path}"):
                numbers[str(path)] = work(path, output)
    finally:
        if numbers:
            with replacing(report) as part:
                part.write_text(json.dumps(numbers, indent=2))
    logger.info("%d of %d files are done: %s", len(numbers), len(paths), report.parent)
    if numbers:
        logger.info("mean of %d files: %s", len(numbers), means_of(numbers))
    refuse_failed(failed, len(paths))
