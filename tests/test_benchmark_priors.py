"""The comparison of priors runs, and its measures are what they say."""

import argparse
import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from priors import SIZES, Sizes, compare
from race.classifier import Classifier, judge
from race.drawing import mean_psnr
from race.folder import claim
from race.networks import MODERN, NAMES, OrderZero, build_prior
from race.plans import Plan
from race.training import build_tokenizer, fit
from support.models import DDCONFIG, GPT, PLAIN, images
from support.runs import CONFIGS, TinyRuns, call

from benchmarks import sampling
from benchmarks.data import measure_pictures, measure_prior, measure_tokens, training_step_of
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.sequence.notations import UnarySequence
from taming.run.config import load_config


@pytest.fixture
def sizes(plan) -> Sizes:
    depth = {"n_layer": 1, "n_head": 2, "n_embd": 12}
    networks = {
        "main": depth,
        "depth": depth,
        "pixelcnn": {"channels": 8, "layers": 1, "kernel_size": 3},
    }
    amounts = {"steps": 2, "batch_size": 4, "classifier_steps": 3, "samples": 10, "completions": 2}
    return replace(SIZES["quick"], tokenizer=plan, networks=networks, **amounts)


def test_priors_are_compared(sizes: Sizes, parquet: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(
        train=str(parquet), test=str(parquet), outdir=tmp_path, precision="32-true"
    )
    rows = compare(sizes, list(NAMES), options)
    assert [row["name"] for row in rows] == list(NAMES)
    for row in rows:
        assert 0 <= row["recognised"] <= 1 and row["distance"] > 0
        assert row["changed"] == [0, 0] and row["minutes"] > 0
        rebuilt, completed, unpasted = row["known_half"]
        assert completed == rebuilt != unpasted
        assert row["bits"] / 64 < 16 and row["bits"] > 0
    again = compare(sizes, ["pixelcnn"], options)  # from the file this time
    assert again[0]["bits"] == pytest.approx(rows[-1]["bits"])
    assert again[0]["minutes"] == rows[-1]["minutes"]
    assert again[0]["known_half"] == pytest.approx(rows[-1]["known_half"])  # drawn by seed
    assert json.loads((tmp_path / "measurements.json").read_text())["references"]["order_zero"] > 0
    assert "| pixelcnn |" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="settings: steps; .*--outdir"):
        compare(replace(sizes, steps=3), ["pixelcnn"], options)


def test_a_folder_of_results_knows_what_they_are_of(tmp_path: Path) -> None:
    file = tmp_path / "of.json"
    claim(file, {"steps": 2, "sizes": (1, 2), "seeds": 1}, free=("seeds",))
    claim(file, {"steps": 2, "sizes": (1, 2), "seeds": 3}, free=("seeds",))
    for changed in ({"steps": 3, "sizes": (1, 2)}, {"steps": 2, "sizes": (1, 2), "data": "other"}):
        with pytest.raises(ValueError, match="different settings: (steps|data)"):
            claim(file, changed)
    assert json.loads(file.read_text()) == {"steps": 2, "sizes": [1, 2], "seeds": 3}


def test_the_psnr_of_images_is_the_mean_of_each_ones() -> None:
    x = torch.zeros(2, 3, 4, 4)
    off = torch.tensor([0.2, 0.02])[:, None, None, None].expand_as(x)  # 20 and 40 dB
    assert mean_psnr(off, x) == pytest.approx(30, rel=1e-4)


def test_modern_priors_are_those_of_the_configuration(sizes: Sizes, plan: Plan) -> None:
    config = load_config([CONFIGS / "cifar10_two_level_transformer.yaml"]).values
    shipped = config["model"]["params"]["transformer_config"]["params"]
    tokenizer = build_tokenizer(plan, plan.contenders()["loopy-2"])
    model: Any = build_prior("two-level-modern", sizes.networks, tokenizer, 4)
    for built, block in (
        (model.transformer.config, shipped),
        (model.transformer.depth.config, shipped["depth"]),
    ):
        assert all(getattr(built, key) == block.get(key, False) for key in MODERN)
    assert model.transformer.rotary is not None and shipped["rotary"]


def test_frequencies_cost_their_entropy() -> None:
    sequence = UnarySequence(2, 2, dummies=False)
    tokens = torch.tensor([[0, 2], [0, 2], [0, 2], [1, 2]]).repeat(2500, 1)
    counted = OrderZero(sequence, [tokens])
    per_image = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)  # the end is certain
    assert counted.bits(tokens) / 10_000 == pytest.approx(per_image, rel=1e-2)


def test_distances_are_those_of_normal_distributions() -> None:
    model = Classifier().eval()
    images = [(torch.rand(40, 3, 16, 16) * 2 - 1, torch.zeros(40).long())]
    one = judge(model, images)
    assert one.distance(one) == pytest.approx(0, abs=1e-6)
    moved = one._replace(mean=one.mean + 1)
    assert one.distance(moved) == pytest.approx(128, rel=1e-4)
    wider = one._replace(covariance=4 * one.covariance)  # twice the deviation
    assert one.distance(wider) == pytest.approx(float(one.covariance.trace()), rel=1e-4)


def test_the_step_that_is_timed_is_the_one_that_trains() -> None:
    tokenizer = {"ddconfig": DDCONFIG, "lossconfig": PLAIN, "n_embed": 16, "embed_dim": 4}
    first_stage = {"target": "taming.models.vqgan.VQModel", "params": tokenizer}
    model = Net2NetTransformer(GPT, first_stage, "__is_unconditional__")
    model.learning_rate = 1e-2
    timed, data = deepcopy(model).train(), images(4)
    step = training_step_of(timed)
    for batch in data:
        step(batch)
    before = deepcopy(model.state_dict())
    fit(model, data, len(data), "32-true")
    assert not torch.equal(before["transformer.head.weight"], model.transformer.head.weight)
    torch.testing.assert_close(timed.state_dict(), model.state_dict(), check_device=False)


def test_a_prior_is_timed_on_images_and_on_their_cached_tokens(
    tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    tokenizer, prior = (
        tiny_runs.of(f"demo/loopy_{kind}.yaml") for kind in ("vqgan", "transformer")
    )
    call("encode", "-r", tokenizer, "-o", tmp_path / "cache")
    rows = measure_prior(str(prior), str(tmp_path / "cache/train"), repeats=2)
    assert [row["an image"] for row in rows] == ["until its tokens are there", "training step"]
    assert all(row["from images, ms"] > 0 and row["from tokens, ms"] > 0 for row in rows)


def test_the_data_that_is_timed_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.data.FILES", 4)
    monkeypatch.setattr("benchmarks.data.IMAGES", 20)
    assert len(measure_pictures(tmp_path, repeats=2)) == 5  # refuses pictures that differ
    assert measure_tokens(tmp_path / "cache", repeats=2)["million tokens/s"] > 0


def test_rates_of_sampling_are_of_the_rounds_after_the_first() -> None:
    seconds = {"peer": iter([9.0, 4.0, 8.0]), "ours": iter([9.0, 2.0, 2.0])}
    sides = {k: lambda own=own: (0.0, next(own)) for k, own in seconds.items()}
    found = sampling.row("a prior", 3, 12, "peer", sides, rounds=2)
    names = ("its tokens/s", "tokens/s", "images/s", "faster by", "over products")
    assert [found[name] for name in names] == [2, 6, 1.5, 3, "-"]
