"""The Trainer gets the values of the configuration, and good defaults for the rest."""

import signal
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.profilers import SimpleProfiler
from support.models import ToyDataModule, ToyManualModel, ToyModel
from torch.utils.data import DataLoader

from taming.run import trainer as building
from taming.run.advice import MonitorCheck
from taming.run.callbacks import ImageLogger, SetupCallback
from taming.run.checkpoints import LastCheckpoint
from taming.run.devices import choose_strategy
from taming.run.epoch_values import EpochValues
from taming.run.loggers import build_loggers, quiet_lightning
from taming.run.rundir import Experiment, PreparationError, RunDir
from taming.run.signals import watch
from taming.run.trainer import build_callbacks, build_checkpoints

MODEL = {"target": "support.models.ToyModel"}
DATA = {"target": "support.models.ToyDataModule"}


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "2024-01-01T00-00-00_a b")


def experiment(run, wandb_project=None, data=DATA, **lightning):
    """An experiment that starts now, with the blocks of ``lightning``."""
    return Experiment(run, None, MODEL, data, lightning, wandb_project)


def build(run, model=None, **lightning):
    given = experiment(run, **lightning)
    arguments = building.trainer_arguments(given)
    return building.build_trainer(given, arguments, model or ToyModel())


@pytest.mark.parametrize(
    ("trainer", "limits"),
    [({}, (1000, -1)), ({"max_steps": 5}, (None, 5)), ({"max_epochs": 2, "max_steps": 5}, (2, 5))],
)
def test_length_of_training(run, trainer, limits):
    trainer = build(run, trainer={"accelerator": "cpu", **trainer})
    assert (trainer.max_epochs, trainer.max_steps) == limits


def test_a_refused_argument_is_a_mistake_of_the_user(run):
    with pytest.raises(ValueError, match=r"lightning\.trainer"):
        build(run, trainer={"accelerator": "cpu", "limit_train_batches": 1.5})
    for name, value, message in (
        ("precision", "bf16-true", "precision bf16-true: .*bf16-mixed"),
        ("max_time", 43200, "max_time .*quotes.*'00:12:00:00'"),
    ):
        with pytest.raises(ValueError, match=message):
            building.trainer_arguments(experiment(run, trainer={name: value}))


def test_a_mistake_without_words_is_named_by_its_kind(run, monkeypatch):
    trainer = build(run, trainer={"accelerator": "cpu"})
    monkeypatch.setattr(trainer, "fit", Mock(side_effect=ValueError))
    with pytest.raises(PreparationError, match="ValueError"):
        building.fit(trainer, ToyModel(), ToyDataModule(), None)


def test_blocks_in_the_arguments_of_the_trainer_are_built(run):
    environment = {"target": "lightning.pytorch.plugins.environments.LightningEnvironment"}
    profiler = {"target": "lightning.pytorch.profilers.SimpleProfiler", "params": {"extended": 0}}
    given = {"plugins": [environment], "profiler": profiler, "max_time": {"hours": 2}}
    trainer = build(run, trainer={"accelerator": "cpu", "devices": 1, **given})
    assert isinstance(trainer.profiler, SimpleProfiler) and not trainer.profiler.extended
    connector = trainer._accelerator_connector
    assert isinstance(connector._cluster_environment_flag, LightningEnvironment)


def test_a_job_of_slurm_is_not_requeued_by_lightning(run, monkeypatch):
    for name, value in (("NTASKS", 1), ("JOB_NAME", "train"), ("PROCID", 0), ("LOCALID", 0)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for given, requeued in (({}, False), ({"plugins": SLURMEnvironment()}, True)):
        trainer = build(run, trainer={"accelerator": "cpu", "devices": 1, **given})
        environment = trainer._accelerator_connector.cluster_environment
        assert isinstance(environment, SLURMEnvironment)
        assert environment.auto_requeue == requeued


def test_learning_rate_counts_images_per_step(run):
    data = {**DATA, "params": {"batch_size": 3}}
    assert building.learning_rate_scale(experiment(run, data=data), 4) == 12
    twice = experiment(run, data=data, trainer={"accumulate_grad_batches": 2})
    assert building.learning_rate_scale(twice, 4) == 24
    with pytest.raises(ValueError, match="batch_size .* --scale_lr false"):
        building.learning_rate_scale(experiment(run), 1)


def test_manual_optimization_takes_over(run):
    model = ToyManualModel()
    given = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "accelerator": "cpu"}
    trainer = build(run, model, trainer=given)
    assert (model.accumulate_grad_batches, model.gradient_clip_val) == (2, 0.5)
    assert model.gradient_clip_algorithm == "norm"
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, None)
    automatic = build(run, trainer=given)
    assert (automatic.accumulate_grad_batches, automatic.gradient_clip_val) == (2, 0.5)


