"""One quantizer in place of another: sizes under any name, and parts of a model that stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import GAN, LOOPY, images, trainer, vqmodel_config
from support.runs import CONFIGS, LIMITS, TinyRuns, run_main
from torch import Tensor
from torch.utils.data import DataLoader

from taming.models.vqgan import VQModel
from taming.modules.vqvae.build import build_quantizer
from taming.run.check import check_experiment
from taming.run.config import load_config
from taming.run.folder import model_from_run
from taming.util import QUANTIZER_SIZES, instantiate_from_config

QUANTIZE = "taming.modules.vqvae.quantize"
ZOO = "taming.modules.vqvae.zoo.LibraryQuantizer"
PREFIX = "model.params.quantizer_config"
# Target -> the params that it needs beside its sizes.
QUANTIZERS: dict[str, dict[str, Any]] = {
    f"{QUANTIZE}.VectorQuantizer": {"beta": 0.25},
    f"{QUANTIZE}.VectorQuantizer2": {"beta": 0.25},
    f"{QUANTIZE}.EMAVectorQuantizer": {"beta": 0.25},
    f"{QUANTIZE}.GumbelQuantize": {},
    f"{QUANTIZE}.LoopyVectorQuantizer": {"target_length": 2.0, "ema_decay": 0.99},
    ZOO: {"name": "ResidualVQ", "num_quantizers": 3, "rotation_trick": False},
}
every_quantizer = pytest.mark.parametrize("target", list(QUANTIZERS))
GRID = ("encoder", "quant_conv", "quantize")


def block(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": QUANTIZERS[target] | params}


@pytest.mark.parametrize("k", ["n_e", "n_embed"])
@pytest.mark.parametrize("d", ["e_dim", "embedding_dim", "num_hiddens"])
@every_quantizer
def test_every_quantizer_takes_every_name_of_its_sizes(target: str, k: str, d: str) -> None:
    for sizes in ({}, {"n_e": 16}, {"n_e": 16, "e_dim": 4}):
        built = build_quantizer(block(target, **{k: 16, d: 4}), **sizes)
        assert (built.n_e, built.e_dim) == (16, 4)
    with pytest.raises(ValueError, match=f"{k} is 16, but the model around it has 8"):
        build_quantizer(block(target, **{k: 16, d: 4}), n_e=8)


@every_quantizer
def test_any_quantizer_is_swapped_for_another_on_the_command_line(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [f"{PREFIX}.params.{name}={value}" for name, value in QUANTIZERS[target].items()]
    sizes = [
        f"{PREFIX}.params.{name}={256 if size == 'n_e' else 64}"
        for name, size in QUANTIZER_SIZES.items()
    ]
    for file in ("cifar10_loopy.yaml", "zoo/residual_vq.yaml"):
        config = load_config([CONFIGS / file], [f"{PREFIX}.target={target}", *keys, *sizes])
        old = config.values["model"]["params"]["quantizer_config"]
        was_there = {name for name in old["params"] if name not in QUANTIZER_SIZES}
        caplog.clear()
        check_experiment(config, train=True)
        model = instantiate_from_config(config.values["model"])
        assert type(model.quantize).__name__ == target.rpartition(".")[2]
        assert (model.quantize.n_e, model.quantize.e_dim) == (256, 64)
        dropped = was_there - old["params"].keys()
        lines = [r.message for r in caplog.records if f"{target} does not take" in r.message]
        assert len(lines) == bool(dropped)
        assert all(f"{name}=" in line for line in lines for name in dropped)
        if target.endswith("EMAVectorQuantizer"):
            assert {"max_loops", "transform_config"} <= dropped or "num_quantizers" in dropped


# --- freezing ------------------------------------------------------------------------------------


def part_of(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.items() if k.split(".")[0] in names}


@pytest.mark.parametrize("frozen", [("encoder", "quantize"), ("decoder",), ("quantize",)])
@every_quantizer
def test_frozen_parts_stay_bit_identical(target: str, frozen: tuple, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = vqmodel_config(quantizer_config=block(target), freeze=list(frozen))
    model: VQModel = instantiate_from_config(config)
    model.learning_rate = 0.01
    before = part_of(model.state_dict(), *model.parts)
    trainer(tmp_path).fit(model.train(), images(6), images(2))
    after = model.state_dict()
    for name, part in model.parts.items():
        same = all(torch.equal(after[k], v) for k, v in part_of(before, name).items())
        learns = any(p.requires_grad for p in part.parameters()) or part.training
        assert same == (name in frozen) or not learns, name
        if name in frozen:
            assert same and not part.training


def test_gradients_pass_through_a_frozen_quantizer(tmp_path: Path) -> None:
    model = instantiate_from_config(vqmodel_config(quantizer_config=LOOPY, freeze=["quantize"]))
    model.train()(torch.randn(1, 3, 16, 16))[0].sum().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_a_decoder_alone_is_trained_for_perception(tmp_path: Path) -> None:
    """The recipe of docs/photos.md."""
    perceptual = {"target": "taming.modules.losses.st_lpips.STLPIPS"}
    params = {**GAN["params"], "disc_start": 0, "disc_factor": 0.0, "perceptual_weight": 0.1}
    loss = {**GAN, "params": params | {"perceptual_config": perceptual}}
    frozen = ["encoder", "quant_conv", "quantize"]
    config = vqmodel_config(quantizer_config=LOOPY, lossconfig=loss, freeze=frozen)
    model: VQModel = instantiate_from_config(config)
    model.learning_rate = 0.01
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = DataLoader([{"image": torch.rand(24, 24, 3) * 2 - 1} for _ in range(2)], batch_size=2)
    trainer(tmp_path).fit(model.train(), data, data)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    changed -= {name for name in changed if name.startswith("loss.perceptual_loss.")}  # fetched
    assert changed and {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}
    assert model.loss.perceptual_loss is not None and not model.loss.perceptual_loss.needs_weights


def test_a_decoder_beside_a_frozen_loop_learns_all_of_its_rates() -> None:
    params = LOOPY["params"] | {"length_range": [1.0, 3.0], "max_loops": 3, "threshold": 0.0}
    loop = {**LOOPY, "params": params}
    model: VQModel = instantiate_from_config(vqmodel_config(quantizer_config=loop))
    frozen = instantiate_from_config(vqmodel_config(quantizer_config=loop, freeze=["quantize"]))
    frozen.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 16, 16)

    def lengths(tested: VQModel) -> Tensor:
        torch.manual_seed(0)
        return tested.reconstruct(x)[1].info.encodings.lengths.float().mean(dim=(1, 2))

    # One that learns has moved a little by then.
    torch.testing.assert_close(lengths(frozen.train()), lengths(model.train()), atol=0.1, rtol=0)
    assert len(lengths(frozen).unique()) > 1
    assert (lengths(frozen.eval()) == 3).all()  # its own threshold, never reached


@pytest.mark.parametrize(
    "params, message",
    [
        ({"freeze": ["encodr"]}, "no part 'encodr'; the parts are encoder, decoder"),
        ({"freeze": "encoder"}, r"use \[encoder\]"),
        (
            {"freeze": ["encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"]},
            "nothing",
        ),
        ({"freeze": ["decoder"], "lossconfig": GAN}, "discriminator"),
    ],
)
def test_mistakes_get_one_line(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instantiate_from_config(vqmodel_config(**params))


@pytest.mark.parametrize(
    "name, target",
    [
        ("zoo/residual_vq.yaml", f"{QUANTIZE}.LoopyVectorQuantizer"),
        ("vqvae_cifar10.yaml", ZOO),
    ],
)
def test_a_trained_tokenizer_gets_another_quantizer(
    name: str, target: str, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    """The command of docs/quantizers.md."""
    source = tiny_runs.of(name)
    (config,) = source.glob("configs/*-project.yaml")
    checkpoint = source / "checkpoints/last.ckpt"
    keys = [f"{PREFIX}.params.{name}={value}" for name, value in QUANTIZERS[target].items()]
    run_main(
        tmp_path,
        *("-b", config, "-t", "--max_steps", "2", *LIMITS, "--accelerator", "cpu"),
        f"model.params.ckpt_path={checkpoint}",
        *("model.params.ignore_keys=[quantize]", "model.params.freeze=[encoder,quant_conv]"),
        *(f"{PREFIX}.target={target}", *keys, "model.params.n_embed=32"),
    )
    (run,) = tmp_path.glob("logs/*")
    before, after = (model_from_run(folder).state_dict() for folder in (source, run))
    for key, value in part_of(before, "encoder", "quant_conv").items():
        assert torch.equal(value, after[key]), key
    assert not torch.equal(before["decoder.conv_in.weight"], after["decoder.conv_in.weight"])
    assert model_from_run(run).quantize.n_e == 32
