"""A run that is stopped anywhere and resumed ends as if it had not been, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from support.runs import call, run_main

from tests.reliability.kills import differences, write_config

SHORT = {"length": 10, "max_epochs": 2}  # 5 batches of an epoch


def train(folder: Path, kind: str, tokenizer: Path | None = None, **options: Any) -> Path:
    """Train in a folder; returns it."""
    folder.mkdir()
    config = write_config(folder / "run.yaml", kind, tokenizer, **{**SHORT, **options})
    run_main(folder, "-b", config, "-t", "--no-test")
    return folder


def check(
    folder: Path, whole: Path, place: list[Any], *then: str, tokenizer: Path | None = None
) -> None:
    """Stop a run at a place, resume it, and compare it with one that was not stopped."""
    stopped, kind = folder / "stopped", whole.name
    with pytest.raises(SystemExit):
        train(stopped, kind, tokenizer, place=place, steps_between=1)
    (run,) = (stopped / "logs").iterdir()
    anywhere = "lightning.callbacks.watch.params.place=[]"
    run_main(stopped, "-r", run, "-t", "--no-test", anywhere, *then)
    assert differences(whole, stopped) == []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tokenizer, never stopped, with a cache of its tokens."""
    folder = train(tmp_path_factory.mktemp("whole") / "tokenizer", "tokenizer", steps_between=1)
    (run,) = (folder / "logs").iterdir()
    call("encode", "-r", run, "-o", folder / "cache", "data.params.num_workers=0")
    return run


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """Priors from images and from a cache, never stopped."""
    folder = tmp_path_factory.mktemp("priors")
    return {kind: train(folder / kind, kind, tokenizer) for kind in ("prior", "cache")}


@pytest.mark.parametrize(
    "place",
    [
        ["on_train_batch_start", 0, 3],
        ["on_validation_batch_end", 0, 5],  # saved at the epoch's last batch
    ],
    ids=lambda place: place[0],
)
def test_a_tokenizer(tmp_path: Path, tokenizer: Path, place: list[Any]) -> None:
    check(tmp_path, tokenizer.parents[1], place)


@pytest.mark.parametrize("kind", ["prior", "cache"])
def test_a_prior_with_another_number_of_loader_processes(
    tmp_path: Path, tokenizer: Path, priors: dict[str, Path], kind: str
) -> None:
    place = ["on_train_batch_start", 1, 2]
    check(tmp_path, priors[kind], place, "data.params.num_workers=2", tokenizer=tokenizer)
