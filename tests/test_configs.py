"""Every recipe that ships is valid, trains, shows itself, resumes, and fits its partner."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import CONDITION_OF, CONFIGS, ORIGINALS, TOKENIZER_OF, TinyRuns, run_main, shipped

from taming.models.vqgan import DEFAULTS, build_quantizer
from taming.modules.sequence.notations import TokenSequence
from taming.run.config import check_experiment, load_config
from taming.util import instantiate_from_config

every_config = pytest.mark.parametrize("name", shipped())


@every_config
def test_is_valid_as_shipped(name: str) -> None:
    check_experiment(load_config([CONFIGS / name]), train=True)


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.reported(16, 22)
@every_config
def test_trains_validates_shows_pictures_and_resumes(
    name: str, tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DATA", str(tiny_runs.data))
    run = tmp_path / "logs" / "run"
    shutil.copytree(tiny_runs.of(name), run)
    run_main(tmp_path, "-r", run, "-t", "--max_steps", "4")
    before, after = last(tiny_runs.of(name)), last(run)
    assert (before["global_step"], after["global_step"]) == (2, 4)
    for split in ("train", "val"):
        for step in (2, 4):
            assert list(run.glob(f"images/{split}/inputs_gs-{step:06}_*.png")), (split, step)
    steps = "quantize.embedding.steps"
    quantizer = load_config([CONFIGS / name]).values["model"]["params"].get("quantizer_config", {})
    is_loopy = quantizer.get("target", "").endswith("LoopyVectorQuantizer")
    assert (steps in before["state_dict"]) == is_loopy
    if is_loopy:
        assert (before["state_dict"][steps], after["state_dict"][steps]) == (2, 4)
        several = quantizer["params"]["max_loops"] > 1
        assert bool(list(run.glob("images/val/lengths_*.png"))) == several
    if "monitor" in load_config([CONFIGS / name]).values["model"]["params"]:  # that value is there
        assert (run / "checkpoints/epoch=000000.ckpt").is_file()
    for key, value in after["state_dict"].items():
        # Where any code is near enough, the threshold is infinite.
        assert value.isfinite().all() or (key.endswith(".threshold") and value > 0), key


def sequence_of(model: dict[str, Any]) -> TokenSequence:
    """How the tokens of a tokenizer's configuration are written."""
    sizes = model["n_embed"], model["embed_dim"]
    return build_quantizer(*sizes, model.get("quantizer_config"), DEFAULTS).sequence


@pytest.mark.parametrize(
    "name", [name for name in shipped() if "transformer" in name and name not in ORIGINALS]
)
def test_a_prior_fits_its_tokenizer(name: str) -> None:
    prior, tokenizer = (load_config([CONFIGS / n]).values for n in (name, TOKENIZER_OF[name]))
    gpt = prior["model"]["params"]["transformer_config"]["params"]
    model = tokenizer["model"]["params"]
    sequence, ddconfig = sequence_of(model), model["ddconfig"]
    side = ddconfig["resolution"] // 2 ** (len(ddconfig["ch_mult"]) - 1)
    hidden = prior["model"]["params"].get("condition_dropout", 0) > 0
    assert gpt["vocab_size"] == sequence.vocab_size + hidden
    assert gpt["site_shape"] == [side, side, sequence.site_tokens]
    condition = side * side if name in CONDITION_OF else 1
    two_level = "depth" in gpt
    written = side * side * (1 if two_level else sequence.site_tokens)
    assert gpt["block_size"] == written + condition
    for config in (prior, tokenizer):
        for split in ("train", "validation"):
            data = config["data"]["params"][split]["params"]
            size = {"size": 32, **data, **data.get("config", {})}["size"]  # 32: CIFAR-10's own
            assert size == ddconfig["resolution"]


@pytest.mark.parametrize("level", ["top", "bottom"])
def test_a_levels_prior_fits_its_level(level: str) -> None:
    name = f"vqvae2_{level}_prior.yaml"
    prior, tokenizer = (
        load_config([CONFIGS / n]).values["model"]["params"] for n in (name, TOKENIZER_OF[name])
    )
    gpt, first = prior["transformer_config"]["params"], prior["first_stage_config"]["params"]
    hierarchy, ddconfig = (
        instantiate_from_config(tokenizer["quantizer_config"]),
        tokenizer["ddconfig"],
    )
    finest = ddconfig["resolution"] // 2 ** (len(ddconfig["ch_mult"]) - 1)
    assert tokenizer["quantizer_config"]["params"]["ddconfig"]["resolution"] == finest
    top, bottom = (
        ((finest // factor) ** 2, finest // factor, quantizer.sequence)
        for quantizer, factor in zip(hierarchy.levels, hierarchy.factors, strict=True)
    )
    sites, side, sequence = top if level == "top" else bottom
    above = 1 if level == "top" else top[0] * top[2].max_loops
    assert (first["level"], gpt["vocab_size"]) == (level, sequence.vocab_size)
    assert gpt["site_shape"] == [side, side, sequence.site_tokens]
    assert gpt["block_size"] == sites * sequence.site_tokens + above


@pytest.mark.parametrize("name", [n for n in shipped() if "transformer" not in n])
def test_a_tokenizers_sizes_are_stated_once(name: str) -> None:
    quantizer = load_config([CONFIGS / name]).values["model"]["params"].get("quantizer_config", {})
    own = quantizer.get("params", {})
    transform = own.get("transform_config", {}).get("params", {})
    assert not {"n_e", "e_dim", "n_embed", "embedding_dim"} & own.keys()
    assert not {"max_loops", "e_dim"} & transform.keys()


@pytest.mark.parametrize("name", sorted(set(TOKENIZER_OF) & set(ORIGINALS)))
def test_an_originals_prior_fits_its_stages(name: str) -> None:
    values = load_config([CONFIGS / name]).values
    model, data = values["model"]["params"], values["data"]["params"]
    gpt, first = (model[f"{part}_config"]["params"] for part in ("transformer", "first_stage"))
    sites = (first["ddconfig"]["resolution"] // 2 ** (len(first["ddconfig"]["ch_mult"]) - 1)) ** 2
    condition = sites
    if "scene" in name:
        (builder,) = {
            split["params"]["max_objects_per_image"] * 3 + 2
            for split in (data["train"], data["validation"])
        }
        condition = builder
    assert gpt["block_size"] == sites + condition
    assert gpt["vocab_size"] == first["n_embed"]
    stages = {"first": TOKENIZER_OF[name], "cond": CONDITION_OF.get(name)}
    for stage, tokenizer in stages.items():
        if tokenizer and "scene" not in name:  # their tokenizers' configurations do not ship
            shipped = load_config([CONFIGS / tokenizer]).values["model"]["params"]
            used = model[f"{stage}_stage_config"]["params"]
            assert {k: shipped[k] for k in ("n_embed", "embed_dim", "ddconfig")} == {
                k: used[k] for k in ("n_embed", "embed_dim", "ddconfig")
            }
