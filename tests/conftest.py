"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from support.runs import TinyRuns

SHARED = Path(__file__).resolve().parents[2] / "shared"

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
