"""A quantizer that draws its codes, in a way that gradients pass (arXiv:1611.01144).

Axis letters: B images, C channels of the input, D channels of a code, h w grid, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.base import QuantizerInfo, QuantizerOutput, channels_second
from taming.modules.vqvae.plain import PlainQuantizer
from taming.util import NonFiniteError


class GumbelQuantize(PlainQuantizer):
    """Scores every code, then draws one by the Gumbel-softmax trick; in eval mode, the best one.

    Args:
        num_hiddens: C, channels of the input.
        embedding_dim: D, channels of a code.
        n_embed: K, number of codes.
        straight_through: Draw single codes in training; otherwise mixtures of them.
        kl_weight: Weight of the divergence of the scores from the uniform distribution.
        temp_init: Temperature of the draw, above 0, until somebody sets ``temperature``.
        use_vqinterface: Return the indices inside a `QuantizerInfo`; otherwise by themselves.
        remap: See `PlainQuantizer`; the codes that are not used are then never drawn.
        unknown_index: See `PlainQuantizer`.
        legacy: Draw in eval mode too, as the original did.

    Attributes:
        temperature: Of the draw. It is not part of the state: `GumbelVQ` derives it from the step.
    """

    learns_alone = False

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | None = None,
        unknown_index: str | int = "random",
        legacy: bool = False,
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index)
        self.n_embed, self.embedding_dim = n_embed, embedding_dim  # the original's names
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.temperature = temp_init
        self.use_vqinterface = use_vqinterface
        self.legacy = legacy
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, D)."""
        return self.embed.weight

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> Any:
        """Quantize latents.

        Args:
            z: (B, C, h, w).
            temp: Temperature of this draw; None for ``temperature``.
            return_logits: Return the scores (B, K, h, w) too, as a fourth value.

        Returns:
            z_q (B, D, h, w); loss; info with indices (B, h, w), a `QuantizerOutput`. All float32.
        """
        if not torch.isfinite(z).all():
            raise NonFiniteError("the latents that reach the quantizer are not finite")
        with torch.autocast(z.device.type, enabled=False):
            logits = self._score(z.float())
            z_q, indices = self._choose(logits, self.temperature if temp is None else temp)
        log_q = logits.log_softmax(dim=1)
        divergence = (log_q.exp() * (log_q + math.log(self.n_e))).sum(dim=1).mean()
        loss = self.kl_weight * divergence
        if not self.use_vqinterface:
            return z_q, loss, indices
        output = QuantizerOutput(z_q, loss, QuantizerInfo(None, None, indices))
        return (*output, logits) if return_logits else output

    def _score(self, z: Tensor) -> Tensor:
        """Score latents (B, C, h, w): (B, K, h, w), under ``remap`` of the used codes only."""
        logits = self.proj(z)
        return logits if self.remap is None else logits[:, self.used]

    def _choose(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Draw, or pick, codes: z_q (B, D, h, w) and indices (B, h, w)."""
        codes = self.codebook if self.remap is None else self.codebook[self.used]
        if not self.training and not self.legacy:
            indices = logits.argmax(dim=1)
            return channels_second(F.embedding(indices, codes)), indices
        hard = self.straight_through or not self.training
        choice = F.gumbel_softmax(logits, temperature, hard=hard, dim=1)
        return torch.einsum("bkhw,kd->bdhw", choice, codes), choice.argmax(dim=1)
