"""Old spellings keep their meaning."""

import inspect

import lightning.pytorch as pl
import pytest

from taming.run.config import load_config
from taming.run.legacy import OLD_TRAINER_ARGUMENTS, modernize, parse_gpus
from taming.util import get_obj_from_str


def translate(**trainer):
    return modernize({"lightning": {"trainer": trainer}})["lightning"]["trainer"]


@pytest.mark.reported(6)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0,", {"accelerator": "gpu", "devices": [0]}),
        ("0,1", {"accelerator": "gpu", "devices": [0, 1]}),
        ([0, 1], {"accelerator": "gpu", "devices": [0, 1]}),
        ([3], {"accelerator": "gpu", "devices": [3]}),
        (2, {"accelerator": "gpu", "devices": 2}),
        ("2", {"accelerator": "gpu", "devices": 2}),
        (-1, {"accelerator": "gpu", "devices": -1}),
        (0, {"accelerator": "cpu"}),
        (None, {}),
    ],
)
def test_gpus(value, expected):
    assert parse_gpus(value) == expected


@pytest.mark.parametrize("value", ["all", "", ",", True, "0,-1", "1.5"])
def test_other_gpus_are_refused(value):
    with pytest.raises(ValueError, match="gpus takes"):
        parse_gpus(value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"gpus": "0,1", "distributed_backend": "ddp"}, dict(strategy="ddp", devices=[0, 1])),
        ({"gpus": 2, "accelerator": "ddp"}, dict(strategy="ddp", accelerator="gpu", devices=2)),
        ({"accelerator": "ddp_cpu", "num_processes": 2}, dict(accelerator="cpu", devices=2)),
        ({"distributed_backend": "ddp_spawn", "gpus": 2}, dict(strategy="ddp", devices=2)),
        ({"checkpoint_callback": False}, {"enable_checkpointing": False}),
        ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
        ({"progress_bar_refresh_rate": 20}, {"enable_progress_bar": True}),
        ({"weights_summary": None}, {"enable_model_summary": False}),
        ({"max_steps": None}, {"max_steps": -1}),
        ({"profiler": True}, {"profiler": "simple"}),
        ({"profiler": False}, {"profiler": None}),
        ({"profiler": "advanced"}, {"profiler": "advanced"}),
        ({"terminate_on_nan": True, "max_epochs": 3}, {"max_epochs": 3}),
        ({"accelerator": "gpu", "devices": 1}, {"accelerator": "gpu", "devices": 1}),
        # It may come after another file's GPUs.
        ({"gpus": 0}, {"accelerator": "cpu", "devices": "auto"}),
        ({"gpus": 0, "devices": 2}, {"accelerator": "cpu", "devices": 2}),
        ({"gpus": "0,1", "num_processes": 1}, {"accelerator": "gpu", "devices": [0, 1]}),
        ({"num_processes": 2, "gpus": 0}, {"accelerator": "cpu", "devices": 2}),
    ],
)
def test_trainer_arguments(old, new):
    assert new.items() <= translate(**old).items()


@pytest.mark.parametrize("name", [n for n in OLD_TRAINER_ARGUMENTS if n != "gpus"])
def test_every_translation_is_one_of_todays_arguments(name):
    assert set(translate(**{name: 1})) <= set(inspect.signature(pl.Trainer).parameters)


def test_resume_from_checkpoint_moves_beside_the_trainer():
    lightning = modernize({"lightning": {"trainer": {"resume_from_checkpoint": "a.ckpt"}}})
    assert lightning["lightning"] == {"ckpt_path": "a.ckpt", "trainer": {}}


def test_gone_backends_are_refused():
    with pytest.raises(ValueError, match="use 'ddp'"):
        translate(distributed_backend="dp")


@pytest.mark.reported(8)
def test_targets_anywhere(caplog):
    caplog.set_level("INFO")
    old = {
        "a": [{"target": "pytorch_lightning.loggers.TestTubeLogger"}],
        "b": {"target": "pytorch_lightning.callbacks.EarlyStopping", "params": {"monitor": "x"}},
        "c": {"target": "taming.models.vqgan.VQModel"},
        "d": {"target": "cutlit.DataModuleFromConfig"},
    }
    new = modernize(old)
    assert new["a"][0]["target"] == "lightning.pytorch.loggers.TensorBoardLogger"
    assert new["b"]["target"] == "lightning.pytorch.callbacks.EarlyStopping"
    assert new["c"] == old["c"] and new["d"]["target"] == "main.DataModuleFromConfig"
    assert "TestTubeLogger becomes lightning.pytorch.loggers.TensorBoardLogger" in caplog.text
    assert old["a"][0]["target"].startswith("pytorch_lightning")


# Targets of an earlier version of this project, as saved configurations of its runs name them.
EARLIER = [
    "taming.callbacks.CodebookTelemetry",
    "taming.callbacks.ImageLogger",
    "taming.callbacks.SetupCallback",
    "taming.checkpoint.SafeCheckpointIO",
    "taming.data.imagenet_depth.DRINExamples",
    "taming.data.imagenet_depth.ImageNetTrainWithDepth",
    "taming.data.imagenet_scale.ImageNetEdgesTrain",
    "taming.data.imagenet_scale.ImageNetScaleValidation",
    "taming.experiment.data_from_run",
    "taming.experiment.model_from_run",
    "taming.modules.diffusionmodules.decoders.SimpleDecoder",
    "taming.modules.transformer.clusters.KMeans",
    "taming.modules.vqvae.classic.EMAVectorQuantizer",
    "taming.modules.vqvae.classic.VectorQuantizer",
    "taming.modules.vqvae.classic.VectorQuantizer2",
    "taming.modules.vqvae.gumbel.GumbelQuantize",
    "taming.modules.vqvae.sequence.RasterSequence",
    "taming.modules.vqvae.sequence.RunLengthSequence",
    "taming.modules.vqvae.sequence.UnarySequence",
    "taming.observers.MonitorCheck",
    "taming.resume.LastCheckpoint",
    "taming.resume.RngState",
    "taming.run.callbacks.LastCheckpoint",
]


@pytest.mark.parametrize("target", EARLIER)
def test_a_saved_configuration_of_an_earlier_run_names_what_is_there(tmp_path, target):
    file = tmp_path / "2024-01-01T00-00-00-project.yaml"
    file.write_text(f"model: {{params: {{part_config: {{target: {target}}}}}}}")
    block = load_config([file]).values["model"]["params"]["part_config"]
    assert block["target"] != target
    assert get_obj_from_str(block["target"]).__name__ == target.rpartition(".")[2]