def test_manual_optimization_that_cannot_take_over_is_named():
    class Bare(pl.LightningModule):
        automatic_optimization = False

    with pytest.raises(ValueError, match="Bare .*manually.*gradient_clip_val"):
        building.hand_over_optimization({"gradient_clip_val": 1.0}, Bare())
    assert building.hand_over_optimization({"max_steps": 3}, Bare()) == {"max_steps": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 0}, "int of at least 1, got 0"),
        ({"accumulate_grad_batches": {0: 1, 5: 4}}, "int of at least 1, got {0: 1, 5: 4}"),
        ({"gradient_clip_algorithm": "nrom"}, "'norm' or 'value', .*'nrom'"),
    ],
)
def test_accumulation_and_clipping_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        building.hand_over_optimization(arguments, ToyManualModel())


@pytest.mark.reported(5)
def test_default_loggers(run):
    given = experiment(run)
    csv, tensorboard = build_loggers(given)
    assert isinstance(csv, CSVLogger) and csv.log_dir == f"{run.path}/csv/{given.start_time}/"
    assert isinstance(tensorboard, TensorBoardLogger)
    assert tensorboard.log_dir == f"{run.path}/tensorboard/"


def test_configured_loggers_complete_the_defaults(run):
    block = {"target": "lightning.pytorch.loggers.CSVLogger", "params": {"prefix": "x"}}
    given = experiment(run, logger=block)
    csv, _ = build_loggers(given)
    assert csv._prefix == "x" and csv.log_dir == f"{run.path}/csv/{given.start_time}/"
    block = {"target": "lightning.pytorch.loggers.WandbLogger"}
    wandb = build_loggers(experiment(run, logger=block))[2]
    assert isinstance(wandb, WandbLogger)
    assert (wandb.name, wandb.version) == ("taming", "2024-01-01T00-00-00_a-b")
    assert build_loggers(experiment(run, "mine"))[2].name == "mine"


def test_wandb_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'loopy-taming\[wandb\]'"):
        build_loggers(experiment(run, "mine"))


@pytest.mark.parametrize(
    ("text", "is_hidden"),
    [
        ("Consider setting `persistent_workers=True` in 'val_dataloader'", True),
        ("Consider something else", False),
    ],
)
def test_only_known_warnings_are_hidden(text, is_hidden):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_lightning()
        warnings.warn(text, stacklevel=1)
    assert len(shown) == (not is_hidden)


def test_no_logger_needs_no_learning_rate_monitor(run):
    trainer = build(run, trainer={"accelerator": "cpu", "logger": False})
    assert not trainer.loggers
    assert not any(isinstance(c, LearningRateMonitor) for c in trainer.callbacks)


def test_callbacks_know_the_run(run):
    blocks = {"callbacks": {"image_logger": {"params": {"max_images": 1}}, "rng_state": None}}
    callbacks = build_callbacks(experiment(run, **blocks))
    setup, values, images = callbacks[:3]
    assert isinstance(setup, SetupCallback) and setup.cfgdir == run.configs
    assert isinstance(values, EpochValues) and isinstance(images, ImageLogger)
    assert (images.max_images, images.logdir) == (1, run.path)


def test_own_callback_in_place_of_a_default(run):
    blocks = {"callbacks": {"setup_callback": {"target": "lightning.pytorch.callbacks.Timer"}}}
    assert isinstance(build_callbacks(experiment(run, **blocks))[0], pl.callbacks.Timer)


