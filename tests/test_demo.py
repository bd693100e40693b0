"""scripts/demo.py, without the programs that it starts."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.runs import CONFIGS, call


def test_every_part_says_what_it_makes_and_its_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(command: list[str]) -> Any:
        if "-n" in command and "train" in command:
            Path("logs", f"0_{command[command.index('-n') + 1]}").mkdir(parents=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scripts.demo.subprocess.run", start)
    earlier, own = Path("out/samples/000000.png"), Path("out/samples/cat.png")
    earlier.parent.mkdir(parents=True)
    for file in (earlier, own):
        file.touch()
    with caplog.at_level("INFO"):
        call("demo", "-o", "out")
    assert own.exists() and not earlier.exists()
    lines = [line.strip() for line in caplog.messages]
    parts = [line for line in lines if line.startswith("---")]
    assert lines[0] == parts[0] and len(parts) == 5
    assert [part[4:10] for part in parts] == [f"{n} of 5" for n in range(1, 6)]
    for part, name in zip(parts, ("loopy_vqgan", "loopy_transformer"), strict=False):
        config = yaml.safe_load((CONFIGS / f"demo/{name}.yaml").read_text())
        data, trainer = config["data"]["params"], config["lightning"]["trainer"]
        batches = math.ceil(data["train"]["params"]["length"] / data["batch_size"])
        (steps,) = re.findall(r"about (\d+) steps", part)
        assert int(steps) == batches * trainer["max_epochs"]
