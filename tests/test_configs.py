"""Every recipe that ships is valid, trains, shows itself, resumes, and fits its partner."""

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import (
    CONDITION_OF,
    CONFIGS,
    LIMITS,
    ORIGINALS,
    TOKENIZER_OF,
    TinyRuns,
    run_main,
    shipped,
)

from taming.run.check import check_experiment
from taming.run.config import load_config
from taming.run.folder import model_from_run
from taming.run.sources import ConfigError

every_config = pytest.mark.parametrize("name", shipped())


@every_config
def test_is_valid_as_shipped(name: str) -> None:
    config = load_config([CONFIGS / name])
    expected = deepcopy(config.values)
    check_experiment(config, train=True)
    for block in ("model", "data"):
        assert config.values[block] == expected[block]
        key = f"{block}.params.{next(iter(expected[block]['params']))}x"
        with pytest.raises(ConfigError, match=rf"command line: .*{re.escape(key)}\b"):
            check_experiment(load_config([CONFIGS / name], [f"{key}=1"]), train=True)


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
    run_main(tmp_path, "-r", run, "-t", "--max_steps", "4", *LIMITS)
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


DERIVED = ("vocab_size", "block_size", "site_shape")
ANY_SIZE = {"photos_context.yaml"}  # of images, since its network has no sizes


@pytest.mark.parametrize("name", sorted(set(TOKENIZER_OF) - set(ORIGINALS) - ANY_SIZE))
def test_a_prior_states_no_size_that_its_tokenizer_has(name: str) -> None:
    prior, tokenizer = (load_config([CONFIGS / n]).values for n in (name, TOKENIZER_OF[name]))
    network = prior["model"]["params"].get("transformer_config", {"params": {}})["params"]
    assert not {key: network[key] for key in DERIVED if network.get(key, True) is not True}
    ddconfig = tokenizer["model"]["params"]["ddconfig"]
    for config in (prior, tokenizer):
        for split in ("train", "validation"):
            data = config["data"]["params"][split]["params"]
            size = {"size": 32, **data, **data.get("config", {})}["size"]  # 32: CIFAR-10's own
            assert size == ddconfig["resolution"]


# What the recipes' networks have without stating it: the tokenizers' codes, sites and tokens per
# site; one code more where the condition is hidden now and then; and the condition's tokens.
SIZES = {
    "cifar10_transformer.yaml": (17, 16 * 6 + 1, (4, 4, 6)),
    "cifar10_two_level_transformer.yaml": (18, 16 + 1, (4, 4, 6)),
    "custom_loopy_transformer.yaml": (17, 4 * 6 + 1, (2, 2, 6)),
    "custom_small_transformer.yaml": (17, 4 + 1, (2, 2, 8)),
    "custom_transformer.yaml": (16, 4 + 1, (2, 2, 1)),
    "demo/loopy_transformer.yaml": (17, 16 + 1, (4, 4, 5)),
    "imagenet_transformer.yaml": (1000, 4 + 1, (2, 2, 1)),  # as many as classes
    "loopy_transformer.yaml": (17, 16 * 6 + 1, (4, 4, 6)),
    "sflckr_transformer.yaml": (16, 4 + 4, (2, 2, 1)),
    "vqvae2_bottom_prior.yaml": (8, 16 + 4, (4, 4, 1)),
    "vqvae2_top_prior.yaml": (8, 4 + 1, (2, 2, 1)),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_a_priors_sizes_follow_from_its_tokenizer_and_condition(
    name: str, tiny_runs: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DATA", str(tiny_runs.data))
    assert set(SIZES) == set(TOKENIZER_OF) - set(ORIGINALS) - {"pixelcnn_cifar10.yaml", *ANY_SIZE}
    assert not any(key in item for key in DERIVED for item in tiny_runs.overrides[name])
    network = model_from_run(tiny_runs.of(name)).transformer
    assert (network.vocab_size, network.block_size, network.site_shape) == SIZES[name]


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
