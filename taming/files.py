"""The same work on each of several files, as the scripts do it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from taming.data.preprocessing import error_context, refuse_failed, skipping
from taming.util import replacing

logger = logging.getLogger("taming.files")
Row = dict[str, Any]
Remarks = Callable[[Sequence[Row]], Iterable[str]]

ORIGIN = "from"  # what an output follows from, in its row of a report
PAUSE = 10  # times as long as it took to save a report, until it is saved again


def means_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the means of what all files have a number of, such as ``codes 61.5, psnr 24.31``.

    Args:
        rows: Name -> value, of each file. Values that are no numbers are left out. The mean of
            ``bpp``, bits per pixel, is all bits over all pixels: of ``size``, [width, height].
    """
    means = []
    for name in rows[0]:
        values = [row[name] for row in rows if type(row.get(name)) in (int, float)]  # no bool
        if len(values) == len(rows):
            weights = [row["size"][0] * row["size"][1] if name == "bpp" else 1 for row in rows]
            pairs = zip(values, weights, strict=True)
            mean = sum(value * weight for value, weight in pairs) / sum(weights)
            means.append(f"{name} {mean:.0f}" if abs(mean) >= 1e4 else f"{name} {mean:.4g}")
    return ", ".join(means)


def unreached(rows: Sequence[Mapping[str, Any]], target: float | None) -> Iterable[str]:
    """Yield a remark if pictures are not ``reached``: the PSNR wanted, in dB, was beyond them."""
    if count := sum(row.get("reached") is False for row in rows):
        yield f"{count} of {len(rows)} pictures do not reach {target:g} dB, even with all turns"


def each_file(
    work: Callable[[Path, Path], Row],
    paths: Sequence[Path],
    outputs: Sequence[Path],
    report: Path,
    origin: Mapping[str, Any] | None = None,
    remarks: Remarks = lambda rows: (),
) -> None:
    """Work on each file, save a report with the numbers of all as JSON, and log their means.

    A file that cannot be used is named, and the others go on. What was done before a fault is in
    the report.

    Args:
        work: File and output -> numbers of the file.
        paths: The files, each once.
        outputs: Where the work on each file saves what it makes.
        report: The report, in the folder of the outputs.
        origin: What outputs follow from beside their files, such as a rate, of types that JSON has.
            Where it is given, outputs are files that ``work`` names in its numbers, none is
            overwritten, and those that the report lists with the same origin are done already.
        remarks: Numbers of the files -> what is to be said of them at the end.

    Raises:
        IncompleteError: A file could not be used; counts them.
        ValueError: An output exists that is not done already; names it.
    """
    pairs = [*zip(paths, outputs, strict=True)]
    numbers = {} if origin is None else _done(pairs, report, origin)
    todo = [pair for pair in pairs if str(pair[0]) not in numbers]
    if len(todo) < len(paths):
        logger.info("%d of %d files are done already", len(paths) - len(todo), len(paths))
    failed: list[str] = []
    due = 0.0
    try:
        for path, output in tqdm(todo, report.stem):
            with skipping(failed), error_context(f"file {path}"):
                numbers[str(path)] = work(path, output) | _origin_of(path, origin)
                if (start := time.monotonic()) >= due:  # a program may be killed
                    _save(numbers, report)
                    due = start + PAUSE * (time.monotonic() - start)
    except KeyboardInterrupt:
        if origin is not None:
            logger.warning("repeat the command to go on")
        raise
    finally:
        if numbers:
            _save(numbers, report)
    rows = [numbers[str(path)] for path in paths if str(path) in numbers]
    logger.info("%d of %d files are done: %s", len(rows), len(paths), report.parent)
    if rows:
        logger.info("mean of %d files: %s", len(rows), means_of(rows))
    for remark in remarks(rows):
        logger.warning("%s", remark)
    refuse_failed(failed, len(paths))


def _origin_of(path: Path, origin: Mapping[str, Any] | None) -> Row:
    if origin is None:
        return {}
    return {ORIGIN: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **origin}}


def _done(
    pairs: Sequence[tuple[Path, Path]], report: Path, origin: Mapping[str, Any]
) -> dict[str, Row]:
    """Return the rows of a report whose outputs are there, also those of other files.

    Raises:
        ValueError: The output of a file is there without such a row of the same origin.
    """
    try:
        listed = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        listed = {}
    numbers = {
        path: row
        for path, row in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(row, dict) and _names_file(row, report.parent)
    }
    for path, output in pairs:
        row = numbers.get(str(path), {})
        if output.name in row.values() and row.get(ORIGIN) == _origin_of(path, origin)[ORIGIN]:
            continue
        numbers.pop(str(path), None)
        if output.exists():
            raise ValueError(
                f"{output} exists already: choose another folder with -o, or remove it; only the "
                "command that made it goes on here, as long as the file and the settings stay"
            )
    return numbers


def _names_file(row: Row, folder: Path) -> bool:
    return any((folder / value).is_file() for value in row.values() if isinstance(value, str))


def _save(numbers: Mapping[str, Row], report: Path) -> None:
    with replacing(report) as part:
        part.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
