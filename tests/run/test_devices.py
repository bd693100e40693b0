"""A run finds the devices it is given, and several of them train together."""

import re

import lightning.pytorch as pl
import pytest

from taming.run.devices import choose_strategy


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
        ([0, 1], 0, "0 GPUs are visible here; pass --accelerator cpu (or --gpus 0)"),
        (-1, 0, "0 GPUs are visible here; pass --accelerator cpu (or --gpus 0)"),
        (
            [0, 2],
            2,
            "2 GPUs are visible here; pass --gpus with numbers below 2, or --accelerator cpu",
        ),
        (3, 2, "2 GPUs are visible here"),
    ],
)
def test_missing_gpus(monkeypatch, devices, visible, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_strategy({"accelerator": "gpu", "devices": devices})


def test_numbered_devices_are_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="0 GPUs are visible here"):
        choose_strategy({"devices": "0,1"})


@pytest.mark.parametrize("devices", [[0, 1], "0,1", [1]])
def test_a_run_of_gpus_goes_on_without_them(devices):
    arguments = {"accelerator": "cpu", "devices": devices}
    arguments |= choose_strategy(arguments)
    assert arguments == {"accelerator": "cpu", "devices": "auto"}
    assert pl.Trainer(**arguments, logger=False).num_devices == 1