def test_checkpoints_follow_the_models_monitor(run):
    best, check, last = build_checkpoints(experiment(run), ToyModel(monitor="val/loss"))
    assert isinstance(best, ModelCheckpoint) and isinstance(last, LastCheckpoint)
    assert isinstance(check, MonitorCheck) and check.monitor == "val/loss"
    assert (best.monitor, best.save_top_k, best.filename) == ("val/loss", 3, "{epoch:06}")
    assert last.path == run.last_checkpoint
    (only,) = build_checkpoints(experiment(run), ToyModel())
    assert isinstance(only, LastCheckpoint)
    block = {"modelcheckpoint": {"params": {"every_n_train_steps": 7, "save_top_k": -1}}}
    every, check, _ = build_checkpoints(experiment(run, **block), ToyModel())
    assert every._every_n_train_steps == 7 and every.dirpath == str(run.checkpoints)
    assert every.filename == "{epoch:06}-{step:09}"  # a file for each time
    assert check.monitor is None
    for always in ("step", "epoch"):  # by which the newest are kept
        MonitorCheck(always).on_validation_end(SimpleNamespace(callback_metrics={}), None)
    asked = {"modelcheckpoint": {"params": {"monitor": "val/loss"}}}
    best, check, _ = build_checkpoints(experiment(run, **asked), ToyModel())
    assert (best.monitor, best.save_top_k, check.monitor) == ("val/loss", 3, "val/loss")
    best, *_ = build_checkpoints(experiment(run), ToyModel(monitor="val/psnr"))
    assert (best.mode, every.mode) == ("max", "min")
    asked["modelcheckpoint"]["params"] = {"monitor": "val/psnr", "mode": "min"}
    assert build_checkpoints(experiment(run, **asked), ToyModel())[0].mode == "min"
    often = {"trainer": {"val_check_interval": 0.5}}  # a file for each time, not for each epoch
    best, *_ = build_checkpoints(experiment(run, **often), ToyModel(monitor="val/loss"))
    assert best.filename == "{epoch:06}-{step:09}"


def fit_with_monitor(run, monitor, **trainer):
    model = ToyModel(monitor=monitor)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "devices": 1, "max_steps": 4, **quiet, **trainer}
    building.fit(build(run, model, trainer=given), model, ToyDataModule(), None)


@pytest.mark.filterwarnings("ignore:`ModelCheckpoint")
@pytest.mark.parametrize("validate", [False, True])
def test_a_monitor_of_no_validation_is_warned_of(run, caplog, validate):
    fit_with_monitor(run, "val/loss", limit_val_batches=int(validate), num_sanity_val_steps=0)
    warnings = [r for r in caplog.records if "no validation and so no val/loss" in r.getMessage()]
    assert len(warnings) == (not validate)
    assert any(run.checkpoints.glob("epoch=*.ckpt")) == validate


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_a_misspelt_monitor_is_named(run, num_sanity_val_steps):
    with pytest.raises(PreparationError, match="'val/los'; .*'val/loss'"):
        fit_with_monitor(run, "val/los", num_sanity_val_steps=num_sanity_val_steps)


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"enable_checkpointing": False}])
def test_no_checkpoints_where_none_are_wanted(run, arguments):
    trainer = build(run, trainer={"accelerator": "cpu", **arguments})
    assert not trainer.checkpoint_callbacks


@pytest.mark.reported(21)
@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        ({"accelerator": "cpu", "devices": 2}, "ddp_find_unused_parameters_true"),
        ({"accelerator": "cpu", "strategy": "ddp"}, "ddp_find_unused_parameters_true"),
        ({"accelerator": "cpu", "num_nodes": 2}, "ddp_find_unused_parameters_true"),
        ({"accelerator": "cpu", "devices": "2"}, "ddp_find_unused_parameters_true"),
        ({"accelerator": "cpu"}, None),
        ({"accelerator": "cpu", "devices": 2, "strategy": "fsdp"}, None),
        ({"accelerator": "gpu", "devices": "0,1"}, "ddp_find_unused_parameters_true"),
        ({"devices": -1}, "ddp_find_unused_parameters_true"),
        ({"accelerator": "gpu", "devices": [2]}, None),
    ],
)
def test_strategy(monkeypatch, arguments, strategy):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    assert choose_strategy(arguments).get("strategy") == strategy


