"""Coordinates as tokens: the original's numbers."""

import pytest
import torch
from safetensors.torch import load_file

from taming.modules.misc.coord import CoordStage


def test_equals_the_original(shared) -> None:
    golden = load_file(shared / "upstream/golden/misc.safetensors")
    stage = CoordStage(n_embed=64, down_factor=4).eval()
    quantized, loss, (_, _, indices) = stage.encode(golden["coord/in"])
    assert torch.equal(indices, golden["coord/indices"]) and loss is None
    assert torch.equal(quantized, golden["coord/quant"])
    torch.testing.assert_close(stage.decode(quantized), golden["coord/decoded"])


@pytest.mark.parametrize("c", [torch.full((1, 1, 4, 4), 1.1), torch.zeros(1, 3, 4, 4)])
def test_other_than_coordinates_are_refused(c: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"one channel .*\[0, 1\]"):
        CoordStage(64, 4).encode(c)
