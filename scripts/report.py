"""Collect the results of a tokenizer and a prior in one self-contained HTML page.

python scripts/report.py results/demo
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
from pathlib import Path
from typing import Any

from taming.run import cli
from taming.util import replacing

logger = logging.getLogger("taming.report")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
img { max-width: 100%; image-rendering: auto }
table { border-collapse: collapse } td { padding: .2rem 1.5rem .2rem 0; border-top: 1px solid #ddd }
td:last-child { text-align: right; font-variant-numeric: tabular-nums }
p { color: #555 } h2 { margin-top: 2.5rem }
"""


def summary(tokenizer: dict[str, Any], prior: dict[str, Any]) -> list[tuple[str, str]]:
    """Format the rows of the table: name, value with unit."""
    tokens = tokenizer["tokens_per_image"]
    mean = sum(tokens) / len(tokens)
    outside = 100 * tokenizer["val/never_within_threshold"]
    return [
        ("validation PSNR", f"{tokenizer['val/psnr']:.2f} dB"),
        ("mean turns per site", f"{tokenizer['val/mean_length']:.2f}"),
        ("tokens per image, site ends included", f"{mean:.1f} ({min(tokens)} to {max(tokens)})"),
        ("codebook usage", f"{100 * tokenizer['val/usage']:.1f} %"),
        ("codebook perplexity", f"{tokenizer['val/perplexity']:.1f}"),
        ("sites never within the threshold", f"{outside:.1f} %"),
        ("prior, bits per token", f"{prior['val/bits_per_token']:.2f}"),
        ("prior, bits per image", f"{prior['val/bits_per_image']:.0f}"),
    ]


def draw_histograms(tokenizer: dict[str, Any]) -> bytes:
    """Draw the histograms of turns per site and tokens per image; returns a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    turns = tokenizer["histograms"]["val/lengths"][1:]
    left.bar(range(1, len(turns) + 1), [count / sum(turns) for count in turns], color="#b5367a")
    left.set(xlabel="turns of a site", ylabel="share of sites", xticks=range(1, len(turns) + 1))
    right.hist(tokenizer["tokens_per_image"], bins=20, color="#fb8861")
    right.set(xlabel="tokens of an image, site ends included", ylabel="images")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()


def picture(png: bytes, title: str) -> str:
    """Return an image element with an embedded PNG."""
    code = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{code}">'


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
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
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
            picture(draw_histograms(tokenizer), "lengths"),
        ),
        ("Samples", "New images from the prior.", pictures(folder / "samples", "grid.png")),
        (
            "Completions",
            "A held-out photograph, its known half, and the other half as sampled by the prior.",
            pictures(folder / "completions", "*_completed.png"),
        ),
    ]
    body = "".join(f"<h2>{title}</h2><p>{text}</p>{content}" for title, text, content in sections)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>loopy-taming</title>'
        f"<style>{STYLE}</style><h1>A loopy VQGAN and its prior</h1><table>{cells}</table>{body}"
        "</html>"
    )


def main() -> None:
    """Save ``report.html`` in a folder with evaluations, reconstructions and samples."""
    parser = cli.script_parser(__doc__, device=False)
    where = "folder with tokenizer.json, prior.json and the pictures"
    parser.add_argument("folder", type=Path, help=where)
    folder = parser.parse_args().folder
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    prior = json.loads((folder / "prior.json").read_text())
    rows = summary(tokenizer, prior)
    html_page = page(folder, tokenizer, rows)
    with replacing(folder / "report.html") as part:
        part.write_text(html_page, encoding="utf-8")
    for name, value in rows:
        logger.info("%-38s %s", name, value)
    logger.info("\nresults: %s\nreport:  %s", folder.resolve(), (folder / "report.html").resolve())


if __name__ == "__main__":
    cli.run(main)
