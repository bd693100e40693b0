"""The schedule equals the original's."""

import torch
from safetensors.torch import load_file

from taming.lr_scheduler import LambdaWarmUpCosineScheduler


def test_equals_the_original(shared) -> None:
    golden = load_file(shared / "upstream/golden/misc.safetensors")["schedule"]
    schedule = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.01, 100)
    torch.testing.assert_close(torch.tensor([schedule(n) for n in range(130)]), golden)
