"""Pictures and checkpoints do not change the training; an interrupted run continues exactly."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf
from PIL import Image
from support.models import ToyDataModule, ToyModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taming.run.callbacks import CodebookTelemetry, ImageLogger, SetupCallback
from taming.run.checkpoints import LastCheckpoint, RngState, SafeCheckpointIO
from taming.run.processes import take_over
from taming.run.signals import Interrupted, Request, watch
from taming.util import NonFiniteError, WriteError


def fit(model, *callbacks, epochs=2, logger=False, ckpt_path=None):
    pl.seed_everything(1)
    model.learning_rate = 0.1
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, datamodule=ToyDataModule(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def steps(folder, split):
    names = [path.name for path in (folder / "images" / split).glob("inputs_*")]
    return sorted(int(name.split("_gs-")[1][:6]) for name in names)


def test_pictures_are_due_by_steps_not_batches(tmp_path):
    fit(ToyModel(), ImageLogger(batch_frequency=3, logdir=tmp_path), epochs=3)
    assert steps(tmp_path, "train") == [1, 2, 3, 6, 9, 12]
    assert steps(tmp_path, "val") == [4, 8, 12]
    assert (tmp_path / "images/train/noise_gs-000006_e-000001_b-000001.png").is_file()


def test_without_warm_up(tmp_path):
    callback = ImageLogger(batch_frequency=5, increase_log_steps=False, logdir=tmp_path)
    fit(ToyModel(), callback, epochs=3)
    assert steps(tmp_path, "train") == [5, 10]
    assert steps(tmp_path, "val") == [8, 12]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resumed_run_takes_the_pictures_that_were_due(tmp_path):
    class SaveAtSix(pl.Callback):
        def on_train_batch_end(self, trainer, *unused):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "six.ckpt")

    def options(folder):
        return {"batch_frequency": 5, "increase_log_steps": False, "logdir": tmp_path / folder}

    fit(ToyModel(), ImageLogger(**options("whole")), SaveAtSix(), epochs=3)
    fit(ToyModel(), ImageLogger(**options("rest")), epochs=3, ckpt_path=tmp_path / "six.ckpt")
    assert steps(tmp_path / "rest", "val") == steps(tmp_path / "whole", "val") == [8, 12]
    assert steps(tmp_path / "rest", "train") == [10]


def test_milestones_never_pass_the_step():
    logger = ImageLogger(batch_frequency=750)
    milestones = [logger._milestone(step) for step in range(3000)]
    assert all(m <= step for step, m in enumerate(milestones)) and milestones == sorted(milestones)
    assert sorted(set(milestones)) == [0, *(2**n for n in range(10)), 750, 1500, 2250]


def test_pictures_do_not_change_the_training(tmp_path):
    plain, watched = ToyModel(), ToyModel()
    watched.load_state_dict(plain.state_dict())
    fit(plain)
    fit(watched, ImageLogger(batch_frequency=1, logdir=tmp_path))
    assert plain.seen == watched.seen
    torch.testing.assert_close(plain.state_dict(), watched.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_every_module_keeps_its_mode(tmp_path):
    class Frozen(ToyModel):
        def on_fit_start(self):
            self.net[1].eval()

        def log_images(self, batch, split):
            assert not any(module.training for module in self.modules())
            assert not torch.is_grad_enabled()
            return super().log_images(batch, split)

        def on_train_batch_end(self, *_):
            assert self.training and self.net.training and not self.net[1].training

    fit(Frozen(), ImageLogger(batch_frequency=1, logdir=tmp_path))


def test_files_hold_the_pictures(tmp_path):
    picture = torch.linspace(-1, 1, 256).view(1, 1, 1, 256).expand(3, 3, 2, 256)

    class Model(ToyModel):
        def log_images(self, batch, split):
            return {"ramp": picture, "wild": picture * 3}

    fit(Model(), ImageLogger(batch_frequency=1, max_images=2, logdir=tmp_path), epochs=1)
    ramp = np.asarray(Image.open(tmp_path / "images/val/ramp_gs-000004_e-000000_b-000000.png"))
    assert ramp.shape == (2 + 4, 2 * (256 + 2) + 2, 3)  # two of three, two pixels around each
    np.testing.assert_array_equal(ramp[2, 2:258, 0], np.arange(256))
    wild = np.asarray(Image.open(tmp_path / "images/val/wild_gs-000004_e-000000_b-000000.png"))
    assert wild[2, 2, 0] == 0 and wild[2, 257, 0] == 255


def test_pictures_beyond_the_range_may_be_scaled(tmp_path):
    class Model(ToyModel):
        def log_images(self, batch, split):
            return {"wild": torch.tensor([-3.0, 0, 3]).view(1, 3, 1, 1)}

    fit(Model(), ImageLogger(batch_frequency=1, clamp=False, logdir=tmp_path), epochs=1)
    wild = np.asarray(Image.open(tmp_path / "images/val/wild_gs-000004_e-000000_b-000000.png"))
    assert wild[wild.shape[0] // 2, wild.shape[1] // 2].tolist() == [0, 128, 255]


def test_models_without_pictures_are_left_alone(tmp_path):
    class Silent(ToyModel):
        log_images = None
        codebook_histograms = None

    fit(Silent(), ImageLogger(batch_frequency=1, logdir=tmp_path), CodebookTelemetry())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frequency", [0, -3])
def test_frequency_is_checked(frequency):
    with pytest.raises(ValueError, match=f"at least 1, got {frequency}"):
        ImageLogger(batch_frequency=frequency)


def test_tensorboard_gets_pictures_and_histograms(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    telemetry = CodebookTelemetry(max_bins=2)
    fit(ToyModel(), ImageLogger(batch_frequency=4), telemetry, logger=logger)
    events = EventAccumulator(str(tmp_path), {"images": 0, "histograms": 0}).Reload()
    assert {"train/inputs", "val/noise"} <= set(events.Tags()["images"])
    assert {event.step for event in events.Images("train/inputs")} == {1, 2, 4, 8}
    histogram = events.Histograms("train/codes")[0].histogram_value
    assert histogram.num == 10 and histogram.bucket[-2:] == [3.0, 7.0]  # 0+1+2 and 3+4
    assert histogram.bucket_limit[-2:] == [2.5, 5.5]
    assert [event.step for event in events.Histograms("val/codes")] == [4, 8]


def test_setup_saves_both_configurations(tmp_path):
    run = tmp_path / "run"
    project, lightning = {"model": {"a": 1}, "data": {}}, {"trainer": {"max_epochs": 2}}
    setup = SetupCallback("now", run, run / "checkpoints", run / "configs", project, lightning)
    fit(ToyModel(), setup, epochs=1)
    assert OmegaConf.load(run / "configs/now-project.yaml") == project
    assert OmegaConf.load(run / "configs/now-lightning.yaml") == {"lightning": lightning}
    assert (run / "checkpoints").is_dir()


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_configuration_is_saved_with_the_first_step_before_its_checkpoint(tmp_path, fail_at):
    class Watch(pl.Callback):
        def on_save_checkpoint(self, *_):
            assert len(list((tmp_path / "configs").glob("*.yaml"))) == 2

    setup = SetupCallback("now", tmp_path, tmp_path, tmp_path / "configs", {"data": {}}, {})
    with pytest.raises(OSError, match="toy"):
        train(tmp_path, 1, ToyModel(fail_at=fail_at), extra=[setup, Watch()])
    assert (tmp_path / "configs").exists() == (tmp_path / "last.ckpt").exists() == (fail_at == 1)


def test_a_checkpoint_before_the_first_step_has_its_configuration(tmp_path):
    class Save(pl.Callback):
        def on_train_start(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            raise KeyError

    setup = SetupCallback("now", tmp_path, tmp_path, tmp_path / "configs", {"data": {}}, {})
    with pytest.raises(KeyError):
        fit(ToyModel(), setup, Save())
    assert len(list((tmp_path / "configs").glob("*.yaml"))) == 2


def train(folder, epochs, model=None, ckpt_path=None, extra=(), data=None, logger=False):
    """Train a toy in a folder; returns it with the batches it saw."""
    model = model or ToyModel()
    model.learning_rate = 0.1
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState(), LastCheckpoint(folder, every_n_train_steps=3), *extra],
        plugins=[SafeCheckpointIO()],
    )
    take_over(trainer)
    data = data or ToyDataModule()
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=bool(ckpt_path) or None)
    return model


def saved_step(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.filterwarnings("ignore:Total length of `list`")
@pytest.mark.parametrize("validation", [True, False])
def test_resumed_equals_uninterrupted(tmp_path, validation):
    data = ToyDataModule(validate=validation)
    pl.seed_everything(3)
    whole = train(tmp_path / "whole", 4, data=data)
    pl.seed_everything(3)
    first = train(tmp_path / "parts", 2, data=data)
    pl.seed_everything(99)
    second = train(tmp_path / "parts", 4, ckpt_path=tmp_path / "parts" / "last.ckpt", data=data)
    assert first.seen + second.seen == whole.seen
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_saves_within_an_epoch_and_at_its_end(tmp_path):
    steps = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            steps.append(saved_step(tmp_path) if (tmp_path / "last.ckpt").exists() else 0)

    train(tmp_path, 2, extra=[Watch()])  # 4 steps an epoch
    # A hook of another callback comes before the checkpoint of the same step.
    assert steps == [0, 0, 0, 0, 4, 4, 4, 4]
    assert saved_step(tmp_path) == 8


def test_saves_on_an_exception(tmp_path):
    with pytest.raises(OSError):
        train(tmp_path, 2, ToyModel(fail_at=2))
    assert saved_step(tmp_path) == 2


def test_an_error_within_a_batch_leaves_what_was_saved_between_batches(tmp_path):
    with pytest.raises(OSError):
        train(tmp_path, 2, ToyModel(fail_at=5))
    assert saved_step(tmp_path) == 4
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 5


def test_what_was_logged_before_the_checkpoint_is_on_the_disk(tmp_path):
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:  # saved at 3
                lines = (tmp_path / "metrics.csv").read_text().splitlines()
                assert lines[-1].split(",")[lines[0].split(",").index("step")] == "2"

    logger = CSVLogger(tmp_path, name="", version="")
    train(tmp_path, 1, extra=[Watch()], logger=logger)
    assert saved_step(tmp_path) == 4


def test_waits_for_the_step_while_gradients_are_accumulated(tmp_path):
    steps, last = [], LastCheckpoint(tmp_path)

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_):
            watch.request = Request.SAVE

        def on_train_batch_end(self, trainer, *_):
            steps.append(saved_step(tmp_path) if last.path.exists() else 0)

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        callbacks=[Watch(), last],
    )
    trainer.fit(ToyModel(), datamodule=ToyDataModule())
    assert steps == [0, 0, 1, 1] and saved_step(tmp_path) == 2


def test_saves_on_an_interrupt(tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        train(tmp_path, 2, extra=[Interrupt()])
    assert saved_step(tmp_path) == 2


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end"])
def test_an_interrupted_validation_is_done_again_once(tmp_path, hook):
    class Watch(pl.Callback):
        def __init__(self):
            self.batches = []

        def on_validation_batch_start(self, trainer, model, batch, batch_idx, *_):
            if not trainer.sanity_checking:
                self.batches.append(batch_idx)

    def interrupt(self, trainer, model, *_):
        if not trainer.sanity_checking and seen[0].batches == [0, 1]:
            raise KeyboardInterrupt

    seen = [Watch() for _ in range(4)]
    Interrupt = type("Interrupt", (pl.Callback,), {hook: interrupt})
    with pytest.raises(SystemExit):
        train(tmp_path, 1, extra=[seen[0], Interrupt()])
    for seer, epochs in zip(seen[1:], (1, 1, 2), strict=True):
        train(tmp_path, epochs, ckpt_path=tmp_path / "last.ckpt", extra=[seer])
    assert [seer.batches for seer in seen] == [[0, 1], [0, 1, 2, 3], [], [0, 1, 2, 3]]


@pytest.mark.parametrize(("fail_at", "error"), [(2, "toy"), (-1, "disk is full")])
def test_what_stopped_the_training_is_told_where_nothing_can_be_written(
    tmp_path, monkeypatch, fail_at, error
):
    save = Mock(side_effect=WriteError("disk is full"))
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", save)
    with pytest.raises(OSError, match=error):
        train(tmp_path, 2, ToyModel(fail_at=fail_at))
    save.assert_called_once()


def test_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="not finite"):
        train(tmp_path, 2, ToyModel(fail_at=5, non_finite=True))
    assert saved_step(tmp_path) == 4


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (KeyboardInterrupt(), "last.ckpt"),
        (SIGTERMException(), "last.ckpt"),
        (RuntimeError("Connection closed by peer"), "interrupted.ckpt"),
        (OSError("the disk is gone"), "interrupted.ckpt"),
        (NonFiniteError("loss"), None),
        (Interrupted(Request.TERMINATE), None),  # saved already
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_one_of_several_processes_saves_what_it_can_vouch_for(tmp_path, error, name, rank):
    strategy = DDPStrategy(checkpoint_io=SafeCheckpointIO())
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: "state")
    trainer: Any = SimpleNamespace(
        world_size=2,
        is_global_zero=rank == 0,
        validating=False,
        strategy=strategy,
        state=SimpleNamespace(),
        fit_loop=Mock(),
        _checkpoint_connector=connector,
    )
    last = LastCheckpoint(tmp_path)
    last._has_started = True
    last.on_exception(trainer, ToyModel(), error)
    if name == "last.ckpt" and rank:  # all have the same state, and live
        name = None
    assert [path.name for path in tmp_path.iterdir()] == [name] * (name is not None)


def test_processes_that_validate_on_streams_end_alone(tmp_path):
    strategy = DDPStrategy(checkpoint_io=SafeCheckpointIO())
    strategy.reduce = Mock(side_effect=AssertionError("others may not take part"))
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: "state")
    trainer: Any = SimpleNamespace(
        world_size=2,
        is_global_zero=True,
        validating=False,
        num_val_batches=[float("inf")],
        strategy=strategy,
        state=SimpleNamespace(),
        fit_loop=Mock(),
        _checkpoint_connector=connector,
    )
    last = LastCheckpoint(tmp_path)
    with pytest.raises(Interrupted), watch.handling():
        last._has_started = watch.is_polled = True
        last.on_validation_batch_end(trainer, ToyModel(), None, None, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        last.on_validation_batch_end(trainer, ToyModel(), None, None, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_error_before_training_leaves_the_checkpoint_alone(tmp_path):
    train(tmp_path, 1)
    data = ToyDataModule(size=0)
    with pytest.raises(ValueError):
        train(tmp_path, 2, data=data, ckpt_path=tmp_path / "last.ckpt")
    assert saved_step(tmp_path) == 4


class Signal(pl.Callback):
    """Sends this process a signal at the second step, in a hook."""

    def __init__(self, hook: str, number: signal.Signals) -> None:
        def send(trainer, *_):
            if trainer.global_step == 2 and not trainer.sanity_checking:
                os.kill(os.getpid(), number)

        setattr(self, hook, send)


@pytest.mark.reported(21)
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_saves_at_the_end_of_the_batch_that_a_signal_met(tmp_path):
    class Check(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            assert (tmp_path / "last.ckpt").exists() == (trainer.global_step > 2)
            if trainer.global_step > 2:
                assert saved_step(tmp_path) == 2

    with watch.handling():
        os.kill(os.getpid(), signal.SIGUSR1)  # while the run is prepared: saved after one batch
        assert watch.request is Request.SAVE
        watch.saved()
        train(tmp_path, 1, extra=[Signal("on_train_batch_start", signal.SIGUSR1), Check()])
        assert watch.request is Request.NOTHING


@pytest.fixture
def heard_signals():
    """SIGINT has its handler also in a shell's background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_before_zero_grad", 3),
        ("on_train_batch_end", 2),
        ("on_save_checkpoint", 2),
        ("on_validation_batch_start", 2),
        ("on_train_epoch_end", 2),
    ],
)
def test_a_signal_ends_training_once_all_is_saved(
    tmp_path, hook, step, number, status, heard_signals
):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, watch.handling():
        train(tmp_path, 3, extra=[Signal(hook, number)], data=ToyDataModule(size=4))
    assert stop.value.code == status and signal.getsignal(number) is before
    assert saved_step(tmp_path) == step


def test_the_frequency_of_checkpoints_is_checked(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LastCheckpoint(tmp_path, every_n_train_steps=0)


def test_a_configuration_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(config, file):
        Path(file).write_text("model: {tar")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OmegaConf, "save", full)
    setup = SetupCallback("now", tmp_path, tmp_path, tmp_path / "configs", {}, {})
    with pytest.raises(WriteError, match="now-lightning.yaml cannot be saved.*No space"):
        setup._save(SimpleNamespace(is_global_zero=True))
    assert not [*(tmp_path / "configs").iterdir()]