@pytest.mark.parametrize(
    "strategy", ["ddp_spawn", "ddp_notebook", "ddp_fork", "ddp_spawn_find_unused_parameters_true"]
)
def test_strategies_of_notebooks_are_refused(strategy):
    with pytest.raises(ValueError, match=f"{strategy} .*use ddp"):
        choose_strategy({"accelerator": "cpu", "devices": 2, "strategy": strategy})


def test_shared_out_models_need_gpus_and_one_optimizer(run):
    given = {"accelerator": "cpu", "devices": 2, "strategy": "fsdp"}
    with pytest.raises(ValueError, match="`fsdp` requires a GPU"):
        build(run, trainer=given)
    with pytest.raises(ValueError, match="fsdp .*ToyManualModel optimizes manually: use ddp"):
        build(run, ToyManualModel(), trainer=given)


def test_only_the_requeueing_of_slurm_is_left_to_lightning(run, monkeypatch):
    for name, value in (("NTASKS", 1), ("JOB_NAME", "train"), ("PROCID", 0), ("LOCALID", 0)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for given, is_ours in (({}, True), ({"plugins": SLURMEnvironment()}, False)):
        with watch.handling():
            numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
            before = [signal.getsignal(number) for number in numbers]
            trainer = build(run, trainer={"accelerator": "cpu", "devices": 1, **given})
            trainer._signal_connector.register_signal_handlers()
            *ends, save = [signal.getsignal(number) for number in numbers]
            assert ends == before[:2] and (save == before[2]) == is_ours


@pytest.mark.reported(21)
def test_gpus_without_nccl_talk_through_gloo(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    strategy = choose_strategy({"accelerator": "gpu", "devices": 2})["strategy"]
    assert strategy.process_group_backend == "gloo"
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}


@pytest.mark.parametrize(
    ("devices", "visible", "message"),
    [
        ([0, 1], 0, "0 GPUs .*--accelerator cpu .*--gpus 0"),
        (-1, 0, "0 GPUs .*--accelerator cpu .*--gpus 0"),
        ([0, 2], 2, "2 GPUs .*--gpus .*below 2.*--accelerator cpu"),
        (3, 2, "2 GPUs are visible"),
    ],
)
def test_missing_gpus(monkeypatch, devices, visible, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    with pytest.raises(ValueError, match=message):
        choose_strategy({"accelerator": "gpu", "devices": devices})


def test_numbered_devices_are_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="0 GPUs are visible"):
        choose_strategy({"devices": "0,1"})


@pytest.mark.parametrize("devices", [[0, 1], "0,1", [1]])
def test_a_run_of_gpus_goes_on_without_them(devices):
    arguments = {"accelerator": "cpu", "devices": devices}
    arguments |= choose_strategy(arguments)
    assert arguments == {"accelerator": "cpu", "devices": "auto"}
    assert pl.Trainer(**arguments, logger=False).num_devices == 1


def test_a_loss_fetches_its_weights_before_the_data_are_built():
    model, data, trainer = Mock(), Mock(), Mock(max_epochs=-1, max_steps=-1)
    model.fetch_weights.side_effect = ConnectionError("no network; perceptual_weight: 0")
    with pytest.raises(PreparationError, match="perceptual_weight: 0"):
        building.fit(trainer, model, data, None)
    assert not data.mock_calls and not trainer.fit.called
    building.fit(trainer, model, data, Mock())  # a checkpoint has them
    assert trainer.fit.called


def test_the_workers_of_a_recipe_for_a_larger_machine_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="999 worker processes"):
            DataLoader([0], num_workers=999)  # type: ignore[arg-type]
        quiet_lightning()
        DataLoader([0], num_workers=999)  # type: ignore[arg-type]
