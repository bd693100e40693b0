"""The same work on each of several files: its report, its means, and the files that fail."""

import json
import logging
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from taming.run.each import each_file
from taming.util import IncompleteError


def test_means_are_those_of_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(path: Path, output: str) -> dict[str, Any]:
        if path.stem == "2":
            raise ValueError("broken")
        number = int(path.stem)
        some = {"ms_ssim": None if number else 0.5, "size": [number, 1]}
        return {"codes": 10**5 * number, "psnr": 20 + number / 8, **some}

    paths, report = [Path(f"{number}.png") for number in range(5)], tmp_path / "report.json"
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(IncompleteError, match="1 of 5 .* first: file 2.png: broken"),
    ):
        each_file(work, paths, [path.name for path in paths], report)
    numbers = json.loads(report.read_text())
    assert [*numbers] == ["0.png", "1.png", "3.png", "4.png"]
    codes, psnr = (mean(row[name] for row in numbers.values()) for name in ("codes", "psnr"))
    expected = f"mean of 4 files: codes {codes:.0f}, psnr {psnr:.4g}"
    assert expected == caplog.messages[-1]
