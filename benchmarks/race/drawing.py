"""Samples and completions from priors.

Axis letters: B images, H W image, h w grid, T turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

from taming.models.sampling import paste, sample_images, upper_part
from taming.modules.transformer.generate import SamplingParams, generators_of


def sample(model: Any, amount: int, guidance: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample batches of images (B, 3, H, W) and their classes (B,), equally many of each class."""
    for part in tqdm(torch.arange(amount).split(100), desc="samples", leave=False):
        labels = (part % 10).to(model.device)
        params = SamplingParams(guidance=guidance, generators=generators_of(0, part.tolist()))
        images = sample_images(model, labels[:, None], params)
        assert images.isfinite().all()
        yield images, labels


def complete_codes(model: Any, given: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Sample codes (B, h, w, T) of classes (B,), given those at the known sites (h, w) bool."""
    codes = given.masked_fill(~known[..., None], -1)
    params = SamplingParams(generators=generators_of(0, range(len(codes))))
    return model.sample_codes(labels[:, None], params, codes=codes, known=known)


def mean_psnr(images: Tensor, x: Tensor) -> float:
    """Return the mean PSNR in dB of images (B, 3, H, W) in [-1, 1]."""
    return float(peak_signal_noise_ratio(images, x, data_range=2.0, dim=(1, 2, 3)))


@torch.no_grad()
def complete(model: Any, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Complete images from their upper half and from half of the sites, chosen at random.

    Args:
        model: The prior.
        x: (B, 3, H, W) in [-1, 1].
        labels: (B,) int64 classes.

    Returns:
        ``changed``: fraction of known sites whose codes changed, given the upper half and given
        random sites. ``known_half``: mean PSNR in dB of the upper half in reconstructions, in
        completions with the known pixels pasted over them, and in plain completions, where each
        decoded pixel depends on all codes.
    """
    given, (h, w) = model.encode_codes(x), model.grid
    upper = upper_part(0.5, (h, w)).to(x.device)
    some = torch.rand(h, w, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.5
    codes = [complete_codes(model, given, labels, known) for known in (upper, some)]
    moved = [(c != given).any(dim=3)[:, k] for c, k in zip(codes, (upper, some), strict=True)]
    sampled, rebuilt = (model.decode_codes(c).clamp(-1, 1) for c in (codes[0], given))
    half = x.shape[2] // 2
    images = (rebuilt, paste(sampled, rebuilt, upper), sampled)
    psnr = [mean_psnr(i[:, :, :half], x[:, :, :half]) for i in images]
    return {"changed": [float(m.float().mean()) for m in moved], "known_half": psnr}
