"""The quantizer contract: outputs, base classes, and the loss of van den Oord et al. 2017.

Axis letters: B images, D channels, h w grid, N latents, K codes, T turns, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.sequence.grammar import TokenSequence
from taming.modules.sequence.notations import RasterSequence
from taming.modules.util import checks_values, count_codes
from taming.modules.vqvae.checks import check_finite_latents, mark_outside, rows_of_codes
from taming.modules.vqvae.entropy import EntropyTables
from taming.util import load_array

if TYPE_CHECKING:
    from taming.modules.vqvae.metrics import CodebookMetrics, HierarchyMetrics

GridShape = tuple[int, int, int, int]  # (B, h, w, D)
Quality = Callable[[Tensor], Tensor]  # codes (B, h, w, T) -> (B,)


class LoopTrace(NamedTuple):
    """End of the loop of each site.

    Attributes:
        lengths: (B, h, w) int64 in [1, T], number of codes.
        distances: (B, h, w) float32, distance compared with the threshold in the last turn.
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
    if checks_values(z) and not (torch.is_grad_enabled() and z.requires_grad):
        return z_q.to(torch.result_type(z, z_q))
    return z_q + (z - z.detach())  # elsewhere, this makes z_q of a NaN a NaN


def channels_second(z_q: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, D, h, w), contiguous: a CPU's GroupNorm loses two digits otherwise."""
    return rearrange(z_q, "b h w d -> b d h w").contiguous()


def as_rows(z: Tensor) -> Tensor:
    """Lay latents (B, D, h, w) or (N, D) out as rows (N, D) float32."""
    return rearrange(z, "b d h w -> (b h w) d").float() if z.ndim == 4 else z.float()


def code_perplexity(codes: Tensor, n_e: int) -> Tensor:
    """Exponential of the entropy (nats) of a batch's codes but -1 and K; a scalar in [1, K]."""
    counts = count_codes(codes, n_e)
    share = counts.float() / counts.sum()
    return torch.special.entr(share).sum().exp()


def vq_loss(z: Tensor, z_q: Tensor, beta: float, legacy: bool) -> Tensor:
    """Compute the two terms of equation 3 of van den Oord et al. 2017 (arXiv:1711.00937).

    They are ``|sg(z) - e|^2``, which moves the codes, and ``|z - sg(e)|^2``, the commitment, which
    moves the encoder. Without gradient they are the same.

    Args:
        z: Latents, float32, of any shape.
        z_q: Their codes, float32, of that shape.
        beta: Weight of the commitment.
        legacy: Put beta on the other term, as the original's checkpoints were trained.

    Returns:
        The loss, averaged over all numbers; a scalar.
    """
    codebook_term = F.mse_loss(z_q, z.detach())
    commitment = F.mse_loss(z_q.detach(), z) if torch.is_grad_enabled() else codebook_term
    if legacy:
        return commitment + beta * codebook_term
    return beta * commitment + codebook_term


def is_plain(value: object) -> bool:
    """Return True for None, numbers, strings, bools, and tuples or lists of them."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


class Part(nn.Module):
    """Base class of quantizers and transforms, which together decide the codes of an image.

    Attributes:
        not_in_identity: Names of plain attributes that play no part in that decision.
    """

    not_in_identity: tuple[str, ...] = ()

    def identity(self) -> dict[str, object]:
        """Collect the settings that decide an image's codes, besides parameters and buffers.

        By default the class name and all plain public attributes: one too many only invalidates a
        token cache, one too few lets a stale cache pass.
        """
        plain = {k: v for k, v in vars(self).items() if not k.startswith("_") and is_plain(v)}
        for name in ("training", *self.not_in_identity):
            plain.pop(name, None)
        return {"type": type(self).__name__, **plain}


class Quantizer(Part, ABC):
    """Base class of all quantizers.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.

    Attributes:
        sequence: Token sequence in which a prior reads the codes by default.
        trains_without_decoder: True if the codes can be learned while the decoder still gets
            continuous latents.
        variable_rate: True if ``forward`` also takes ``threshold``, ``max_codes``, ``rate`` and
            ``target_bits``, each one number or one per image, and `reach` is implemented.
        entropy: Tables of how often codes are written, if it keeps any.
        length_range: Bounds of the mean lengths of images that it was trained at, if at several.
        rate_range: Bounds of the lambdas, likewise.
        codebooks: Number of codebooks, each of equally many consecutive turns.
        names: Names of the levels, the top first; () for a single quantizer.
        factors: Sites of the finest level beside each other in one of each level, the top first.
    """

    sequence: TokenSequence
    trains_without_decoder = True
    variable_rate: bool = False
    entropy: EntropyTables | None
    length_range: Sequence[float] | None = None
    rate_range: Sequence[float] | None = None
    codebooks: int = 1
    names: tuple[str, ...] = ()
    factors: tuple[int, ...] = (1,)

    def __init__(self, n_e: int, e_dim: int) -> None:
        super().__init__()
        if n_e < 1 or e_dim < 1:
            raise ValueError(f"n_e and e_dim must be at least 1, got n_e={n_e}, e_dim={e_dim}")
        self.n_e, self.e_dim = n_e, e_dim
        self.register_module("entropy", None)  # a class's None would hide a module set later

    @abstractmethod
    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents z (B, D, h, w)."""

    @abstractmethod
    def get_codebook_entry(self, indices: Tensor, shape: GridShape | None = None) -> Tensor:
        """Turn indices back into z_q; ``shape`` is (B, h, w, D) for indices that are flat."""

    def traces(self, output: Any) -> dict[str, LoopTrace]:
        """Return the `LoopTrace` of each level of an output; that of a single quantizer is ""."""
        return {}

    def sample_rates(self, z: Tensor) -> dict[str, Tensor]:
        """Sample a rate of each image of latents z, a keyword of `forward`; {} if it has one."""
        return {}

    def reach(self, z: Tensor, quality: Quality, target: Tensor) -> QuantizerOutput:
        """Quantize latents z with the fewest codes with which each image reaches a quality."""
        raise ValueError(f"{type(self).__name__} has a fixed rate")

    def bits(self, codes: Any) -> Tensor:
        """Return the bits (B,) float64 of codes (B, h, w, T): log2 of V for each token."""
        return self.sequence.encode(codes)[1].cpu().double() * math.log2(self.sequence.vocab_size)

    def codebook_metrics(self) -> CodebookMetrics | HierarchyMetrics:
        """Return a new metric that counts the codes of this quantizer."""
        from taming.modules.vqvae.metrics import CodebookMetrics  # imports torchmetrics: seconds

        return CodebookMetrics(self.n_e, self.sequence.max_loops, self.codebooks)

    def tracked_scalars(self) -> dict[str, Tensor]:
        """Return scalars of the quantizer's state to log while it trains, by name."""
        return {}

    def loop_tables(self) -> dict[str, Tensor]:
        """Return what finds codes outside of torch, as `taming.modules.vqvae.numpy_loop` takes it.

        Raises:
            ValueError: Its codes take more than tables.
        """
        raise ValueError(f"the codes of a {type(self).__name__} cannot be found by tables alone")

    def _check(self, z: Tensor) -> None:
        """Refuse z that is not (B, D, h, w) or (N, D) of finite latents."""
        if z.ndim not in (2, 4) or z.shape[1] != self.e_dim:
            expected = f"(B, {self.e_dim}, h, w) or (N, {self.e_dim})"
            raise ValueError(f"expected latents {expected}, got {tuple(z.shape)}")
        check_finite_latents(z)


