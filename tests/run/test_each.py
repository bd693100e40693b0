"""The same work on each of several files: its report, its means, and the files that fail."""

import json
import logging
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from taming.files import each_file
from taming.util import IncompleteError


def test_means_are_those_of_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(path: Path, output: Path) -> dict[str, Any]:
        if path.stem == "2":
            raise ValueError("broken")
        number = int(path.stem)
        some = {"ms_ssim": None if number else 0.5, "size": [number + 1, 7], "reached": True}
        return {"codes": 10**5 * number, "psnr": 20 + number / 8, "bpp": 9 / (number + 1), **some}

    paths, report = [Path(f"{number}.png") for number in range(5)], tmp_path / "report.json"
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(IncompleteError, match="1 of 5 .* first: file 2.png: broken"),
    ):
        each_file(work, paths, paths, report)
    numbers = json.loads(report.read_text())
    assert [*numbers] == ["0.png", "1.png", "3.png", "4.png"]
    codes, psnr = (mean(row[name] for row in numbers.values()) for name in ("codes", "psnr"))
    bpp = 4 * 9 / (1 + 2 + 4 + 5)  # as many bits each, of pictures of other widths
    expected = f"mean of 4 files: codes {codes:.0f}, psnr {psnr:.4g}, bpp {bpp:.4g}"
    assert expected == caplog.messages[-1]


class Copying:
    """Work that copies a file, and is interrupted at one of a name."""

    def __init__(self, ends_at: str) -> None:
        self.ends_at, self.seen = ends_at, ""

    def __call__(self, path: Path, output: Path) -> dict[str, Any]:
        self.seen += path.name
        if path.name == self.ends_at:
            raise KeyboardInterrupt
        output.write_bytes(path.read_bytes())
        return {"file": output.name, "bytes": output.stat().st_size}


def test_what_was_interrupted_goes_on_only_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in (*paths, tmp_path / "d"):
        path.write_text(path.name)
    outputs, report = [path.with_suffix(".copy") for path in paths], tmp_path / "report.json"
    work = Copying(ends_at="c")
    with pytest.raises(KeyboardInterrupt):
        each_file(work, paths, outputs, report, {"rate": 0.5})
    assert "repeat the command to go on" in caplog.text
    work.ends_at = ""
    each_file(work, paths, outputs, report, {"rate": 0.5})
    assert work.seen == "abcc" and [*json.loads(report.read_text())] == [*map(str, paths)]
    outputs[1].unlink()
    each_file(work, paths, outputs, report, {"rate": 0.5})
    assert work.seen == "abccb"
    each_file(work, [tmp_path / "d"], [tmp_path / "d.copy"], report, {"rate": 2})
    assert len(json.loads(report.read_text())) == 4  # of all files of the folder
    paths[0].write_text("other")
    for files, copies, rate in (
        (paths, outputs, 0.5),  # a file has changed
        (paths[1:], outputs[1:], 2),  # another setting
        (paths[1:], outputs[:0:-1], 0.5),  # outputs have changed places
    ):
        with pytest.raises(ValueError, match="exists already: choose another folder"):
            each_file(work, files, copies, report, {"rate": rate})
    report.write_text("{")
    with pytest.raises(ValueError, match="exists already"):
        each_file(work, paths[1:], outputs[1:], report, {"rate": 0.5})
    assert work.seen == "abccbd"
