"""Checkpoints: what may be read, what must fit, and modules that stay frozen."""

import copy
import logging
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from taming.checkpoint import freeze, load_checkpoint, load_weights


class Payload:
    """A class of the user's own, which no safe reader knows."""


class Model(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.Linear(2, width)
        self.loss = nn.Linear(1, 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def test_reads_back_what_torch_saved(path):
    content = {"state_dict": {"w": torch.arange(3)}, "epoch": 2, "hyper": {"lr": [0.1, "x"]}}
    torch.save(content, path)
    found = load_checkpoint(path)
    assert torch.equal(found["state_dict"].pop("w"), torch.arange(3))
    assert found == {"state_dict": {}, "epoch": 2, "hyper": {"lr": [0.1, "x"]}}


def test_reads_checkpoints_of_lightning_1(path, monkeypatch):
    """There a callback's class is the key of its state; the package need not be installed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module = types.ModuleType(name)
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, module)
        torch.save({"callbacks": {callback: {"best_model_path": "a"}}, "epoch": 1}, path)
    found = load_checkpoint(path)
    assert list(found["callbacks"].values()) == [{"best_model_path": "a"}]


def test_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match="model.ckpt"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=str(path.parent)):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"<!DOCTYPE html><html>not found</html>",
        lambda whole: b"hello, this is text",
        lambda whole: whole[:100] + bytes([whole[100] ^ 255]) + whole[101:],
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_damaged_file_is_named(path, damage, trust):
    torch.save({"w": torch.randn(100)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.ckpt cannot be read.*damaged"):
        load_checkpoint(path, trust=trust)


@pytest.mark.parametrize("zipped", [True, False])
def test_unknown_classes_need_trust(path, zipped):
    torch.save({"a": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.ckpt.*Payload.*trust=True"):
        load_checkpoint(path)
    assert isinstance(load_checkpoint(path, trust=True)["a"], Payload)


def test_a_file_that_holds_no_dict_is_refused(path):
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_checkpoint(path)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}])
def test_loads_bare_and_wrapped_state_dicts(path, wrap):
    source, target = Model(), Model()
    torch.save(wrap(source.state_dict()), path)
    load_weights(target, path)
    assert all(torch.equal(target.state_dict()[k], v) for k, v in source.state_dict().items())


def test_shape_mismatch_lists_keys_and_both_shapes(path):
    torch.save(Model(width=4).state_dict(), path)
    with pytest.raises(ValueError, match="does not fit Model") as caught:
        load_weights(Model(), path)
    message = str(caught.value)
    for expected in ("body.weight", "body.bias", "[4, 2]", "[3, 2]", str(path)):
        assert expected in message


def test_missing_keys_are_refused_unless_ignored(path):
    torch.save({"body.weight": torch.ones(3, 2), **Model().loss.state_dict(prefix="loss.")}, path)
    with pytest.raises(ValueError, match="lacks weights of Model: body.bias;"):
        load_weights(Model(), path)
    model = Model()
    bias = model.body.bias.clone()
    load_weights(model, path, ignore_keys=["body.b"])
    assert torch.equal(model.body.weight, torch.ones(3, 2))
    assert torch.equal(model.body.bias, bias)


def test_ignored_keys_are_left_out(path):
    source, target = Model(), Model()
    before = target.loss.weight.clone()
    torch.save({**source.state_dict(), "loss.other": torch.ones(2)}, path)
    load_weights(target, path, ignore_keys=["loss"])
    assert torch.equal(target.loss.weight, before)
    assert torch.equal(target.body.weight, source.body.weight)
    with pytest.raises(ValueError, match="list of prefixes"):
        load_weights(target, path, ignore_keys="loss")


def test_missing_loss_weights_and_unexpected_keys_are_logged(path, caplog):
    torch.save({**Model().body.state_dict(prefix="body."), "extra.w": torch.ones(1)}, path)
    with caplog.at_level(logging.WARNING):
        load_weights(Model(), path)
    text = caplog.text
    assert "loss.weight" in text and "loss.bias" in text and "extra.w" in text


@pytest.mark.parametrize("content", [{"encoder.w": torch.ones(1)}, {}])
def test_a_file_without_any_matching_key_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(ValueError, match="holds no weights of Model.*body.weight"):
        load_weights(Model(), path)


def test_load_hooks_may_absorb_legacy_keys(path, caplog):
    class Modern(Model):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict.pop(prefix + "mask", None)
            super()._load_from_state_dict(state_dict, prefix, *args)

    torch.save({**Model().state_dict(), "mask": torch.ones(1)}, path)
    with caplog.at_level(logging.WARNING):
        load_weights(Modern(), path)
    assert not caplog.records


def test_frozen_module_stays_in_eval_and_takes_no_gradient():
    parent = nn.Sequential(freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout())), nn.Dropout())
    frozen = parent[0]
    parent.train()
    assert not any(module.training for module in frozen.modules())
    assert parent[1].training
    assert frozen.train() is frozen
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_frozen_modules_are_frozen(duplicate):
    frozen = freeze(nn.Sequential(nn.Dropout()))
    other = duplicate(frozen)
    assert other.train() is other
    assert not other[0].training