def load_used_codes(remap: str, n_e: int) -> Tensor:
    """Load the codes (N,) int64 that an ``.npy`` file of a ``remap`` names.

    Raises:
        ValueError: The file cannot be read, or does not name different codes of 0..n_e - 1.
    """
    try:
        used = load_array(remap)
    except ValueError as error:
        raise ValueError(f"remap: {remap} {error}") from error
    codes = {int(code) for code in used.flat} if used.dtype.kind in "iu" and used.ndim == 1 else {}
    if not codes or min(codes) < 0 or max(codes) >= n_e or len(codes) < len(used):
        raise ValueError(
            f"remap: {remap} must name codes 0..{n_e - 1} as integers (N,), at least one, each once"
        )
    return torch.from_numpy(used.astype(np.int64))


class SingleCodeQuantizer(Quantizer):
    """Base class of the original's quantizers: one code per latent, and remapped indices.

    Args:
        n_e: K, number of codes.
        e_dim: D, channels of a latent.
        remap: Path of an ``.npy`` file of used codes; indices then number only those.
        unknown_index: Index of an unused code under ``remap``: ``"random"``, ``"extra"`` (one
            more index) or a number.

    Attributes:
        re_embed: Number of different indices.
    """

    not_in_identity = ("remap",)  # the codes it names are a buffer
    used: Tensor

    def __init__(
        self, n_e: int, e_dim: int, remap: str | None = None, unknown_index: str | int = "random"
    ) -> None:
        super().__init__(n_e, e_dim)
        if isinstance(unknown_index, str) and unknown_index not in ("random", "extra"):
            raise ValueError(
                f"unknown_index must be 'random', 'extra' or an index, got {unknown_index!r}"
            )
        self.remap, self.unknown_index, self.re_embed = remap, unknown_index, n_e
        if remap is not None:
            used = load_used_codes(remap, n_e)
            if isinstance(unknown_index, int) and not 0 <= unknown_index < len(used):
                most = len(used) - 1  # of the numbers of used codes
                raise ValueError(f"unknown_index must be in 0..{most}, got {unknown_index}")
            self.register_buffer("used", used)
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)
        self.sequence = RasterSequence(self.re_embed)

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The codes (K, D)."""

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Number codes among the used ones; unused ones become ``unknown_index``. Any shape."""
        indices = indices.masked_fill(mark_outside(indices, self.n_e), 0)
        table = self.used.new_full((self.n_e,), -1)
        table[self.used] = torch.arange(len(self.used), device=table.device)
        new = table[indices]
        if self.unknown_index == "random":
            other = torch.randint_like(new, self.re_embed)
        else:
            other = torch.full_like(new, int(self.unknown_index))
        return torch.where(new < 0, other, new)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Turn indices among the used codes back into codes; the extra index becomes the first."""
        wrong = mark_outside(indices, self.re_embed)
        return self.used[torch.where(wrong | (indices >= len(self.used)), 0, indices)]

    def get_codebook_entry(self, indices: Tensor, shape: GridShape | None = None) -> Tensor:
        """Look up indices.

        Args:
            indices: Integers in 0..``re_embed``-1, of any shape.
            shape: (B, h, w, D) that they fill.

        Returns:
            z_q (B, D, h, w), or (N, D) without a shape.

        Raises:
            ValueError: They are no such integers, or do not fill the shape. On an accelerator and
                in a graph, an index that is out of range becomes NaN instead.
        """
        rows, grid = rows_of_codes(indices, None, shape, self.e_dim)
        codes = rows.squeeze(1)  # (N,)
        wrong = mark_outside(codes, self.re_embed)
        codes = codes.masked_fill(wrong, 0)
        if self.remap is not None:
            codes = self.unmap_to_all(codes)
        z_q = F.embedding(codes, self.codebook).masked_fill(wrong[:, None], math.nan)
        return z_q if shape is None else channels_second(z_q.view(*grid, self.e_dim))
