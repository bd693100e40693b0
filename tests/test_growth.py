"""What benchmarks/growth.py counts."""

import pytest
import torch
from growth import count, sizing, slope
from torch import nn


def test_a_power_is_fitted_by_its_exponent() -> None:
    assert slope((2, 4, 8), [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_a_linear_layers_pass_is_counted() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(8, 4, bias=False), torch.empty(2, 8, requires_grad=True)
    counted = count(model, lambda: model(x).sum())
    # One product forward, two back; the input is kept.
    assert counted == {"parameters": 32, "activations": 64, "operations": 3 * 2 * 2 * 8 * 4}
    row = sizing("a layer", counted, images=2)
    assert row["state, GB"] == pytest.approx(16 * 32 / 1e9)
