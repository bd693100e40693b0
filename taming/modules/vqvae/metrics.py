"""What a quantizer did over an epoch, summed over batches and processes.

Axis letters: B images, D channels, h w grid, K codes, T turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class CodebookMetrics(Metric):
    """Codebook usage and perplexity, lengths and quantization error.

    Args:
        n_e: K, number of codes.
        max_loops: T, slots per site.
    """

    full_state_update = False
    codes: Tensor
    lengths: Tensor
    error: Tensor
    beyond: Tensor
    images: Tensor

    def __init__(self, n_e: int, max_loops: int) -> None:
        super().__init__()
        self.n_e = n_e
        self.max_loops = max_loops
        self.add_state("codes", torch.zeros(n_e, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("lengths", torch.zeros(max_loops + 1, dtype=torch.int64), "sum")
        self.add_state("error", torch.zeros(()), dist_reduce_fx="sum")  # MPS has no float64
        self.add_state("beyond", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, z: Tensor, quantized: Any) -> None:
        """Add a batch.

        Args:
            z: (B, D, h, w) latents.
            quantized: `QuantizerOutput` for them.
        """
        slots = quantized.info.indices.reshape(-1, self.max_loops)
        written = slots[(slots >= 0) & (slots < self.n_e)]
        self.codes += torch.bincount(written, minlength=self.n_e)
        lengths = (slots >= 0).sum(dim=1)
        self.lengths += torch.bincount(lengths, minlength=self.max_loops + 1)
        self.error += (z.detach().float() - quantized.z_q.detach()).square().mean(1).sum()
        within = getattr(quantized.info.encodings, "within", None)
        if within is not None:
            self.beyond += (~within).sum()
        self.images += len(z)

    def compute(self) -> dict[str, Tensor]:
        """Summarize all that was added.

        Returns:
            usage: Share of the K codes that occur, in [0, 1].
            perplexity: Exponential of the codes' entropy, in [1, K].
            mean_length: Slots written per site, in [1, T].
            codes_per_image: Slots written per image.
            never_within_threshold: Share of sites that ran into T turns, in [0, 1].
            quantization_error: Mean square of z - z_q per channel.
            codes, lengths: (K,) and (T + 1,) int64, how often each occurs.
        """
        share = self.codes.float() / self.codes.sum()
        sites = self.lengths.sum()
        slots = (self.lengths * torch.arange(self.max_loops + 1, device=sites.device)).sum()
        return {
            "usage": (self.codes > 0).float().mean(),
            "perplexity": torch.special.entr(share).sum().exp(),
            "mean_length": slots / sites,
            "codes_per_image": slots / self.images,
            "never_within_threshold": self.beyond / sites,
            "quantization_error": self.error / sites,
            "codes": self.codes,
            "lengths": self.lengths,
        }


class HierarchyMetrics(nn.Module):
    """The same for each level of a hierarchy, with the level's name before each value's.

    Args:
        levels: Name of a level -> metric of its quantizer.
    """

    def __init__(self, levels: Mapping[str, Any]) -> None:
        super().__init__()
        self.levels = dict(levels)
        self.registered = nn.ModuleList(self.levels.values())

    @property
    def update_called(self) -> bool:
        """Whether anything was added since the last reset."""
        return any(metrics.update_called for metrics in self.levels.values())

    def update(self, z: Tensor, quantized: Any) -> None:
        """Add a batch.

        Args:
            z: What went into the hierarchy; the latents of each level are in its output.
            quantized: A `HierarchyOutput`.
        """
        for name, level in quantized.info.encodings.items():
            self.levels[name].update(level.z, level.quantized)

    def compute(self) -> dict[str, Tensor]:
        """Summarize all that was added: ``{level}_{name}`` of each value of `CodebookMetrics`."""
        return {
            f"{level}_{name}": value
            for level, metrics in self.levels.items()
            for name, value in metrics.compute().items()
        }

    def reset(self) -> None:
        """Forget all that was added."""
        for metrics in self.levels.values():
            metrics.reset()
