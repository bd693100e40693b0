"""The progress bar shows loss, quality, lengths, use of the codes and speed."""

import gc
import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ToyDataModule, ToyModel, trainer

from taming.run import progress
from taming.run.cli import Console
from taming.run.progress import Progress, size_of


def test_a_training_shows_the_numbers_that_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown: list[dict[str, Any]] = []

    class Watched(Progress):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            shown.append(self.get_metrics(*args[:2]))

    class Model(ToyModel):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/aeloss", loss, prog_bar=True)
            return loss

        def on_validation_epoch_end(self) -> None:
            self.log_dict({"val/mean_length": 2.5, "val/usage": 0.75, "val/perplexity": 9.0})

    fit = trainer(tmp_path, max_epochs=2, enable_progress_bar=True, callbacks=[Watched()])
    fit.fit(Model(), ToyDataModule(batch_size=2))
    assert len(shown) == 8
    assert [*shown[0]] == ["train/aeloss"]  # a speed takes two steps
    assert {row["images/s"] for row in shown[1:4] + shown[5:]} == {"2"}  # two images a tick
    assert shown[-1]["val/mean_length"] == 2.5 and shown[-1]["val/usage"] == 0.75
    assert not any({"v_num", "val/perplexity"} & {*row} for row in shown)
    written = capsys.readouterr()
    assert "images/s" in written.out + written.err


@pytest.mark.filterwarnings("ignore")
def test_what_is_logged_and_an_error_begin_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()  # a terminal shows both streams
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    record = logging.makeLogRecord({"msg": "skipped 1 pictures"})

    class Model(ToyModel):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                Console().handle(record)
            return super().training_step(batch, batch_idx)

    fit = trainer(tmp_path, enable_progress_bar=True, callbacks=[Progress()])
    with pytest.raises(OSError, match="toy"):
        fit.fit(Model(fail_at=2), ToyDataModule(batch_size=2))
    screen.write("error: toy\n")
    del fit
    gc.collect()
    lines = re.split("[\r\n]+", screen.getvalue())
    assert lines.count("skipped 1 pictures") == 1
    assert screen.getvalue().endswith("\nerror: toy\n")


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ({"path": ["a", "b"], "image": torch.zeros(2, 4, 4, 3)}, 2),
        ((torch.zeros(5, 3), torch.zeros(5)), 5),
        ({"scale": torch.tensor(2.0), "image": torch.zeros(4, 1)}, 4),
        ([], 0),
        ({"path": ["a"]}, 0),
    ],
)
def test_the_images_of_a_batch_are_counted(batch: Any, size: int) -> None:
    assert size_of(batch) == size
