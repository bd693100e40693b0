"""The commands and snippets of README and docs, in the order in which a reader meets them."""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README", "CONTRIBUTING", *sorted(f"docs/{p.stem}" for p in ROOT.glob("docs/*.md"))]

_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`((?:python|taming|pip|make)\s[^`]+)`(?!`)")
_PLACEHOLDER = re.compile(r"<([^<>\n]+)>")
_FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))\b")

# Hands every command that bash would start to stdout, its arguments ended by NUL.
_RECORD = """
command_not_found_handle() { printf '%s\\0' "$@"; printf '\\n\\0'; }
"""
_NEXT = "next-block"  # stands between the commands of two blocks


def read(page: str) -> str:
    """Return a page's text."""
    return (ROOT / f"{page}.md").read_text(encoding="utf-8")


def fill(text: str) -> str:
    """Put names in place of what a reader is to fill in: ``<run of x>`` is ``run_of_x``."""
    text = text.replace("<clone>/", "")
    return _PLACEHOLDER.sub(lambda match: re.sub(r"\W+", "_", match[1]), text)


def files(page: str) -> dict[str, str]:
    """Return the blocks that begin with the name of a file: name -> text."""
    texts = [fill(textwrap.dedent(text)) for _, _, text in _FENCE.findall(read(page))]
    return {match[1]: text for text in texts if (match := _FILE.match(text))}


def _expand(scripts: list[str], folder: Path) -> list[list[list[str]]]:
    """Let bash read scripts, one after the other; return the commands that each would start."""
    text = f"{_RECORD}{f'{chr(10)}{_NEXT}{chr(10)}'.join(scripts)}"
    done = subprocess.run(
        ["/bin/bash", "-eu", "-c", text],
        cwd=folder,
        env={"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    blocks: list[list[list[str]]] = [[]]
    for command in filter(None, done.stdout.split("\0\n\0")):
        if command == _NEXT:
            blocks.append([])
        else:
            blocks[-1].append(command.split("\0"))
    return blocks


def steps(page: str, folder: Path) -> Iterator[tuple[str, str | list[list[str]]]]:
    """Yield what a page has to be tried: its language and, for bash, the commands; else the text.

    Args:
        page: One of PAGES.
        folder: Where bash looks for files that match a pattern.
    """
    blocks = [(kind, fill(textwrap.dedent(text))) for _, kind, text in _FENCE.findall(read(page))]
    shell = _expand([text for kind, text in blocks if kind == "bash"], folder)
    for kind, text in blocks:
        if kind == "bash":
            yield kind, shell.pop(0)
        elif kind != "python" or not _FILE.match(text):
            yield kind, text
    outside = _FENCE.sub("", read(page))
    for text in _INLINE.findall(outside):
        yield "inline", _expand([fill(" ".join(text.split()))], folder)[0]
