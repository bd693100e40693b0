"""The page for those who come from the original keeps its word."""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from taming.modules.vqvae.quantize import VectorQuantizer2

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs/migration.md").read_text(encoding="utf-8")


def _reports(file: Path) -> set[int]:
    """Read the report numbers off the markers ``@pytest.mark.reported(...)`` of a test file."""
    marks = re.findall(r"^@pytest\.mark\.reported\(([\d, ]+)\)", file.read_text(), re.MULTILINE)
    return {int(number) for numbers in marks for number in numbers.split(",")}


def test_every_reported_problem_has_a_test() -> None:
    reported = PAGE.partition("## What users reported")[2].partition("\nAlso:")[0]
    numbers = {int(number) for number in re.findall(r"^(\d+)\. ", reported, re.MULTILINE)}
    assert numbers == set(range(1, 26))
    assert set().union(*map(_reports, TESTS.rglob("test_*.py"))) == numbers


def test_every_file_that_it_names_is_there() -> None:
    root = TESTS.parent
    for name in re.findall(r"(?:scripts|benchmarks|tests/support)/\w+\.py", PAGE):
        assert (root / name).is_file(), name
    for name in re.findall(r"`(\w+\.yaml)`", PAGE):
        assert (root / "configs" / name).is_file(), name


@pytest.mark.reported(19)
def test_the_used_codes_are_exported_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests of scripts/evaluate.py see to it that it writes this histogram."""
    (code,) = re.findall(r"^ *```python\n(.*?)```", PAGE, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    counts = {"rates": {"own": {"histograms": {"codes": [0, 3, 0, 1, 7]}}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/evaluation.json").write_text(json.dumps(counts))
    exec(textwrap.dedent(code), {})
    assert np.load("used.npy").tolist() == [1, 3, 4]
    assert VectorQuantizer2(5, 2, beta=0.25, remap="used.npy").re_embed == 3
