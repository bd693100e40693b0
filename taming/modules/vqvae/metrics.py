"""Codebook statistics over an epoch, summed over batches and processes.

Axis letters: B images, D channels, h w grid, K codes, M codebooks, T turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from taming.modules.util import count_codes


class CodebookMetrics(Metric):
    """Codebook usage and perplexity, lengths and quantization error.

    Args:
        n_e: K, number of codes of a codebook.
        max_loops: T, most codes per site.
        codebooks: M codebooks, each of T / M consecutive turns.
    """

    full_state_update = False
    codes: Tensor
    lengths: Tensor
    error: Tensor
    beyond: Tensor
    images: Tensor

    def __init__(self, n_e: int, max_loops: int, codebooks: int = 1) -> None:
        super().__init__()
        self.n_e, self.max_loops, self.codebooks = n_e, max_loops, codebooks
        self.add_state("codes", torch.zeros(codebooks * n_e, dtype=torch.int64), "sum")
        self.add_state("lengths", torch.zeros(max_loops + 1, dtype=torch.int64), "sum")
        self.add_state("error", torch.zeros(()), dist_reduce_fx="sum")  # MPS has no float64
        self.add_state("beyond", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, z: Tensor, quantized: Any) -> None:
        """Add a batch.

        Args:
            z: (B, D, h, w) latents.
            quantized: `QuantizerOutput` of the latents.
        """
        codes = quantized.info.indices.reshape(-1, self.max_loops)  # (B h w, T)
        books = codes.chunk(self.codebooks, dim=1)
        # Without dummies and absent ones.
        self.codes += torch.cat([count_codes(book, self.n_e) for book in books])
        self.lengths += count_codes((codes >= 0).sum(dim=1), self.max_loops + 1)
        self.error += (z.detach().float() - quantized.z_q.detach()).square().mean(1).sum()
        self.images += len(z)

    def compute(self) -> dict[str, Tensor]:
        """Summarize all batches.

        Returns:
            usage: Share of the M K codes that occur, in [0, 1].
            perplexity: Exponential of the codes' entropy, averaged over codebooks, in [1, K].
            mean_length: Codes per site, in [1, T].
            codes_per_image: Codes per image.
            never_within_threshold: Share of sites that ran into T turns, in [0, 1].
            quantization_error: Mean square of z - z_q per channel.
            codes, lengths: (M K,) and (T + 1,) int64, how often each occurs.
        """
        codes = self.codes.view(self.codebooks, self.n_e).float()
        share = codes / codes.sum(dim=1, keepdim=True)
        sites = self.lengths.sum()
        total = (self.lengths * torch.arange(self.max_loops + 1, device=sites.device)).sum()
        return {
            "usage": (self.codes > 0).float().mean(),
            "perplexity": torch.special.entr(share).sum(dim=1).exp().nanmean(),
            "mean_length": total / sites,
            "codes_per_image": total / self.images,
            "never_within_threshold": self.beyond / sites,
            "quantization_error": self.error / sites,
            "codes": self.codes,
            "lengths": self.lengths,
        }


class LoopMetrics(CodebookMetrics):
    """`CodebookMetrics` of a loopy quantizer, whose encodings are a `LoopTrace`."""

    def update(self, z: Tensor, quantized: Any) -> None:
        """Add a batch; also count the sites that never came within the threshold."""
        super().update(z, quantized)
        self.beyond += (~quantized.info.encodings.within).sum()


class NamedMetrics(nn.Module):
    """Several metrics, each under a name.

    Args:
        metrics: Name -> metric.
    """

    def __init__(self, metrics: Mapping[str, CodebookMetrics | HierarchyMetrics]) -> None:
        super().__init__()
        self.metrics = dict(metrics)
        self.registered = nn.ModuleList(self.metrics.values())  # so that they change device


class HierarchyMetrics(NamedMetrics):
    """Metrics of a hierarchy's levels, by level."""

    @property
    def update_called(self) -> bool:
        """True if a batch was added since the last reset."""
        return any(metrics.update_called for metrics in self.metrics.values())

    def update(self, z: Tensor, quantized: Any) -> None:
        """Add a batch; z is not used: a `HierarchyOutput` holds the latents of every level."""
        for name, level in quantized.info.encodings.items():
            self.metrics[name].update(level.z, level.quantized)

    def compute(self) -> dict[str, Tensor]:
        """Summarize all batches: ``{level}_{name}`` of each value of `CodebookMetrics`."""
        return {
            f"{level}_{name}": value
            for level, metrics in self.metrics.items()
            for name, value in metrics.compute().items()
        }

    def reset(self) -> None:
        """Forget all batches."""
        for metrics in self.metrics.values():
            metrics.reset()


class SplitMetrics(NamedMetrics):
    """Metrics of training and of validation over an epoch, by split."""

    def update(self, split: str, z: Tensor, quantized: Any) -> None:
        """Add a batch: latents z and the quantizer's output for them."""
        self.metrics[split].update(z, quantized)

    def pop(self, split: str, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalars and others by ``{split}/{name}`` and reset; {} if nothing was counted."""
        metrics = self.metrics[split]
        if not metrics.update_called:  # a run resumed at the very end of an epoch
            return {}
        scalars = {name: value for name, value in metrics.compute().items() if value.ndim == 0}
        metrics.reset()
        return {f"{split}/{name}": value for name, value in (scalars | others).items()}

    def histograms(self) -> dict[str, Tensor]:
        """Return counts of codes (M K,) and lengths (T + 1,) so far by ``{split}/{name}``."""
        return {
            f"{split}/{name}": value
            for split, metrics in self.metrics.items()
            if metrics.update_called
            for name, value in metrics.compute().items()
            if value.ndim == 1
        }
