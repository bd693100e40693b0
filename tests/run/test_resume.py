"""An interrupted run goes on as if nothing had happened."""

import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support import models as toys

from taming.run.resume import LastCheckpoint, RngState
from taming.util import NonFiniteError, WriteError


def fit(folder, epochs, model=None, ckpt_path=None, extra=(), data=None):
    """Train a toy in a folder; returns it with the batches it saw."""
    model = model or toys.ToyModel()
    model.learning_rate = 0.1
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState(), LastCheckpoint(folder, every_n_train_steps=3), *extra],
    )
    data = data or toys.ToyDataModule()
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=bool(ckpt_path) or None)
    return model


def saved_step(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.filterwarnings("ignore:Total length of `list`")
@pytest.mark.parametrize("validation", [True, False])
def test_resumed_equals_uninterrupted(tmp_path, validation):
    data = toys.ToyDataModule(validate=validation)
    pl.seed_everything(3)
    whole = fit(tmp_path / "whole", 4, data=data)
    pl.seed_everything(3)
    first = fit(tmp_path / "parts", 2, data=data)
    pl.seed_everything(99)
    second = fit(tmp_path / "parts", 4, ckpt_path=tmp_path / "parts" / "last.ckpt", data=data)
    assert first.seen + second.seen == whole.seen
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_rng_state_survives_safe_loading(tmp_path):
    torch.save(RngState().state_dict(), tmp_path / "rng")
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    np.random.normal(), torch.rand(1), random.gauss(0, 1)
    RngState().load_state_dict(torch.load(tmp_path / "rng", weights_only=True))
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == expected


def test_saves_within_an_epoch_and_at_its_end(tmp_path):
    steps = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            steps.append(saved_step(tmp_path) if (tmp_path / "last.ckpt").exists() else 0)

    fit(tmp_path, 2, extra=[Watch()])  # 4 steps an epoch
    assert steps == [0, 0, 0, 3, 4, 4, 4, 7]
    assert saved_step(tmp_path) == 8


def test_saves_on_an_exception(tmp_path):
    with pytest.raises(OSError):
        fit(tmp_path, 2, toys.ToyModel(fail_at=2))
    assert saved_step(tmp_path) == 2


def test_saves_on_an_interrupt(tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, 2, extra=[Interrupt()])
    assert saved_step(tmp_path) == 2


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end"])
def test_an_interrupted_validation_is_done_again_once(tmp_path, hook):
    class TokenizedBatch(pl.Callback):
        def __init__(self):
            self.batches = []

        def on_validation_batch_start(self, trainer, model, batch, batch_idx, *_):
            if not trainer.sanity_checking:
                self.batches.append(batch_idx)

    def interrupt(self, trainer, model, *_):
        if not trainer.sanity_checking and seen[0].batches == [0, 1]:
            raise KeyboardInterrupt

    seen = [TokenizedBatch() for _ in range(4)]
    Interrupt = type("Interrupt", (pl.Callback,), {hook: interrupt})
    with pytest.raises(SystemExit):
        fit(tmp_path, 1, extra=[seen[0], Interrupt()])
    for watch, epochs in zip(seen[1:], (1, 1, 2), strict=True):
        fit(tmp_path, epochs, ckpt_path=tmp_path / "last.ckpt", extra=[watch])
    assert [watch.batches for watch in seen] == [[0, 1], [0, 1, 2, 3], [], [0, 1, 2, 3]]


@pytest.mark.parametrize(("fail_at", "error"), [(2, "toy"), (-1, "disk is full")])
def test_what_stopped_the_training_is_told_where_nothing_can_be_written(
    tmp_path, monkeypatch, fail_at, error
):
    save = Mock(side_effect=WriteError("disk is full"))
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", save)
    with pytest.raises(OSError, match=error):
        fit(tmp_path, 2, toys.ToyModel(fail_at=fail_at))
    save.assert_called_once()


def test_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="not finite"):
        fit(tmp_path, 2, toys.ToyModel(fail_at=5, non_finite=True))
    assert saved_step(tmp_path) == 4


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (KeyboardInterrupt(), "last.ckpt"),
        (SIGTERMException(), "last.ckpt"),
        (RuntimeError("Connection closed by peer"), "interrupted.ckpt"),
        (NonFiniteError("loss"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_one_of_several_processes_saves_what_it_can_vouch_for(tmp_path, error, name):
    strategy = DDPStrategy()
    strategy.save_checkpoint = lambda checkpoint, path: Path(path).write_text(checkpoint)
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: "state")
    trainer: Any = SimpleNamespace(
        world_size=2,
        is_global_zero=True,
        validating=False,
        strategy=strategy,
        _checkpoint_connector=connector,
    )
    last = LastCheckpoint(tmp_path)
    last._has_started = True
    last.on_exception(trainer, toys.ToyModel(), error)
    assert [path.name for path in tmp_path.iterdir()] == [name] * (name is not None)


def test_an_error_before_training_leaves_the_checkpoint_alone(tmp_path):
    fit(tmp_path, 1)
    data = toys.ToyDataModule(size=0)
    with pytest.raises(ValueError):
        fit(tmp_path, 2, data=data, ckpt_path=tmp_path / "last.ckpt")
    assert saved_step(tmp_path) == 4


@pytest.mark.reported(21)
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_saves_at_the_end_of_the_batch_that_a_signal_met(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)

    class Signal(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert not (tmp_path / "last.ckpt").exists()
            if trainer.global_step == 2:
                assert saved_step(tmp_path) == 2

    fit(tmp_path, 1, extra=[Signal()])
    assert signal.getsignal(signal.SIGUSR1) is before


def test_frequency_is_checked(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LastCheckpoint(tmp_path, every_n_train_steps=0)
