"""The comparison of priors runs, and its measures are what they say."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from priors import SIZES, Sizes, compare
from race.classifier import Classifier, judge
from race.networks import NAMES, OrderZero
from test_benchmarks import parquet, plan
from token_cache import seconds_per_image
from torch.utils.data import DataLoader

from taming.modules.vqvae.sequence import UnarySequence

__all__ = ["parquet", "plan"]


@pytest.fixture
def sizes(plan) -> Sizes:  # noqa: F811
    depth = {"n_layer": 1, "n_head": 2, "n_embd": 12}
    networks = {
        "main": depth,
        "depth": depth,
        "pixelcnn": {"channels": 8, "layers": 1, "kernel_size": 3},
    }
    amounts = {"steps": 2, "batch_size": 4, "classifier_steps": 3, "samples": 10, "completions": 2}
    return replace(SIZES["quick"], tokenizer=plan, networks=networks, **amounts)


def test_priors_are_compared(sizes: Sizes, parquet: Path, tmp_path: Path) -> None:  # noqa: F811
    options = argparse.Namespace(
        train=str(parquet), test=str(parquet), outdir=tmp_path, precision="32-true"
    )
    rows = compare(sizes, list(NAMES), options)
    assert [row["name"] for row in rows] == list(NAMES)
    for row in rows:
        assert 0 <= row["recognised"] <= 1 and row["distance"] > 0
        assert row["upper_half"]["changed"] == row["mask"]["changed"] == 0
        assert row["bits"] / 64 < 16 and row["bits"] > 0
    again = compare(sizes, ["pixelcnn"], options)  # from the file this time
    assert again[0]["bits"] == pytest.approx(rows[-1]["bits"])
    assert json.loads((tmp_path / "measurements.json").read_text())["references"]["order_zero"] > 0
    assert "| pixelcnn |" in (tmp_path / "report.md").read_text()


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


def test_timing_counts_images_after_the_first_batch() -> None:
    seen: list[int] = []
    loader = DataLoader([{"x": number} for number in range(12)], batch_size=4)
    assert seconds_per_image(loader, 1, lambda batch: seen.append(len(batch["x"]))) >= 0
    assert seen == [4, 4]
