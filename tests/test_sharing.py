"""A shared model is one folder: the same model again, without its run, or one clear error."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.models import QUANTIZED, every_quantizer, level_config, prior, tokenizer_of
from support.runs import TinyRuns, fails
from torch import nn

import taming
from taming.generator import Generator
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.level_prior import LowerLevelPrior
from taming.models.vqgan import VQModel
from taming.modules.recorded import Recorded
from taming.run import parts
from taming.run.folder import SavedRun, model_from_run
from taming.tokenizer import Tokenizer
from taming.util import instantiate_from_config

GPT = {"target": "taming.modules.transformer.gpt.GPT"}
GPT |= {"params": {"n_layer": 1, "n_head": 2, "n_embd": 8}}


class Ticks(Recorded, nn.Module):
    """Stands for a context network: numbers that must stay exact."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.register_buffer("ticks", torch.arange(count) / 3)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def same(first: nn.Module, second: nn.Module) -> bool:
    """Compare weights bit for bit, those of losses left out."""
    one, two = (
        {k: v for k, v in module.state_dict().items() if "loss" not in k.split(".")}
        for module in (first, second)
    )
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer(tokenizer_of("residual")).save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"


# --- round trips ---------------------------------------------------------------------------------


@every_quantizer
def test_every_tokenizer_comes_back_bit_for_bit(quantizer: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_of(quantizer))
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert same(again.model, tokenizer.model) and type(again.model) is type(tokenizer.model)
    first, second = (own.encode(picture()) for own in (tokenizer, again))
    assert all(map(torch.equal, first.levels, second.levels))
    assert tokenizer.decode(first).tobytes() == again.decode(second).tobytes()
    assert not any("loss" in key for key in load_file(tmp_path / "model.safetensors"))


def test_half_precision_halves_the_file_and_is_float32_when_loaded(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    with torch.no_grad():  # beyond what float16 holds
        tokenizer.model.decoder.conv_out.bias[0] = 1e6
    tokenizer.save_pretrained(tmp_path / "half", "float16")
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "half")]
    assert sizes[1] < 0.55 * sizes[0]
    again = Tokenizer.from_pretrained(tmp_path / "half").model
    kept = {"decoder.conv_out.bias"}
    for key, value in tokenizer.model.state_dict().items():
        rounded = value.half().to(value.dtype) if value.is_floating_point() else value
        found = again.state_dict()[key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value if key in kept else rounded)
    for dtype in ("float17", torch.int8):
        with pytest.raises(ValueError, match=r"dtype must be .* 'float16', got"):
            tokenizer.save_pretrained(tmp_path / "none", dtype)
    assert not (tmp_path / "none").exists()


