"""The site is built without a warning: no broken link, no name that is nowhere described."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from taming.util import get_obj_from_str

ROOT = Path(__file__).resolve().parents[1]


def test_is_built_strictly(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    makefile = (ROOT / "Makefile").read_text()
    (command,) = (line for line in makefile.splitlines() if "-m sphinx" in line)
    program, *arguments = command.replace("build/docs", str(tmp_path / "site")).split()
    assert program == "$(BIN)/python" and "-W" in arguments
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Reference" in (tmp_path / "site/index.html").read_text(encoding="utf-8")


def targets(value: object) -> set[str]:
    """Find the targets of a configuration."""
    if isinstance(value, dict):
        own = {value["target"]} if isinstance(value.get("target"), str) else set()
        return own.union(*map(targets, value.values()))
    return set().union(*map(targets, value)) if isinstance(value, list) else set()


def test_the_reference_describes_what_recipes_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/reference/*.md"))
    recipes = (yaml.safe_load(file.read_text()) for file in ROOT.glob("configs/**/*.yaml"))
    named = set().union(*map(targets, recipes))
    named = {get_obj_from_str(name) for name in named if name.startswith("taming.")}
    missing = {f"{n.__module__}.{n.__name__}" for n in named if f" {n.__module__}\n" not in pages}
    assert not missing
