"""Every example of docs/extending.md trains."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.runs import run_main

import taming

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text(encoding="utf-8")
# The name in the first comment of a block -> its text.
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))(.*?)```", PAGE, re.DOTALL))
LONGEST = 30  # lines of an example


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with all files of the page, from which modules can be imported."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(f"#{text}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (trusted,) = re.findall(r"export TAMING_TRUST=(\S+)", PAGE)
    monkeypatch.setenv("TAMING_TRUST", trusted)
    for name in FILES:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def train(folder: Path, *configs: str, keys: Sequence[str] = ()) -> Path:
    """Train for three steps; return the run."""
    run_main(folder, "--base", *configs, "-t", "--max_steps", "3", "--accelerator", "cpu", *keys)
    return max((folder / "logs").iterdir(), key=lambda run: run.stat().st_mtime)


def test_examples_are_short() -> None:
    for name, text in FILES.items():
        assert name.endswith(".yaml") or len(text.strip().splitlines()) <= LONGEST, name


@pytest.mark.parametrize(
    "more", [[], ["my_loop.yaml"], ["my_loss.yaml"], ["my_data.yaml"]], ids=str
)
def test_trains(folder: Path, more: list[str]) -> None:
    run = train(folder, "my_tokenizer.yaml", *more)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert list(run.glob("images/train/reconstructions_*.png"))


def test_a_prior_trains_and_samples(folder: Path) -> None:
    tokenizer = train(folder, "my_tokenizer.yaml")
    first_stage = f"model.params.first_stage_config.params.run={tokenizer}"
    pictures = "lightning.callbacks.image_logger.params.max_images=0"  # take most of the time
    run = train(folder, "my_prior.yaml", keys=[first_stage, pictures])
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert any("transformer.gru" in name for name in checkpoint["state_dict"])
    (picture,) = taming.load(run).sample(1)
    assert picture.size == (32, 32)


def test_an_error_looks_as_the_page_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "my_tokenizer.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("embed_dim:", "embed_dims:"))
    with pytest.raises(SystemExit):
        train(folder, file.name)
    assert capsys.readouterr().err.splitlines()[-1] in PAGE
