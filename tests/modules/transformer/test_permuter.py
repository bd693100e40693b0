"""Permuters equal the original's and are undone by ``reverse``."""

import pytest
import torch
from safetensors.torch import load_file

from taming.modules.transformer import permuter

NAMES = ["Subsample", "ZCurve", "SpiralOut", "SpiralIn", "Random", "AlternateParsing"]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_original(name: str, shared) -> None:
    golden = load_file(shared / "upstream/golden/permuters_8x8.safetensors")[name]
    order = getattr(permuter, name)(8, 8)(torch.arange(64)[None])[0]
    assert torch.equal(order, golden.flatten())


@pytest.mark.parametrize("name", NAMES)
def test_reverse_undoes(name: str) -> None:
    sites = torch.randn(2, 16, 3)
    order = getattr(permuter, name)(4, 4)
    assert torch.equal(order(order(sites), reverse=True), sites)


@pytest.mark.parametrize("name", ["SpiralOut", "SpiralIn", "Random", "AlternateParsing"])
def test_any_grid(name: str) -> None:
    order = getattr(permuter, name)(3, 5)(torch.arange(15)[None])[0]
    assert sorted(order.tolist()) == list(range(15))


@pytest.mark.parametrize("name", ["Subsample", "ZCurve"])
def test_grids_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="square grid of a power of two, got 3x5"):
        getattr(permuter, name)(3, 5)
    with pytest.raises(ValueError, match="orders 16 sites, got 9"):
        getattr(permuter, name)(4, 4)(torch.zeros(1, 9))