def test_a_run_leaves_everything_of_training_behind(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    tokenizer = taming.load(tiny_runs.of("demo/loopy_vqgan.yaml"))
    assert isinstance(tokenizer, Tokenizer)
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    assert "DummyLoss" in text and "ckpt_path" not in text and "Discriminator" not in text
    assert same(Tokenizer.from_pretrained(tmp_path).model, tokenizer.model)


def test_a_part_that_was_frozen_trains_again_from_what_is_shared(tmp_path: Path) -> None:
    params = yaml.safe_load(yaml.safe_dump(QUANTIZED["residual"]["params"]))
    model = VQModel(**params, freeze=["encoder"], quantize_start=3)
    Tokenizer(model).save_pretrained(tmp_path)
    assert not Tokenizer(model).model.train().encoder.training
    assert Tokenizer.from_pretrained(tmp_path).model.train().encoder.training


def test_a_generator_has_its_tokenizer_with_it(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    generator = taming.load(tiny_runs.class_conditional())
    assert isinstance(generator, Generator)
    generator.save_pretrained(tmp_path)
    assert "logs" not in (tmp_path / "config.yaml").read_text()  # no path to another run
    again = Generator.from_pretrained(tmp_path)
    assert same(again.model, generator.model)
    pictures = [own.sample(1, label=3, seed=4)[0] for own in (generator, again)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert isinstance(taming.load(tmp_path), Generator)
    with pytest.raises(ValueError, match="takes no other"):
        taming.load(tmp_path, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="takes a tokenizer .* got a Net2Net"):
        Tokenizer.from_pretrained(tmp_path)


def test_priors_of_all_levels_are_one_folder(tmp_path: Path) -> None:
    top = Net2NetTransformer(GPT, level_config("top", "ema", "flat"), "__is_unconditional__")
    bottom = LowerLevelPrior(GPT, level_config("bottom", "ema", "flat"))
    bottom.first_stage_model.model.load_state_dict(top.first_stage_model.model.state_dict())
    generator = Generator([top, bottom])
    generator.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    assert all(map(same, again.priors, generator.priors))
    assert again.sample(1)[0].tobytes() == generator.sample(1)[0].tobytes()


def test_a_context_network_goes_along_and_stays_exact(tmp_path: Path) -> None:
    context = Ticks(5)
    assert Tokenizer(tokenizer_of("plain"), context=context).context is context
    Tokenizer(tokenizer_of("plain"), context=context).save_pretrained(tmp_path, "float16")
    assert "context.ticks" in load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"context\.target.*may not build"):
        Tokenizer.from_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path, trust_config=True)
    assert isinstance(again.context, Ticks) and torch.equal(again.context.ticks, context.ticks)
    assert isinstance(model_from_run(tmp_path, trust_config=True), VQModel)


# --- what stands in the folder -------------------------------------------------------------------


def test_the_card_tells_what_the_config_gives_and_stays_when_it_was_edited(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    facts = ("# shared", "16 x 16 pixels", "2 x 2 pixels", "16 in 4 dimensions, at most 3 a site")
    assert all(fact in card for fact in facts)
    (folder / "README.md").write_text("mine")
    Tokenizer.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


@every_quantizer
def test_one_line_shows_what_the_card_tells(quantizer: str) -> None:
    tokenizer = Tokenizer(tokenizer_of(quantizer))
    assert repr(tokenizer).startswith("Tokenizer(") and "\n" not in repr(tokenizer)
    assert all(str(fact) in repr(tokenizer) for fact in tokenizer.facts().values())
    assert repr(Generator(prior())).startswith("Generator(prior model: Net2NetTransformer of ")


def test_a_shared_folder_stands_where_a_run_may(folder: Path, tmp_path: Path) -> None:
    tokenizer = taming.load(folder)
    assert isinstance(tokenizer, Tokenizer)
    assert SavedRun.load(folder).step() == 0
    block = {"target": "taming.run.folder.model_from_run", "params": {"run": str(folder)}}
    built = instantiate_from_config(block)
    assert same(built, tokenizer.model) and not built.training
    assert model_from_run(folder, monitor="val/x").monitor == "val/x"


def test_inference_from_a_folder_imports_no_training(folder: Path) -> None:
    code = f"""
import sys, numpy, taming
tokenizer = taming.Tokenizer.from_pretrained({str(folder)!r})
tokenizer.decode(tokenizer.encode(numpy.zeros((16, 16, 3), "uint8")))
slow = {{"lightning", "torchvision", "torchmetrics", "huggingface_hub"}} & sys.modules.keys()
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_others_may_read_what_is_shared(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    plain = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain}


# --- shipped models ------------------------------------------------------------------------------


@pytest.fixture
def ships(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder ships as ``shared``; the current folder is another."""
    monkeypatch.setattr(parts, "SHIPPED", folder.parent)
    (folder.parent / "elsewhere").mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")


@pytest.mark.usefixtures("ships")
def test_a_shipped_model_is_found_by_its_name(folder: Path) -> None:
    wanted = Tokenizer.from_pretrained(folder).model
    for tokenizer in (taming.load("shared"), Tokenizer.from_pretrained("shared")):
        assert isinstance(tokenizer, Tokenizer) and same(tokenizer.model, wanted)
    for load in (taming.load, Tokenizer.from_pretrained, model_from_run):
        with pytest.raises(FileNotFoundError, match=r"shard does not exist.*\(shipped: shared\)"):
            load("shard")


@pytest.mark.usefixtures("ships")
def test_a_model_of_its_own_wins_over_a_shipped_name_and_a_folder_of_pictures_does_not(
    folder: Path,
) -> None:
    Path("shared").mkdir()
    (Path("shared") / "photo.png").write_bytes(b"")
    wanted = Tokenizer.from_pretrained(folder).model
    for tokenizer in (taming.load("shared"), Tokenizer.from_pretrained("shared")):
        assert isinstance(tokenizer, Tokenizer) and same(tokenizer.model, wanted)
    Tokenizer(tokenizer_of("attract")).save_pretrained("shared")
    for tokenizer in (taming.load("shared"), Tokenizer.from_pretrained("shared")):
        assert "Attract" in str(tokenizer.model.to_config())


# --- refusals ------------------------------------------------------------------------------------


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"has no {name}" in refusal(folder)


def test_an_empty_folder_and_a_run_are_refused(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    assert "has no config.yaml" in refusal(tmp_path)
    run = tiny_runs.of("demo/loopy_vqgan.yaml")
    assert "is a run: load it with taming.load" in refusal(run)
    tokenizer = taming.load(run)
    with pytest.raises(ValueError, match="is a run: choose another"):
        tokenizer.save_pretrained(run)


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    key = "quant_conv.bias"
    own = load_file(folder / "model.safetensors")[key]
    change_weights(folder, **{key: None})
    assert f"it lacks {key}" in refusal(folder)
    change_weights(folder, **{key: own[:2].clone()})
    assert f"{key} of (2,) in place of (4,)" in refusal(folder)
    change_weights(folder, **{key: own, **{f"more{n}": own.clone() for n in range(5)}})
    assert "nothing takes its more0, more1, more2 and 2 more" in refusal(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "damaged, incompletely downloaded or of another kind" in refusal(folder)


def change_config(folder: Path, **blocks: object) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text()) | blocks
    config = {name: block for name, block in config.items() if block is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_folder_builds_nothing_that_a_run_may_not(folder: Path) -> None:
    bad = {"target": "subprocess.Popen", "params": {"args": ["touch", str(folder / "harm")]}}
    for name in ("context", "level_0", "model"):
        block = yaml.safe_load((folder / "config.yaml").read_text()).get(name)
        change_config(folder, **{name: bad})
        assert f"{name}.target: a saved run may not build subprocess.Popen" in refusal(folder)
        change_config(folder, **{name: block})
    (folder / "config.yaml").write_text("model: ${oc.env:HOME}")
    assert "may not call a resolver" in refusal(folder)
    assert not (folder / "harm").exists()


def test_unknown_blocks_and_keys_are_named(folder: Path) -> None:
    change_config(folder, modle=QUANTIZED["plain"])
    assert "has modle; expected model" in refusal(folder)
    (folder / "config.yaml").write_text("{}")
    assert "has no block" in refusal(folder)
    config = QUANTIZED["plain"]
    wrong = {**config, "params": {**config["params"], "n_embde": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": wrong}))
    assert "did you mean 'n_embed'" in refusal(folder)


def test_a_model_that_no_file_can_state_is_refused_before_anything_is_saved(tmp_path: Path) -> None:
    class Local(VQModel):
        pass

    params = QUANTIZED["plain"]["params"]
    with pytest.raises(ValueError, match="Local cannot be found by this name"):
        Tokenizer(Local(**params)).save_pretrained(tmp_path / "a")
    odd = VQModel(**params, betas=(0.5, np.float32(0.9)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"betas\.1 is a float32"):
        Tokenizer(odd).save_pretrained(tmp_path / "a")
    np.save(tmp_path / "used.npy", np.arange(8))
    mapped = VQModel(**params, remap=str(tmp_path / "used.npy"))
    with pytest.raises(ValueError, match=r"remap names a file, .*used\.npy"):
        Tokenizer(mapped).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_arguments_are_recorded_as_they_were(tmp_path: Path) -> None:
    params = yaml.safe_load(yaml.safe_dump(QUANTIZED["residual"]["params"]))
    model = VQModel(**params)
    params["quantizer_config"]["params"]["max_loops"] = 99
    assert model.to_config()["params"]["quantizer_config"]["params"]["max_loops"] == 3
    with pytest.raises(ValueError, match="arguments without names"):
        instantiate = QUANTIZED["averages"]["params"]
        kind = type(tokenizer_of("averages"))
        kind(
            *(instantiate[k] for k in ("ddconfig", "lossconfig", "n_embed", "embed_dim"))
        ).to_config()
    assert prior().to_config()["params"]["first_stage_config"]["target"].endswith("VQModel")


def test_scripts_take_a_shared_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    error = fails(capsys, "reconstruct", __file__, "-r", folder, "-o", tmp_path / "out")
    assert "has no model.safetensors" in error
