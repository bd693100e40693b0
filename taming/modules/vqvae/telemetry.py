"""Codebook use over an epoch, in the form in which a model logs it.

Axis letters: K codes, T turns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from taming.modules.vqvae.base import Quantizer


class CodebookTelemetry(nn.Module):
    """The quantizer's metrics over an epoch of training and of validation.

    Args:
        quantizer: Quantizer whose codes are counted.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.metrics = {split: quantizer.codebook_metrics() for split in ("train", "val")}
        self.registered = nn.ModuleList(self.metrics.values())

    def update(self, split: str, z: Tensor, quantized: Any) -> None:
        """Count a batch: latents z and the quantizer's output for them."""
        self.metrics[split].update(z, quantized)

    def pop(self, split: str, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalars and others by ``{split}/{name}`` and reset; {} if nothing was counted."""
        metrics = self.metrics[split]
        if not metrics.update_called:  # a run resumed at the very end of an epoch
            return {}
        values = {name: value for name, value in metrics.compute().items() if value.ndim == 0}
        metrics.reset()
        return {f"{split}/{name}": value for name, value in (values | others).items()}

    def histograms(self) -> dict[str, Tensor]:
        """Return counts of codes (K,) and lengths (T + 1,) so far by ``{split}/{name}``."""
        return {
            f"{split}/{name}": value
            for split, metrics in self.metrics.items()
            if metrics.update_called
            for name, value in metrics.compute().items()
            if value.ndim == 1
        }
