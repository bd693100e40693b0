"""Every notebook runs from top to bottom, at the smallest numbers."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TINY = {
    "quickstart.ipynb": {"STEPS": 2, "PRIOR_STEPS": 2, "SIDE": 3},
    "quantizers.ipynb": {"STEPS": 2, "SIZE": 16},
}


def cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_run() -> None:
    assert sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")) == sorted(TINY)


@pytest.mark.parametrize("name", list(TINY))
def test_runs_from_top_to_bottom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(logging.getLogger("taming"), "handlers", [])
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(name):
        code = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(re.findall(r"^(\w+) =", code, flags=re.MULTILINE)) == set(TINY[name])
            code = "\n".join(f"{key} = {value}" for key, value in TINY[name].items())
        exec(compile(code, f"{name}:{cell['id']}", "exec"), names)


@pytest.mark.parametrize("name", list(TINY))
def test_holds_no_output(name: str) -> None:
    """What a notebook shows follows from the code; stored pictures would only grow old."""
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(name))
