"""Every recipe that ships is valid, trains, shows itself, resumes, and fits its partner."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CONFIGS, TOKENIZER_OF, TinyRuns, run_main, shipped

from taming.config import load_config
from taming.experiment import check_experiment
from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.modules.vqvae.sequence import TokenSequence
from taming.util import instantiate_from_config

every_config = pytest.mark.parametrize("name", shipped())


@every_config
def test_is_valid_as_shipped(name: str) -> None:
    check_experiment(load_config([CONFIGS / name]), train=True)


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@every_config
def test_trains_validates_shows_pictures_and_resumes(
    name: str, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    run = tmp_path / "logs" / "run"
    shutil.copytree(tiny_runs.of(name), run)
    run_main(tmp_path, "-r", run, "-t", "--max_steps", "4")
    before, after = last(tiny_runs.of(name)), last(run)
    assert (before["global_step"], after["global_step"]) == (2, 4)
    for split in ("train", "val"):
        for step in (2, 4):
            assert list(run.glob(f"images/{split}/inputs_gs-{step:06}_*.png")), (split, step)
    steps = "quantize.embedding.steps"
    is_loopy = "loopy" in name and name not in TOKENIZER_OF
    assert (steps in before["state_dict"]) == is_loopy
    if is_loopy:
        assert (before["state_dict"][steps], after["state_dict"][steps]) == (2, 4)
        assert list(run.glob("images/val/depths_*.png"))
    if name not in TOKENIZER_OF:  # the value that it says it monitors is there
        assert (run / "checkpoints/epoch=000000.ckpt").is_file()
    for key, value in after["state_dict"].items():
        assert value.isfinite().all(), key


def sequence_of(model: dict[str, Any]) -> TokenSequence:
    """How the tokens of a tokenizer's configuration are written."""
    if "quantizer_config" in model:
        return instantiate_from_config(model["quantizer_config"]).sequence
    return VectorQuantizer2(model["n_embed"], model["embed_dim"], beta=0.25).sequence


@pytest.mark.parametrize("name", [name for name in shipped() if "transformer" in name])
def test_a_prior_fits_its_tokenizer(name: str) -> None:
    prior, tokenizer = (load_config([CONFIGS / n]).values for n in (name, TOKENIZER_OF[name]))
    gpt = prior["model"]["params"]["transformer_config"]["params"]
    model = tokenizer["model"]["params"]
    sequence, ddconfig = sequence_of(model), model["ddconfig"]
    side = ddconfig["resolution"] // 2 ** (len(ddconfig["ch_mult"]) - 1)
    assert gpt["vocab_size"] == sequence.vocab_size
    assert gpt["site_shape"] == [side, side, sequence.site_tokens]
    assert gpt["block_size"] == side * side * sequence.site_tokens + 1
    for config in (prior, tokenizer):
        for split in ("train", "validation"):
            assert config["data"]["params"][split]["params"]["size"] == ddconfig["resolution"]


@pytest.mark.parametrize("name", [name for name in shipped() if "loopy_vqgan" in name])
def test_a_tokenizers_numbers_agree(name: str) -> None:
    model = load_config([CONFIGS / name]).values["model"]["params"]
    quantizer = instantiate_from_config(model["quantizer_config"])
    assert (quantizer.n_e, quantizer.e_dim) == (model["n_embed"], model["embed_dim"])
