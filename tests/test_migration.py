"""The page for those who come from the original keeps its word."""

import ast
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from taming.modules.vqvae.quantize import VectorQuantizer2

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs/migration.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"([\w/]+\.py)::(test_\w+)", PAGE)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_it_names_is_there(file: str) -> None:
    module = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    there = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    assert {test for other, test in NAMED if other == file} <= there


def test_every_reported_problem_has_a_test() -> None:
    reported = PAGE.partition("## What users reported")[2].partition("\nAlso:")[0]
    items = re.split(r"^(\d+)\. ", reported, flags=re.MULTILINE)[1:]
    assert items[::2] == [str(number) for number in range(1, 26)]
    assert all("::test_" in text for text in items[1::2])


def test_every_file_that_it_names_is_there() -> None:
    root = TESTS.parent
    for name in re.findall(r"(?:scripts|benchmarks)/\w+\.py", PAGE):
        assert (root / name).is_file(), name
    for name in re.findall(r"`(\w+\.yaml)`", PAGE):
        assert (root / "configs" / name).is_file(), name


def test_the_used_codes_are_exported_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests of scripts/evaluate.py see to it that it writes this histogram."""
    (code,) = re.findall(r"^ *```python\n(.*?)```", PAGE, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    counts = {"histograms": {"val/codes": [0, 3, 0, 1, 7]}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/evaluation.json").write_text(json.dumps(counts))
    exec(textwrap.dedent(code), {})
    assert np.load("used.npy").tolist() == [1, 3, 4]
    assert VectorQuantizer2(5, 2, beta=0.25, remap="used.npy").re_embed == 3
