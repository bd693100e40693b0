"""Self-contained HTML pages of results: tables, embedded pictures, histograms."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
img { max-width: 100%; image-rendering: auto }
table { border-collapse: collapse } td { padding: .2rem 1.5rem .2rem 0; border-top: 1px solid #ddd }
td, th { text-align: right; font-variant-numeric: tabular-nums; vertical-align: top }
th { padding-right: 1.5rem } td:first-child, th:first-child { text-align: left }
.text td { text-align: left; overflow-wrap: anywhere }
.text td:first-child { overflow-wrap: normal }
p { color: #555 } h2 { margin-top: 2.5rem }
"""

Section = tuple[str, str, str]  # title, text, content


def picture(png: bytes, title: str) -> str:
    """Return an image element with an embedded PNG."""
    code = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{code}">'


def captioned(png: bytes, caption: str) -> str:
    """Return an image element with its caption above."""
    return f"<p>{html.escape(caption)}</p>{picture(png, caption)}"


def table(rows: Iterable[Sequence[Any]], head: Sequence[Any] = (), kind: str = "numbers") -> str:
    """Return a table element of rows of values, under a head if one is given.

    Args:
        rows: Values by row.
        head: Titles of the columns.
        kind: "numbers" for a table whose columns but the first are, or "text".
    """
    lines = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(value))}</td>' for value in row)}</tr>"
        for row in rows
    )
    first = "".join(f"<th>{html.escape(str(value))}</th>" for value in head)
    return f"<table class={kind}>{f'<tr>{first}</tr>' if head else ''}{lines}</table>"


def page(title: str, start: str, sections: Iterable[Section]) -> str:
    """Return a page: its heading, what stands first, and sections of title, text and content.

    Args:
        title: Plain text.
        start: HTML.
        sections: Title and text, plain; content, HTML.
    """
    body = "".join(
        f"<h2>{html.escape(name)}</h2><p>{html.escape(text)}</p>{content}"
        for name, text, content in sections
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>loopy-taming</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{start}{body}</html>"
    )


def draw_histograms(lengths: Sequence[int], tokens: Sequence[int]) -> bytes:
    """Draw how many sites have each length, and how many images each number of tokens.

    Args:
        lengths: Number of sites of each length, from 0.
        tokens: Tokens of each image.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    turns = lengths[1:]
    left.bar(range(1, len(turns) + 1), [count / sum(turns) for count in turns], color="#b5367a")
    left.set(xlabel="turns of a site", ylabel="share of sites", xticks=range(1, len(turns) + 1))
    right.hist(tokens, bins=20, color="#fb8861")
    right.set(xlabel="tokens of an image, site ends included", ylabel="images")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return buffer.getvalue()
