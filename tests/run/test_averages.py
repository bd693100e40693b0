"""Averages of weights: they change no training, and a resumed run has the same."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.models import GAN, LOOPY, images, prior, vqmodel_config
from support.runs import CONFIGS, TRAINER, TinyRuns, run_main
from torch import Tensor, nn

import taming
from taming.run.averages import MovingAverages
from taming.run.checkpoints import LastCheckpoint, RngState, SafeCheckpointIO
from taming.run.rundir import PreparationError
from taming.run.signals import watch
from taming.util import instantiate_from_config

DECAY = 0.9
# A GAN whose quantizer learns by moving averages and keeps statistics of every kind.
QUANTIZER = {**LOOPY["params"], "ema_decay": 0.9, "target_length": 2.0, "start_batches": 1}
del QUANTIZER["threshold"]
QUANTIZER["transform_config"] = {"target": "taming.modules.vqvae.transforms.LinearResidual"}


def gan() -> Any:
    torch.manual_seed(2)
    parts = {"lossconfig": GAN, "quantizer_config": {**LOOPY, "params": QUANTIZER}}
    model = instantiate_from_config(vqmodel_config(**parts))
    model.learning_rate = 1e-3
    return model


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def train(folder: Path, epochs: int, *callbacks: pl.Callback, model: Any = None) -> Any:
    """Train, from the folder's checkpoint if there is one; return the model and the checkpoint."""
    pl.seed_everything(1)
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, RngState(), LastCheckpoint(folder)],
        plugins=[SafeCheckpointIO()],
    )
    model = gan() if model is None else model
    start = {"ckpt_path": last, "weights_only": True} if last.exists() else {}
    trainer.fit(model, images(6), images(4), **start)
    return model, torch.load(last, weights_only=True)


class Reference(pl.Callback):
    """Averages computed apart, compared with what a validation works with."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.validated = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, value in parameters(pl_module).items():
            self.average[name] = torch.lerp(self.average.get(name, value), value, 1 - DECAY)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        equal(parameters(pl_module), self.average, exact=False)
        self.validated += 1


def equal(a: Any, b: Any, exact: bool = True) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(a, b, **tolerance)


def test_validation_and_state_dict_have_the_averages_and_training_does_not(tmp_path: Path) -> None:
    _, plain = train(tmp_path / "plain", 2)
    reference = Reference()
    model, saved = train(tmp_path / "averaged", 2, MovingAverages(DECAY), reference)
    assert reference.validated == 4
    equal(saved["current_model_state"], plain["state_dict"])
    equal(saved["optimizer_states"], plain["optimizer_states"])
    own = {name: saved["state_dict"][name] for name in reference.average}
    equal(own, reference.average, exact=False)
    assert not torch.equal(
        own["encoder.conv_in.weight"], plain["state_dict"]["encoder.conv_in.weight"]
    )
    equal(parameters(model), own)


def test_buffers_are_those_of_the_model_and_never_averages(tmp_path: Path) -> None:
    model, saved = train(tmp_path, 2, MovingAverages(DECAY))
    buffers = {name for name, _ in model.named_buffers()} & saved["state_dict"].keys()
    # A mean, a number of steps whose average would be cut off, and maps of the transform.
    assert {"quantize.threshold", "quantize.embedding.steps", "quantize.transform.maps"} <= buffers
    for name in buffers:
        equal(saved["state_dict"][name], saved["current_model_state"][name])


class Signal(pl.Callback):
    """Sends this process a signal in a hook, after some steps."""

    def __init__(self, hook: str, step: int) -> None:
        def send(trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, hook, send)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_batch_start"])
def test_killed_equals_never_killed(tmp_path: Path, hook: str) -> None:
    _, whole = train(tmp_path / "whole", 3, MovingAverages(DECAY, every_n_steps=2))
    with pytest.raises(SystemExit), watch.handling():
        train(tmp_path / "parts", 3, MovingAverages(DECAY, every_n_steps=2), Signal(hook, 3))
    _, resumed = train(tmp_path / "parts", 2, MovingAverages(DECAY, every_n_steps=2))
    assert resumed["global_step"] == 6
    _, resumed = train(tmp_path / "parts", 3, MovingAverages(DECAY, every_n_steps=2))
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        equal(resumed[name], whole[name])


def test_a_run_that_had_no_averages_begins_with_its_weights(tmp_path: Path) -> None:
    _, before = train(tmp_path, 1)
    model = gan()
    callback = MovingAverages(0.0, every_n_steps=1000)
    _, after = train(tmp_path, 2, callback, model=model)
    name = "encoder.conv_in.weight"
    equal(after["state_dict"][name], before["state_dict"][name])
    assert not torch.equal(after["current_model_state"][name], before["state_dict"][name])


def test_a_frozen_tokenizer_stays_as_it_is_to_the_bit(tmp_path: Path) -> None:
    model = prior()
    model.learning_rate = 0.01
    frozen = parameters(model.first_stage_model)
    trained = parameters(model.transformer)
    train(tmp_path, 2, MovingAverages(DECAY), model=model)
    equal(parameters(model.first_stage_model), frozen)
    assert any(not torch.equal(v, trained[n]) for n, v in parameters(model.transformer).items())


@pytest.mark.parametrize("device", [None, "cpu"])
def test_averages_lie_where_the_model_does_unless_a_device_is_given(device: str | None) -> None:
    callback, model = MovingAverages(device=device), gan()
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[])
    callback.setup(trainer, model, "fit")
    callback.on_fit_start(trainer, model.to("meta"))
    assert callback._average_model is not None
    places = {value.device.type for value in callback._average_model.state_dict().values()}
    assert places == {device or "meta"}


def test_weights_alone_are_refused_before_training(tmp_path: Path) -> None:
    weights = ModelCheckpoint(tmp_path / "best", save_weights_only=True)
    with pytest.raises(PreparationError, match="save_weights_only"):
        train(tmp_path, 1, MovingAverages(), weights)
    assert not [*tmp_path.rglob("*.ckpt")]


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("decay", -0.1), ("every_n_steps", 0)])
def test_values_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        MovingAverages(**{name: value})


def test_one_line_of_a_configuration_is_enough(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    name = "demo/loopy_vqgan.yaml"
    ema = "lightning.callbacks.ema.params.decay=0.5"
    sizes = [*TRAINER, *tiny_runs.overrides[name]]
    run_main(tmp_path, "-b", CONFIGS / name, "-t", "--max_steps", "3", *sizes, ema)
    (run,) = tmp_path.glob("logs/*")
    run_main(tmp_path, "-r", run, "-t", "--max_steps", "4")
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    loaded = taming.load(run).model.state_dict()
    equal(dict(loaded), {name: saved["state_dict"][name] for name in loaded})
    weight = "encoder.conv_in.weight"
    assert not torch.equal(saved["current_model_state"][weight], loaded[weight])
    best = [*run.glob("checkpoints/epoch*")]
    assert best and all("averaging_state" in torch.load(b, weights_only=True) for b in best)
