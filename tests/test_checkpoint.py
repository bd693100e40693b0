"""Checkpoints: what may be read, what must fit, and modules that stay frozen."""

import copy
import logging
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from reliability.files import count, failures
from support.models import DDCONFIG, GAN, GPT, PLAIN, images, trainer
from support.original import save_as_lightning_1
from support.runs import run_main
from torch import nn

from taming.checkpoint import freeze, load_checkpoint, load_weights
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import VQModel
from taming.run.checkpoints import SafeCheckpointIO
from taming.util import WriteError


class Payload:
    """A class of the user's own, which no safe reader rebuilds."""


class CutShort(Callback):
    """Lets a time limit pass with the first batch."""

    def on_train_batch_start(self, trainer, *_):
        (timer,) = (c for c in trainer.callbacks if isinstance(c, Timer))
        timer._offset = 7200


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


def test_reads_checkpoints_of_lightning_1(path):
    """The package that wrote them need not be installed."""
    save_as_lightning_1(path, {"epoch": 1})
    found = load_checkpoint(path)
    assert [state["best_model_path"] for state in found["callbacks"].values()] == ["a"]


# Parts of the original's models in the order in which its optimizers had their parameters.
GENERATOR = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
DISCRIMINATOR = ("loss.discriminator",)


def adam_state(parameters, **options):
    """The state of an Adam of torch 1.7 after 6 steps; parameter i has exp_avg i."""
    state = {
        i: {
            "step": 6,
            "exp_avg": torch.full_like(parameter, i),
            "exp_avg_sq": torch.ones_like(parameter),
        }
        for i, parameter in enumerate(parameters)
    }
    group = {"lr": 1e-3, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    return {"state": state, "param_groups": [{**group, **options, "params": list(state)}]}


def of_parts(model, parts):
    return [p for part in parts for p in model.get_submodule(part).parameters()]


def lightning_1_content(model, optimizer_states):
    return {
        "epoch": 3,
        "global_step": 6,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": model.state_dict(),
        "optimizer_states": optimizer_states,
        "lr_schedulers": [],
    }


def resume(model, path, data, tmp_path, **kwargs):
    """Go on from a checkpoint as the program does; returns the trainer."""
    fit = trainer(tmp_path, plugins=[SafeCheckpointIO()], max_epochs=-1, **kwargs)
    fit.fit(model, data, data, ckpt_path=path, weights_only=True)
    return fit


def test_training_of_a_tokenizer_resumes_from_lightning_1(path, tmp_path):
    source, model = VQModel(DDCONFIG, GAN, 16, 4), VQModel(DDCONFIG, GAN, 16, 4)
    states = [adam_state(of_parts(source, parts)) for parts in (GENERATOR, DISCRIMINATOR)]
    save_as_lightning_1(path, lightning_1_content(source, states))
    fit = resume(model, path, images(4), tmp_path, max_steps=6)
    assert (fit.global_step, fit.current_epoch) == (6, 3)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    for optimizer, parts in zip(fit.optimizers, (GENERATOR, DISCRIMINATOR), strict=True):
        for i, parameter in enumerate(of_parts(model, parts)):
            state = optimizer.state[parameter]
            assert state["exp_avg"].shape == parameter.shape and (state["exp_avg"] == i).all()
            assert state["step"] == 6
        assert optimizer.param_groups[0]["lr"] == 1e-3
    fit = resume(VQModel(DDCONFIG, GAN, 16, 4), path, images(4), tmp_path, max_steps=8)
    assert (fit.global_step, fit.current_epoch) == (8, 4)


def test_training_of_a_prior_resumes_from_lightning_1(path, tmp_path):
    """Its optimizer had the names of all parameters sorted, those with weight decay first."""

    def prior():
        tokenizer = {"ddconfig": DDCONFIG, "lossconfig": PLAIN, "n_embed": 16, "embed_dim": 4}
        first_stage = {"target": "taming.models.vqgan.VQModel", "params": tokenizer}
        return Net2NetTransformer(GPT, first_stage, "__is_unconditional__")

    names = [
        *(f"blocks.0.attn.{name}.weight" for name in ("key", "proj", "query", "value")),
        *("blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "head.weight"),
        *(f"blocks.0.attn.{name}.bias" for name in ("key", "proj", "query", "value")),
        *(f"blocks.0.ln{i}.{name}" for i in (1, 2) for name in ("bias", "weight")),
        *("blocks.0.mlp.0.bias", "blocks.0.mlp.2.bias"),
        *("ln_f.bias", "ln_f.weight", "pos_emb", "tok_emb.weight"),
    ]
    source, model = prior(), prior()
    parameters = dict(source.transformer.named_parameters())
    assert sorted(names) == sorted(parameters)
    state = adam_state([parameters[name] for name in names], betas=(0.9, 0.95))
    (group,) = state["param_groups"]
    state["param_groups"] = [
        {**group, "weight_decay": 0.01, "params": list(range(7))},
        {**group, "weight_decay": 0.0, "params": list(range(7, len(names)))},
    ]
    content = lightning_1_content(source, [state])
    content["state_dict"]["transformer.blocks.0.attn.mask"] = torch.ones(1, 1, 200, 200)
    save_as_lightning_1(path, content)
    fit = resume(model, path, images(4), tmp_path, max_steps=6)
    assert (fit.global_step, fit.current_epoch) == (6, 3)
    for i, name in enumerate(names):
        parameter = model.transformer.get_parameter(name)
        assert (fit.optimizers[0].state[parameter]["exp_avg"] == i).all(), name
    fit = resume(prior(), path, images(4), tmp_path, max_steps=8)
    assert fit.global_step == 8


def test_the_program_resumes_from_lightning_1(tiny_runs, tmp_path):
    run = tmp_path / "logs" / "run"
    shutil.copytree(tiny_runs.of("custom_vqgan.yaml"), run)
    last = run / "checkpoints/last.ckpt"
    new = torch.load(last, weights_only=True)
    names = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
    old = {name: new[name] for name in names} | {"pytorch-lightning_version": "1.0.8"}
    torch.save({**old, "extra": Payload()}, last)
    with pytest.raises(SystemExit):
        run_main(tmp_path, "-r", run, "-t", "--max_steps", "3")
    run_main(tmp_path, "-r", run, "-t", "--max_steps", "3", "--trust_checkpoint")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    save_as_lightning_1(last, old)
    run_main(tmp_path, "-r", run, "-t", "--max_steps", "4")
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_weights_alone_are_nothing_to_resume(path, tmp_path):
    model = VQModel(DDCONFIG, PLAIN, 16, 4)
    torch.save({"state_dict": model.state_dict()}, path)
    with pytest.raises(ValueError, match=r"no state .*ckpt_path"):
        resume(model, path, images(4), tmp_path)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(path, monkeypatch, error):
    SafeCheckpointIO().save_checkpoint({"a": 1}, path)

    def full(content, file):
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match=rf"{path} cannot be saved, \d+ bytes .*{error}"):
        SafeCheckpointIO().save_checkpoint({"a": 2}, path)
    assert torch.load(path) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_what_torch_says_of_its_own_source_is_left_out(path, monkeypatch):
    def full(content, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match=r"cannot be saved, \d+ bytes are free there$"):
        SafeCheckpointIO().save_checkpoint({"a": 2}, path)


def test_another_kind_of_file_is_told_without_advice_to_run_it(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"begins with b'.x89PNG', unlike a file of") as raised:
        load_checkpoint(path)
    assert "weights_only" not in str(raised.value)


def test_a_time_limit_is_that_of_each_start(tmp_path):
    model = VQModel(DDCONFIG, PLAIN, 16, 4)
    limit = {"max_time": {"seconds": 3600}, "plugins": [SafeCheckpointIO()], "max_epochs": -1}
    first = trainer(tmp_path, callbacks=[CutShort()], **limit)
    first.fit(model, images(2), images(2))
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(tmp_path, max_steps=3, **limit)
    second.fit(model, images(2), images(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (first.global_step, second.global_step) == (1, 3)


def test_a_trainer_needs_trust_for_unknown_classes(path):
    model = nn.Linear(1, 1)
    torch.save({**lightning_1_content(model, []), "extra": Payload()}, path)
    with pytest.raises(ValueError, match="Payload.*trust_checkpoint"):
        SafeCheckpointIO().load_checkpoint(path)
    found = SafeCheckpointIO(trust_checkpoint=True).load_checkpoint(path)
    assert isinstance(found["extra"], Payload)


def test_models_need_trust_for_unknown_classes(path):
    config = {"ddconfig": DDCONFIG, "lossconfig": PLAIN, "n_embed": 16, "embed_dim": 4}
    model = VQModel(**config)
    torch.save({"state_dict": model.state_dict(), "extra": Payload()}, path)
    with pytest.raises(ValueError, match="Payload.*trust_checkpoint"):
        VQModel(**config, ckpt_path=str(path))
    other = VQModel(**config, ckpt_path=str(path), trust_checkpoint=True)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


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
        load_checkpoint(path, trust_checkpoint=trust)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint, mapped"])
def test_no_damaged_file_is_taken_for_a_whole_one(name):
    counts = count(name, n=60)
    assert counts["refused"] > 30 and not any(counts[result] for result in failures(name))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_flipped_bit_of_any_record_is_refused_by_its_name(path, lazy):
    torch.save({f"w{i}": torch.randn(50) for i in range(5)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.open(record).read()) for record in archive.filelist]
    for name, data in records:
        start = whole.index(data, whole.index(name.encode()))
        damaged = bytearray(whole)
        damaged[start + len(data) // 2] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"cannot be read .*fetch it again.*{name}"):
            load_checkpoint(path, lazy=lazy)


def test_files_without_checksums_load(path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(path)["w"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("zipped", [True, False])
def test_unknown_classes_need_trust(path, zipped):
    torch.save({"a": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.ckpt.*Payload.*trust_checkpoint: true"):
        load_checkpoint(path)
    assert isinstance(load_checkpoint(path, trust_checkpoint=True)["a"], Payload)


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


WRAPPED = {
    "module.": lambda weights: {f"module.{k}": v for k, v in weights.items()},
    "_orig_mod.": lambda weights: {"state_dict": {f"_orig_mod.{k}": v for k, v in weights.items()}},
    "body._orig_mod.": lambda weights: {
        k.replace("body.", "body._orig_mod."): v for k, v in weights.items()
    },
    "both": lambda weights: {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
    "model": lambda weights: {"model": weights, "optimizer": {}},
    "ema": lambda weights: {"ema": weights, "step": 3},
}


@pytest.mark.parametrize("wrapper", list(WRAPPED))
def test_weights_of_a_wrapped_model_load(path, wrapper, caplog):
    source, target = Model(), Model()
    torch.save(WRAPPED[wrapper](source.state_dict()), path)
    with caplog.at_level(logging.INFO):
        load_weights(target, path)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert ("of a wrapped model" in caplog.text) == (wrapper not in ("model", "ema"))


def test_weights_load_into_a_wrapped_model(path):
    source = Model()
    torch.save(source.state_dict(), path)
    load_weights(target := nn.DataParallel(Model()), path)
    torch.testing.assert_close(target.module.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_nobody_is_advised_to_keep_a_random_encoder(path):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "depth": nn.Linear(2, 2)})
    torch.save(model.state_dict(), path)
    for part, advised in (("encoder", False), ("depth", True)):
        kept = {k: v for k, v in model.state_dict().items() if not k.startswith(part)}
        torch.save(kept, path)
        with pytest.raises(
            ValueError, match=f"lacks weights of ModuleDict: {part}.weight"
        ) as caught:
            load_weights(model, path)
        assert ("ignore_keys" in str(caught.value)) == advised


def test_shape_mismatch_lists_keys_and_both_shapes(path):
    torch.save(Model(width=4).state_dict(), path)
    with pytest.raises(ValueError, match="does not fit Model") as caught:
        load_weights(Model(), path)
    message = str(caught.value)
    for expected in ("body.weight", "body.bias", "[4, 2]", "[3, 2]", str(path)):
        assert expected in message


def test_missing_keys_are_refused_unless_ignored(path):
    torch.save({"body.weight": torch.ones(3, 2), **Model().loss.state_dict(prefix="loss.")}, path)
    with pytest.raises(ValueError, match="Model: body.bias;"):
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


def test_the_loss_of_a_model_inside_is_not_listed_either(path, caplog):
    whole = nn.ModuleDict({"first_stage_model": Model()})
    state = whole.state_dict()
    torch.save({**state, "first_stage_model.loss.lpips": torch.ones(1)}, path)
    with caplog.at_level(logging.DEBUG, "taming.checkpoint"):
        load_weights(whole, path)
    assert "left out its 1 weights" in caplog.text and "lpips" not in caplog.text


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
