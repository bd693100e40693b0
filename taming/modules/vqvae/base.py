"""The quantizer contract: its output, what all quantizers share, and the loss they train by.

Axis letters: B images, D channels, h w grid, N latents, K codes, T turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from taming.modules.sequence.grammar import TokenSequence
from taming.modules.vqvae.loop import plain_attributes
from taming.util import NonFiniteError


class LoopTrace(NamedTuple):
    """How the loop of each site ended; the ``encodings`` of a loopy quantizer.

    Attributes:
        lengths: (B, h, w) int64 in [1, T], turns taken (and slots written).
        distances: (B, h, w) float32, what was compared with the threshold at last (see `Path`).
        within: (B, h, w) bool, False where T turns did not bring a code within the threshold.
    """

    lengths: Tensor
    distances: Tensor
    within: Tensor


class QuantizerInfo(NamedTuple):
    """Attributes: perplexity (scalar) and encodings, None where not computed; indices, int64."""

    perplexity: Tensor | None
    encodings: Tensor | LoopTrace | None
    indices: Tensor


class QuantizerOutput(NamedTuple):
    """Attributes: z_q like z, with gradient to it; loss, scalar; info."""

    z_q: Tensor
    loss: Tensor
    info: QuantizerInfo


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """Pass z_q's value forward, bit for bit, and its gradient to z (and to z_q's own graph)."""
    return z_q + (z - z.detach())


def channels_second(z_q: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, D, h, w).

    Contiguous: the decoder's GroupNorm loses two digits on channels-last memory on the CPU.
    """
    return rearrange(z_q, "b h w d -> b d h w").contiguous()


def code_perplexity(codes: Tensor, n_e: int) -> Tensor:
    """Exponential of the entropy (nats) of the codes of a batch; a scalar in [1, K]."""
    share = torch.bincount(codes.flatten(), minlength=n_e).float() / codes.numel()
    return torch.special.entr(share).sum().exp()


def vq_loss(codebook_term: Tensor, commitment: Tensor, beta: float, legacy: bool) -> Tensor:
    """Weigh the two terms of equation 3 of van den Oord et al. 2017 (arXiv:1711.00937).

    Args:
        codebook_term: |sg(z) - e|^2, moves codes.
        commitment: |z - sg(e)|^2, moves the encoder.
        beta: Weight of the commitment.
        legacy: Put beta on the other term, as the original's checkpoints were trained.

    Returns:
        The loss, a scalar.
    """
    if legacy:
        return commitment + beta * codebook_term
    return beta * commitment + codebook_term


class Quantizer(nn.Module, ABC):
    """What every quantizer has in common.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.

    Attributes:
        sequence: The token sequence in which a prior reads its codes by default.
        learns_alone: Whether it learns while the decoder sees nothing of its codes.
    """

    sequence: TokenSequence
    learns_alone = True

    def __init__(self, n_e: int, e_dim: int) -> None:
        super().__init__()
        if n_e < 1 or e_dim < 1:
            raise ValueError(f"n_e and e_dim must be at least 1, got n_e={n_e}, e_dim={e_dim}")
        self.n_e = n_e
        self.e_dim = e_dim

    @abstractmethod
    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents z (B, D, h, w)."""

    @abstractmethod
    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Turn indices back into z_q; ``shape`` is (B, h, w, D) for indices that are flat."""

    def followed(self) -> dict[str, Tensor]:
        """Scalars of its state that are worth following while it trains, by name."""
        return {}

    def identity(self) -> dict[str, object]:
        """Return what, beside parameters and buffers, decides which codes an image gets.

        By default all plain public attributes, so that a new quantizer is safe; one that plays no
        part in the codes may be left out by an override. Caches of tokens are refused when it
        changes.
        """
        own = plain_attributes(self)
        transform = getattr(self, "transform", None)
        return own if transform is None else own | {"transform": transform.identity()}

    def _rows(self, z: Tensor) -> Tensor:
        """Check z and lay its latents out as rows: (B, D, h, w) or (N, D) -> (N, D) float32."""
        if z.ndim not in (2, 4) or z.shape[1] != self.e_dim:
            raise ValueError(
                f"expected latents (B, {self.e_dim}, h, w) or (N, {self.e_dim}), "
                f"got {tuple(z.shape)}"
            )
        if not torch.isfinite(z).all():
            raise NonFiniteError("the latents that reach the quantizer are not finite")
        return rearrange(z, "b d h w -> (b h w) d").float() if z.ndim == 4 else z.float()
