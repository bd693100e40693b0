"""Context networks of given weights, and codes, the same on every machine."""

from typing import Any

import numpy as np
import torch

from taming.modules.context import ContextNetwork


def network_of(n_codes: int, turns: int, seed: int = 0, **options: Any) -> ContextNetwork:
    """A small network whose weights are integers of a fixed stream, over 2**12."""
    network = ContextNetwork(n_codes, turns, channels=4, hidden=8, **options).eval()
    stream = np.random.RandomState(seed)  # whose numbers never change
    with torch.no_grad():
        for _, value in sorted(network.named_parameters()):
            value.copy_(torch.from_numpy(stream.randint(-2048, 2049, value.shape)) / 4096)
    return network


def codes_of(grid: tuple[int, int], turns: int, n_codes: int, seed: int = 0) -> torch.Tensor:
    """Random codes (h, w, T) of random lengths."""
    stream = np.random.RandomState(seed)
    codes = stream.randint(n_codes, size=(*grid, turns))
    lengths = stream.randint(1, turns + 1, size=(*grid, 1))
    return torch.from_numpy(np.where(np.arange(turns) < lengths, codes, -1))
