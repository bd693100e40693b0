"""The GPU's kernel finds what the plain search finds; it runs in Triton's interpreter here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from taming.modules.vqvae.nearest import nearest_codes
from taming.modules.vqvae.nearest_triton import search_on_gpu

torch.manual_seed(0)

def search(vectors, codebook):
    mean = codebook.mean(dim=0).nan_to_num(0.0)
    return search_on_gpu(vectors, codebook - mean, mean)

for n, d, k in ((1, 1, 1), (70, 5, 130), (64, 32, 64), (3, 33, 7), (130, 48, 1), (0, 4, 3)):
    for offset in (0, 100):
        vectors, codebook = torch.randn(n, d) + offset, torch.randn(k, d) + offset
        assert torch.equal(search(vectors, codebook), nearest_codes(vectors, codebook)), (n, d, k)
        assert torch.equal(search(vectors.double(), codebook), nearest_codes(vectors, codebook))
maps, codebook = torch.randn(3, 6, 4, 5), torch.randn(90, 6)
for z in (maps, maps.contiguous(memory_format=torch.channels_last), maps[:, :, 1:3]):
    assert torch.equal(search(z, codebook), nearest_codes(z, codebook))
equal = torch.randn(50, 4).repeat(3, 1)
assert torch.equal(search(equal, equal), torch.arange(50).repeat(3))
codebook = torch.randn(150, 4)
codebook[[80, 140]] = torch.nan
assert (search(torch.randn(9, 4), codebook) == 80).all()
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_equals_the_plain_search() -> None:
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "equal", result.stderr
