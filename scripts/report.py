"""Collect the results of a tokenizer and a prior in one self-contained HTML page.

python scripts/report.py results/demo
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from taming.run import cli
from taming.run.page import draw_histograms, picture, table
from taming.run.page import page as html_page
from taming.util import replacing

logger = logging.getLogger("taming.report")


def summary(tokenizer: dict[str, Any], prior: dict[str, Any]) -> list[tuple[str, str]]:
    """Format the rows of the table: name, value with unit."""
    own = tokenizer["rates"]["own"]
    codes, tokens = own["codes"], own["per_image"]["tokens"]
    mean = sum(tokens) / len(tokens)
    outside = 100 * codes["never_within_threshold"]
    return [
        ("validation PSNR", f"{own['quality']['PSNR']:.2f} dB"),
        ("mean turns per site", f"{codes['mean_length']:.2f}"),
        ("tokens per image, site ends included", f"{mean:.1f} ({min(tokens)} to {max(tokens)})"),
        ("codebook usage", f"{100 * codes['usage']:.1f} %"),
        ("codebook perplexity", f"{codes['perplexity']:.1f}"),
        ("sites never within the threshold", f"{outside:.1f} %"),
        ("prior, bits per token", f"{prior['codes']['bits_per_token']:.2f}"),
        ("prior, bits per image", f"{prior['codes']['bits_per_image']:.0f}"),
    ]


def pictures(folder: Path, pattern: str) -> str:
    """Return image elements of a folder's matching PNG files, one below the other.

    Raises:
        FileNotFoundError: No file matches.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no file {pattern} in {folder}")
    return "<br>".join(picture(file.read_bytes(), file.stem) for file in files)


def page(folder: Path, tokenizer: dict[str, Any], rows: list[tuple[str, str]]) -> str:
    """Build the HTML page from a folder of pictures, ``tokenizer.json`` and the table's rows."""
    own = tokenizer["rates"]["own"]
    histograms = draw_histograms(own["histograms"]["lengths"], own["per_image"]["tokens"])
    sections = [
        (
            "Reconstructions of held-out photographs",
            "Input, reconstruction, and the number of turns of each site: dark is one, bright is "
            "the largest number.",
            pictures(folder / "reconstructions", "*_compare.png"),
        ),
        (
            "Lengths",
            "Flat sites end after few turns; detailed sites take more.",
            picture(histograms, "lengths"),
        ),
        ("Samples", "New images from the prior.", pictures(folder / "samples", "grid.png")),
        (
            "Completions",
            "A held-out photograph, its known half, and the other half as sampled by the prior.",
            pictures(folder / "completions", "*_completed.png"),
        ),
    ]
    return html_page("A loopy VQGAN and its prior", table(rows), sections)


def main() -> None:
    """Save ``report.html`` in a folder with evaluations, reconstructions and samples."""
    parser = cli.script_parser(__doc__, device=False)
    where = "folder with tokenizer.json, prior.json and the pictures"
    parser.add_argument("folder", type=Path, help=where)
    folder = parser.parse_args().folder
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    prior = json.loads((folder / "prior.json").read_text())
    try:
        rows = summary(tokenizer, prior)
        text = page(folder, tokenizer, rows)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"tokenizer.json and prior.json in {folder} must be what taming evaluate saves of a "
            f"loopy tokenizer and of a prior: {error} is missing"
        ) from error
    with replacing(folder / "report.html") as part:
        part.write_text(text, encoding="utf-8")
    for name, value in rows:
        logger.info("%-38s %s", name, value)
    logger.info("\nresults: %s\nreport:  %s", folder.resolve(), (folder / "report.html").resolve())


if __name__ == "__main__":
    cli.run(main)
