"""Tokenizers of other projects give the same codes and pictures here, and there again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from support.models import DDCONFIG, PLAIN, QUANTIZED, pictures, prior, tokenizer_of
from support.runs import call, fails
from torch import Tensor

import taming
from taming.models.vqgan import VQModel
from taming.run.layouts import LAYOUTS, parameters_from, recognise, translate
from taming.tokenizer import Tokenizer

SIZES = {**DDCONFIG, "ch_mult": [1, 2, 2], "attn_resolutions": [4], "num_res_blocks": 2}


def tokenizer(**params: Any) -> VQModel:
    """A VQ model of three levels with attention, and codes that latents are spread over."""
    torch.manual_seed(1)
    model = VQModel(SIZES, PLAIN, n_embed=16, embed_dim=4, **params).eval().requires_grad_(False)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.4)
    return model


def converted(folder: Path, source: Path, *options: str) -> VQModel:
    call("convert", source, "-o", folder / "converted", "--resolution", "16", *options)
    loaded = taming.load(folder / "converted")
    assert isinstance(loaded, Tokenizer)
    return loaded.model


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


# --- taming and latent-diffusion -----------------------------------------------------------------


def wrapped(weights: Mapping[str, Tensor], how: str) -> dict[str, Any]:
    if how == "compiled":
        return {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}}
    if how == "parallel":
        return {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
    if how == "first stage":
        more = {"model.diffusion_model.out.weight": torch.ones(3), "transformer.x": torch.ones(1)}
        return {"state_dict": {f"first_stage_model.{k}": v for k, v in weights.items()} | more}
    return {"state_dict": {**weights, "loss.logvar": torch.ones(1)}} if how == "lightning" else {}


@pytest.mark.parametrize("how", ["lightning", "compiled", "parallel", "first stage"])
def test_a_checkpoint_needs_no_configuration_however_it_was_wrapped(
    how: str, tmp_path: Path
) -> None:
    model, x = tokenizer(), pictures(2)
    torch.save(wrapped(model.state_dict(), how), tmp_path / "last.ckpt")
    again = converted(tmp_path, tmp_path / "last.ckpt")
    assert torch.equal(again.encode_to_codes(x), model.encode_to_codes(x))
    assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("quantizer", ["first", "plain", "averages", "gumbel"])
def test_the_quantizers_of_the_original_are_told_by_their_keys(
    quantizer: str, tmp_path: Path
) -> None:
    model, x = tokenizer_of(quantizer), pictures(2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    again = converted(tmp_path, tmp_path / "last.ckpt")
    assert torch.equal(again.encode_to_codes(x), model.encode_to_codes(x))
    assert torch.equal(again(x)[0], model(x)[0])


def test_options_that_weights_do_not_show_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = VQModel({**SIZES, "ch": 16, "num_groups": 4}, PLAIN, n_embed=16, embed_dim=4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    error = fails(capsys, "convert", tmp_path / "last.ckpt", "-o", tmp_path / "converted")
    assert "read as one of taming" in error and "--config" in error and "save_pretrained" in error


def test_published_models_are_told_by_their_keys_and_shapes(shared: Path) -> None:
    published = json.loads((shared / "upstream/state_dict_keys.json").read_text())
    told = 0
    for name, keys in published.items():
        weights = {
            key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for key, (shape, dtype) in keys.items()
        }
        layout, own = recognise(weights)
        if "colorize" in own:
            with pytest.raises(ValueError, match="label maps"):
                parameters_from(own, 256, 32)
            continue
        with torch.device("meta"):
            model = VQModel(**parameters_from(own, 256, 32))
        found = {key: value.shape for key, value in model.state_dict().items()}
        assert layout == "taming" and found == {k: v.shape for k, v in own.items()}, name
        told += 1
    assert told >= 5


def test_averages_of_latent_diffusion(tmp_path: Path) -> None:
    model, average, x = tokenizer(), tokenizer(), pictures(2)
    with torch.no_grad():
        average.decoder.conv_out.bias.add_(1)
    kept = {f"model_ema.{k.replace('.', '')}": v for k, v in average.state_dict().items()}
    kept |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    torch.save({"state_dict": model.state_dict() | kept}, tmp_path / "last.ckpt")
    assert torch.equal(converted(tmp_path, tmp_path / "last.ckpt")(x)[0], model(x)[0])
    assert torch.equal(converted(tmp_path, tmp_path / "last.ckpt", "--ema")(x)[0], average(x)[0])


def test_averages_beside_the_model(tmp_path: Path) -> None:
    model, average, x = tokenizer(), tokenizer(), pictures(2)
    with torch.no_grad():
        average.decoder.conv_out.bias.add_(1)
    file = {"model": model.state_dict(), "ema": average.state_dict(), "steps": 5}
    torch.save(file, tmp_path / "last.pt")
    assert torch.equal(converted(tmp_path, tmp_path / "last.pt")(x)[0], model(x)[0])
    assert torch.equal(converted(tmp_path, tmp_path / "last.pt", "--ema")(x)[0], average(x)[0])


def test_a_configuration_names_what_shapes_do_not_show(tmp_path: Path) -> None:
    model = prior("residual").eval()
    config = {"model": {**model.to_config(), "base_learning_rate": 1e-4}}
    config["model"]["params"]["ckpt_path"] = "gone.ckpt"
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    call(
        *("convert", tmp_path / "last.ckpt", "--config", tmp_path / "prior.yaml"),
        *("-o", tmp_path / "converted", "--dtype", "float16"),
    )
    again = taming.load(tmp_path / "converted")
    assert isinstance(again, taming.Generator)
    weight = model.transformer.state_dict()["head.weight"]
    close(again.model.transformer.state_dict()["head.weight"], weight.half().float())


# --- LlamaGen ------------------------------------------------------------------------------------


class LlamaGen:
    """The published tokenizer as a function of its weights, which counts those that it used."""

    def __init__(self, weights: Mapping[str, Tensor], levels: int, blocks: int) -> None:
        self.weights, self.levels, self.blocks = weights, levels, blocks
        self.used: set[str] = set()

    def at(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    def conv(self, x: Tensor, name: str, **options: Any) -> Tensor:
        weight = self.at(f"{name}.weight")
        options = {"padding": weight.shape[-1] // 2} | options
        return F.conv2d(x, weight, self.at(f"{name}.bias"), **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.at(f"{name}.weight"), self.at(f"{name}.bias"), 1e-6)

    def res(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        if h.shape != x.shape:
            x = self.conv(x, f"{name}.nin_shortcut")
        return x + h

    def attend(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")  # (B, C, N)
        weights = (torch.einsum("bcn,bcm->bnm", q, k) * q.shape[1] ** -0.5).softmax(-1)
        h = torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape)
        return x + self.conv(h, f"{name}.proj_out")

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.attend(self.res(x, f"{name}.mid.0"), f"{name}.mid.1")
        return self.res(x, f"{name}.mid.2")

    def level(self, x: Tensor, name: str, blocks: int, attends: bool) -> Tensor:
        for j in range(blocks):
            x = self.res(x, f"{name}.res.{j}")
            x = self.attend(x, f"{name}.attn.{j}") if attends else x
        return x

    def encode(self, x: Tensor) -> Tensor:
        last = self.levels - 1
        x = self.conv(x, "encoder.conv_in")
        for i in range(self.levels):  # from the finest
            x = self.level(x, f"encoder.conv_blocks.{i}", self.blocks, i == last)
            if i < last:
                x = F.pad(x, (0, 1, 0, 1))
                name = f"encoder.conv_blocks.{i}.downsample.conv"
                x = self.conv(x, name, stride=2, padding=0)
        x = F.silu(self.norm(self.middle(x, "encoder"), "encoder.norm_out"))
        return self.conv(self.conv(x, "encoder.conv_out"), "quant_conv")

    def codes(self, z: Tensor) -> Tensor:
        unit = F.normalize(self.at("quantize.embedding.weight"), dim=-1)
        return torch.einsum("bdhw,kd->bhwk", F.normalize(z, dim=1), unit).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        unit = F.normalize(self.at("quantize.embedding.weight"), dim=-1)
        x = self.conv(unit[codes].permute(0, 3, 1, 2), "post_quant_conv")
        x = self.middle(self.conv(x, "decoder.conv_in"), "decoder")
        for i in range(self.levels):  # from the coarsest
            x = self.level(x, f"decoder.conv_blocks.{i}", self.blocks + 1, i == 0)
            if i < self.levels - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(x, f"decoder.conv_blocks.{i}.upsample.conv")
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out")


def test_a_tokenizer_of_llamagen(tmp_path: Path) -> None:
    model, x = tokenizer(), pictures(2)
    table = LAYOUTS["LlamaGen"].table
    theirs = {translate(key, table, last=2): v for key, v in model.state_dict().items()}
    reference = LlamaGen(theirs, levels=3, blocks=2)
    codes = reference.codes(reference.encode(x))
    wanted = reference.decode(codes)
    assert reference.used == set(theirs)
    used = {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": {**theirs, **used}}, tmp_path / "vq_ds4.pt")
    again = converted(tmp_path, tmp_path / "vq_ds4.pt")
    assert torch.equal(again.encode_to_codes(x)[..., 0], codes) and len(codes.unique()) > 3
    close(again.decode_code(codes), wanted)


# --- diffusers -----------------------------------------------------------------------------------


def diffusers_model(**config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    about = {
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [32, 64, 64],
        **{"layers_per_block": 2, "latent_channels": 8, "vq_embed_dim": 4, "sample_size": 16},
        **{"num_vq_embeddings": 16, "norm_num_groups": 16},
    }
    model = diffusers.VQModel(**{**about, **config}).eval().requires_grad_(False)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.4)
    return model


def agree(ours: VQModel, theirs: Any) -> None:
    x = pictures(2)
    latents = theirs.encode(x).latents
    close(ours.encode_to_prequant(x), latents)
    codes = theirs.quantize(latents)[2][2].reshape(2, 4, 4)
    assert torch.equal(ours.encode_to_codes(x)[..., 0], codes) and len(codes.unique()) > 3
    close(ours(x)[0], theirs.decode(latents).sample)


def test_a_model_of_diffusers_there_and_back(tmp_path: Path) -> None:
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path, tmp_path / "theirs")
    agree(ours, theirs)
    call("convert", tmp_path / "converted", "--to", "diffusers", "-o", tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    weights = again.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in theirs.state_dict().items())


def test_the_names_of_older_versions_of_diffusers(tmp_path: Path) -> None:
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    names = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    weights = load_file(file)
    for new, old in names.items():
        weights = {key.replace(new, old): value for key, value in weights.items()}
    save_file(weights, file)
    agree(converted(tmp_path, tmp_path / "theirs"), theirs)


def test_a_model_of_this_project_in_diffusers(tmp_path: Path) -> None:
    model = tokenizer()
    Tokenizer(model).save_pretrained(tmp_path / "ours")
    call("convert", tmp_path / "ours", "--to", "diffusers", "-o", tmp_path / "theirs")
    agree(model, pytest.importorskip("diffusers").VQModel.from_pretrained(tmp_path / "theirs"))


def test_back_to_the_original(tmp_path: Path) -> None:
    model = tokenizer_of("averages")
    Tokenizer(model).save_pretrained(tmp_path / "ours")
    call("convert", tmp_path / "ours", "--to", "taming", "-o", tmp_path / "back")
    block = yaml.safe_load((tmp_path / "back/model.yaml").read_text())["model"]
    assert block["target"] == "taming.models.vqgan.VQModel"
    again = VQModel(**block["params"], ckpt_path=str(tmp_path / "back/model.ckpt")).eval()
    x = pictures(2)
    assert torch.equal(again.encode_to_codes(x), model.encode_to_codes(x))
    assert torch.equal(again(x)[0], model(x)[0])


# --- refusals ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: object) -> str:
    error = fails(capsys, "convert", *argv, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return error


def test_unknown_layouts_are_named_by_their_first_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, own = tmp_path / "x.ckpt", tokenizer().state_dict()

    def error(**changes: Any) -> str:
        torch.save({k: v for k, v in (own | changes).items() if v is not None}, file)
        return refused(capsys, tmp_path, file)

    assert "nothing takes its encoder.extra.weight" in error(
        **{"encoder.extra.weight": own["quant_conv.bias"]}
    )
    assert "it lacks decoder.mid.block_1" in error(
        **{key: None for key in own if key.startswith("decoder.mid.block_1")}
    )
    assert "no codebook of a known quantizer, only ['quantize.w']" in error(
        **{"quantize.embedding.weight": None, "quantize.w": torch.ones(1)}
    )
    assert "remapped (quantize.used)" in error(**{"quantize.used": torch.arange(3)})
    torch.save({"layers.0.weight": torch.ones(1)}, file)
    assert "no known layout" in (found := refused(capsys, tmp_path, file))
    assert "layers.0.weight" in found
    torch.save({"state_dict": own}, file)
    assert "has no averaged weights" in refused(capsys, tmp_path, file, "--ema")


def test_what_diffusers_may_have_and_this_project_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = diffusers_model(norm_type="spatial")
    theirs.save_pretrained(tmp_path / "a")
    assert "norm_type is 'spatial', and only 'group'" in refused(capsys, tmp_path, tmp_path / "a")
    file = tmp_path / "a/diffusion_pytorch_model.safetensors"
    assert "give its folder, with config.json" in refused(capsys, tmp_path, file)
    (tmp_path / "a/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "of a AutoencoderKL, not of" in refused(capsys, tmp_path, tmp_path / "a")
    assert "no config.json" in refused(capsys, tmp_path, tmp_path)


def test_what_has_no_place_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("residual", "gumbel", "levels"):
        Tokenizer(tokenizer_of(name)).save_pretrained(tmp_path / name)
        assert "has no place elsewhere" in refused(
            capsys, tmp_path, tmp_path / name, "--to", "diffusers"
        )
    params = QUANTIZED["plain"]["params"]
    wide = VQModel(**{**params, "ddconfig": {**DDCONFIG, "ch_mult": [2, 2]}})
    Tokenizer(wide).save_pretrained(tmp_path / "wide")
    error = refused(capsys, tmp_path, tmp_path / "wide", "--to", "diffusers")
    assert "has ch_mult [2, 2]" in error
    fine = VQModel(**{**params, "ddconfig": {**DDCONFIG, "num_groups": 8}})
    Tokenizer(fine).save_pretrained(tmp_path / "fine")
    assert "32 groups, but this model's 8" in refused(
        capsys, tmp_path, tmp_path / "fine", "--to", "taming"
    )
