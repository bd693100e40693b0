"""Looking at a run does not change it, and what is seen is what the model gave."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image
from support import models as toys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taming.run.callbacks import CodebookTelemetry, ImageLogger, SetupCallback


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
    trainer.fit(model, datamodule=toys.ToyDataModule(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def steps(folder, split):
    names = [path.name for path in (folder / "images" / split).glob("inputs_*")]
    return sorted(int(name.split("_gs-")[1][:6]) for name in names)


def test_pictures_are_due_by_steps_not_batches(tmp_path):
    fit(toys.ToyModel(), ImageLogger(batch_frequency=3, logdir=tmp_path), epochs=3)
    assert steps(tmp_path, "train") == [1, 2, 3, 6, 9, 12]
    assert steps(tmp_path, "val") == [4, 8, 12]
    assert (tmp_path / "images/train/noise_gs-000006_e-000001_b-000001.png").is_file()


def test_without_warm_up(tmp_path):
    callback = ImageLogger(batch_frequency=5, increase_log_steps=False, logdir=tmp_path)
    fit(toys.ToyModel(), callback, epochs=3)
    assert steps(tmp_path, "train") == [5, 10]
    assert steps(tmp_path, "val") == [8, 12]


def test_milestones_never_pass_the_step():
    logger = ImageLogger(batch_frequency=750)
    milestones = [logger._milestone(step) for step in range(3000)]
    assert all(m <= step for step, m in enumerate(milestones)) and milestones == sorted(milestones)
    assert sorted(set(milestones)) == [0, *(2**n for n in range(10)), 750, 1500, 2250]


def test_pictures_do_not_change_the_training(tmp_path):
    plain, watched = toys.ToyModel(), toys.ToyModel()
    watched.load_state_dict(plain.state_dict())
    fit(plain)
    fit(watched, ImageLogger(batch_frequency=1, logdir=tmp_path))
    assert plain.seen == watched.seen
    torch.testing.assert_close(plain.state_dict(), watched.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_every_module_keeps_its_mode(tmp_path):
    class Frozen(toys.ToyModel):
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

    class Model(toys.ToyModel):
        def log_images(self, batch, split):
            return {"ramp": picture, "wild": picture * 3}

    fit(Model(), ImageLogger(batch_frequency=1, max_images=2, logdir=tmp_path), epochs=1)
    ramp = np.asarray(Image.open(tmp_path / "images/val/ramp_gs-000004_e-000000_b-000000.png"))
    assert ramp.shape == (2 + 4, 2 * (256 + 2) + 2, 3)  # two of three, two pixels around each
    np.testing.assert_array_equal(ramp[2, 2:258, 0], np.arange(256))
    wild = np.asarray(Image.open(tmp_path / "images/val/wild_gs-000004_e-000000_b-000000.png"))
    assert wild[2, 2, 0] == 0 and wild[2, 257, 0] == 255


def test_pictures_beyond_the_range_may_be_scaled(tmp_path):
    class Model(toys.ToyModel):
        def log_images(self, batch, split):
            return {"wild": torch.tensor([-3.0, 0, 3]).view(1, 3, 1, 1)}

    fit(Model(), ImageLogger(batch_frequency=1, clamp=False, logdir=tmp_path), epochs=1)
    wild = np.asarray(Image.open(tmp_path / "images/val/wild_gs-000004_e-000000_b-000000.png"))
    assert wild[wild.shape[0] // 2, wild.shape[1] // 2].tolist() == [0, 128, 255]


def test_models_without_pictures_are_left_alone(tmp_path):
    class Silent(toys.ToyModel):
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
    fit(toys.ToyModel(), ImageLogger(batch_frequency=4), telemetry, logger=logger)
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
    fit(toys.ToyModel(), setup, epochs=1)
    assert OmegaConf.load(run / "configs/now-project.yaml") == project
    assert OmegaConf.load(run / "configs/now-lightning.yaml") == {"lightning": lightning}
    assert (run / "checkpoints").is_dir()
