"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from race.plans import Plan
    from support.runs import TinyRuns

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Runs of the tests' own models are saved and loaded, as those of a user's own classes are.
os.environ["TAMING_TRUST"] = "support,tests.reliability"

# Work this small takes longer when several threads wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the original's recorded outputs and example data; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"reference data not found: {SHARED} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """Runs of the shipped configurations at tiny sizes, trained when first asked for."""
    from support.runs import TinyRuns  # imports the whole house, which most tests do not need

    return TinyRuns(tmp_path_factory.mktemp("tiny_runs"))


@pytest.fixture(scope="session")
def plan() -> Plan:
    """The quick plan of the benchmarks at tiny sizes."""
    from race.plans import PLANS

    sizes = {"base_steps": 2, "steps": 2, "prior_steps": 2, "batch_size": 4, "test_images": 6}
    ddconfig = {**PLANS["quick"].ddconfig, "ch": 8, "ch_mult": [1, 1, 1], "z_channels": 8}
    return replace(
        PLANS["quick"], ddconfig=ddconfig, channels=8, codes=16, calibration_images=6, **sizes
    )


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve random images in CIFAR-10's form."""
    from support.data import write_parquet

    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    file = tmp_path_factory.mktemp("data") / "images.parquet"
    write_parquet(file, map(Image.fromarray, pixels))
    return file


@pytest.fixture
def without_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not there, and nothing to download."""
    monkeypatch.setenv("TAMING_LPIPS", "/nowhere/heads.pth")
    monkeypatch.setenv("TAMING_INCEPTION", "/nowhere/inception.pth")
    missing = "taming.modules.losses.st_lpips.FILE"
    monkeypatch.setattr(missing, "nowhere/vgg.pth")
