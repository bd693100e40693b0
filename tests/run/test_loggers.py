"""Tables, TensorBoard files and pictures that cannot be written: a warning, and no row is lost."""

import csv
import errno
import logging
import os
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LambdaCallback
from support.models import ToyDataModule, ToyModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from taming.run.callbacks import CodebookTelemetry, ImageLogger
from taming.run.loggers import Events, Table, quiet_threads

FULL = partial(OSError, errno.ENOSPC, "No space left on device")


def rows(table: Table) -> list[dict[str, str]]:
    with open(Path(table.log_dir, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path, name="csv", version="")


def test_rows_are_those_of_lightning(table: Table) -> None:
    table.log_metrics({"a": 1.0}, 0)
    table.save()
    table.log_metrics({"a": 2.0}, 1)
    table.save()
    table.log_metrics({"b": 3.0}, 2)
    table.finalize("success")
    assert [[*row.values()] for row in rows(table)] == [
        ["1.0", "", "0"],
        ["2.0", "", "1"],
        ["", "3.0", "2"],
    ]


class HalfFull:
    """A writer of rows to a disk that has space for half a row."""

    def __init__(self, file, columns):
        self.file = file

    def writeheader(self):
        self.file.write("a,st")

    def writerows(self, rows):
        self.file.write("1.0,")
        self.file.flush()
        raise FULL()


@pytest.mark.parametrize("column", ["a", "b"])
def test_a_full_disk_keeps_old_rows_and_new_ones_wait(
    table: Table, column: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table.log_metrics({"a": 0}, 0)
    table.save()
    before = rows(table)
    with monkeypatch.context() as patch:
        patch.setattr(csv, "DictWriter", HalfFull)
        for step in (1, 2, 3):
            table.log_metrics({column: step}, step)
            table.save()
            assert rows(table) == before
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once
    assert "metrics.csv in" in caplog.text and "training goes on: " in caplog.text
    table.finalize("success")
    assert [row["step"] for row in rows(table)] == ["0", "1", "2", "3"]
    assert [row[column] for row in rows(table)][1:] == ["1", "2", "3"]
    assert os.listdir(table.log_dir) == ["metrics.csv"]


def fit(model, *callbacks, logger):
    model.learning_rate = 0.1
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, datamodule=ToyDataModule())
    return trainer


def test_training_goes_on_where_nothing_can_be_written(
    table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    events = Events(tmp_path, name="tensorboard", version="")
    (tmp_path / "images").write_text("a file in the place of the folder")
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_threads()

    def fill(*_) -> None:
        patch.setattr(csv, "DictWriter", HalfFull)
        patch.setattr(RecordWriter, "write", Mock(side_effect=FULL()))

    with monkeypatch.context() as patch:
        pictures = ImageLogger(batch_frequency=1, logdir=tmp_path)
        others = CodebookTelemetry(), LambdaCallback(on_train_batch_start=fill)
        trainer = fit(ToyModel(), pictures, *others, logger=[table, events])
    assert trainer.global_step == 4
    for what in ("metrics.csv", "TensorBoard's file", "a picture"):
        assert f"{what}" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    events.log_metrics({"later": 1.0}, 5)
    events.finalize("success")
    read = EventAccumulator(events.log_dir)
    read.Reload()
    assert [event.step for event in read.Scalars("later")] == [5]
