"""What one turn of the loop does to a latent that no code is near enough to.

Axis letters: N latents, D channels, K codes, T turns, M searches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taming.modules.distributed import sum_over_ranks
from taming.modules.vqvae.loop import ABSENT, Cascade, Path, Searches, Transform
from taming.modules.vqvae.nearest import nearest_codes

MOMENTUM = 0.95  # weight of the old value in running statistics
RIDGE = 1e-2  # of least squares, relative to the mean square of a code's coordinates


class Attract(Transform):
    """Pull the latent a step toward its nearest code: r <- r + step (e_k - r), writing D.

    Moving toward e_k never leaves its Voronoi cell, so k is the same in every turn, the distance
    is d (1 - step)^t after t of them, and the number of turns is known after one search: the loop
    writes ceil(log(tau / d) / log(1 - step)) dummies, from 0 to T - 1. A site decodes to e_k; only
    with a depth embedding does the count tell the decoder something.

    Args:
        step: Fraction of the way to the code covered in a turn, in (0, 1].
        depth_embedding: See `Transform`.

    Raises:
        ValueError: ``step`` is out of range.
    """

    dummies = True

    def __init__(self, step: float = 0.5, depth_embedding: tuple[int, int] | None = None) -> None:
        super().__init__(depth_embedding)
        if not 0 < step <= 1:
            raise ValueError(f"step must be in (0, 1], got {step}")
        self.step = step

    @torch.no_grad()
    def search(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; one search, cost independent of T (see `Transform`)."""
        found, first = nearest_codes(z, codebook)
        slot = torch.arange(max_loops, device=z.device)
        going, ended = slot < slot[:, None], slot > slot[:, None]
        codes = found[:, None, None].expand(-1, max_loops, max_loops)
        codes = codes.masked_fill(going, len(codebook)).masked_fill(ended, ABSENT)
        return Path(codes, first[:, None] * (1 - self.step) ** slot)

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the one search of each latent (see `Transform`)."""
        found = self._answer(codes)
        sites = torch.arange(len(z), device=z.device)
        weights = torch.ones_like(z[:, 0])
        return Searches(sites, torch.zeros_like(sites), z, found, codebook[found], z, weights)

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into e_k of shape (N, D) (see `Transform`)."""
        return codebook[self._answer(codes)]

    @staticmethod
    def _answer(codes: Tensor) -> Tensor:
        """Take the one code (N,) out of codes (N, T)."""
        dummies = (codes >= 0).sum(dim=1, keepdim=True) - 1
        return codes.gather(1, dummies).squeeze(1)


class Residual(Cascade):
    """Rescale what is left to the size of the latents: M_t is the number S_t (see `Cascade`).

    With s_t = S_(t+1) / S_t that is r <- (r - e_k) / s_t, searched in the codebook as it is. It
    takes no account of the shape of what is left.

    Args:
        max_loops: T.
        depth_embedding: See `Transform`.
        beam: See `Cascade`.

    Attributes:
        scales: (T,) float32, S_t: the running RMS of what is left at turn t over the latents'.
    """

    def __init__(
        self, max_loops: int, depth_embedding: tuple[int, int] | None = None, beam: int = 1
    ) -> None:
        super().__init__(max_loops, depth_embedding, beam)
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(max_loops))

    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Scale codes (K, D) by S_t (see `Cascade`)."""
        return codebook if turn == 0 else codebook * self.scales[turn]

    def backproject(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Scale errors (M, D) by S_t; and S_t^2 (see `Cascade`)."""
        return errors * self.scales[turn], self.scales[turn].square()

    @torch.no_grad()
    def start(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Set the scales (see `Transform`)."""
        self.scales = relative_sizes(searches, self.scales)

    @torch.no_grad()
    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Move the scales toward those of a batch of all ranks (see `Transform`)."""
        # A new tensor: the step's backward pass may need the old one.
        self.scales = self.scales.lerp(relative_sizes(searches, self.scales), 1 - MOMENTUM)


class LinearResidual(Cascade):
    """Bring the codebook into the shape of what is left: M_t is a matrix (see `Cascade`).

    The maps are the least-squares fit of M_t e_k to what was searched in turn t, followed by a
    damped Newton step for each batch, so that maps and codebook together go down in |z - z_q|^2.
    A ridge keeps axes in which codes hardly differ, and turns that few latents take, from noise.
    T - 1 maps of D x D numbers stand in for T separate codebooks of K x D.

    Args:
        max_loops: T.
        e_dim: D.
        depth_embedding: See `Transform`.
        beam: See `Cascade`.

    Attributes:
        maps: (T, D, D) float32, M_t.
        moments: (T, D, D) float32, running mean of e e^T over the codes written at turn t.
    """

    def __init__(
        self,
        max_loops: int,
        e_dim: int,
        depth_embedding: tuple[int, int] | None = None,
        beam: int = 1,
    ) -> None:
        super().__init__(max_loops, depth_embedding, beam)
        self.maps: Tensor
        self.moments: Tensor
        self.register_buffer("maps", torch.eye(e_dim).repeat(max_loops, 1, 1))
        self.register_buffer("moments", torch.eye(e_dim).repeat(max_loops, 1, 1))

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError for sizes D and T that it was not built for (see `Transform`)."""
        if self.maps.shape[1] != e_dim:
            raise ValueError(
                f"LinearResidual has e_dim={self.maps.shape[1]}, but its quantizer {e_dim}"
            )
        super().check(e_dim, max_loops)

    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Map codes (K, D) by M_t (see `Cascade`)."""
        return codebook if turn == 0 else product(codebook, self.maps[turn].T)

    def backproject(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Map errors (M, D) by M_t^T; and the mean square of M_t's axes (see `Cascade`)."""
        axes = self.maps[turn]
        return product(errors, axes), axes.square().sum() / len(axes)

    @torch.no_grad()
    def start(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Set the maps to the sizes of what is left, without its shape (see `Transform`)."""
        sizes = relative_sizes(searches, self.maps.diagonal(dim1=1, dim2=2).mean(dim=1))
        self.maps = sizes[:, None, None] * torch.eye(z.shape[1], device=z.device)
        self.moments = self._statistics(z, searches, codebook)[1]

    @torch.no_grad()
    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Step toward the least-squares maps of a batch of all ranks (see `Transform`)."""
        cross, moments, counts = self._statistics(z, searches, codebook)
        # Few searches say little about a matrix.
        rate = ((1 - MOMENTUM) * counts / (counts + z.shape[1]))[:, None, None]
        self.moments.lerp_(moments, rate)
        # Without the ridge, axes in which codes hardly differ would get maps made of noise.
        mean = self.moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        damped = self.moments + RIDGE * mean * torch.eye(z.shape[1], device=z.device)
        wanted = (cross - RIDGE * mean * self.maps).mT
        step = torch.zeros_like(self.maps)  # the first turn sees the codes as they are
        step[1:] = torch.linalg.solve(damped[1:], wanted[1:]).mT
        # A new tensor: the step's backward pass may need the old one.
        self.maps = self.maps + rate * step

    def _statistics(
        self, z: Tensor, searches: Searches, codebook: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of (z - z_q) e^T and of e e^T by turn, each (T, D, D); searches (T,); of all ranks.

        A turn that no latent took has no error, and keeps the moments that it has.
        """
        codes = codebook[searches.found]
        errors = z[searches.sites] - searches.approximations
        turns = searches.turns == torch.arange(self.max_loops, device=z.device)[:, None]
        sums = [product(torch.cat([errors[on], codes[on]], dim=1).T, codes[on]) for on in turns]
        counts = turns.sum(dim=1).to(z)
        total = sum_over_ranks(torch.cat([torch.stack(sums).flatten(1), counts[:, None]], dim=1))
        means = total[:, :-1] / total[:, -1:].clamp(min=1)
        cross, moments = means.unflatten(1, (2, z.shape[1], z.shape[1])).unbind(1)
        counts = total[:, -1]
        return cross, torch.where((counts > 0)[:, None, None], moments, self.moments), counts


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply float32 matrices as such, whatever autocast says: codes must not be rounded."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def relative_sizes(searches: Searches, default: Tensor) -> Tensor:
    """RMS of what is left at each turn over the RMS of the latents, on all ranks.

    Args:
        searches: Of a `Cascade`; only latents that went on to a turn count there.
        default: (T,), for turns that no latent took.

    Returns:
        (T,) float32.
    """
    power = searches.queries.square().mean(dim=1)
    turns = torch.zeros(len(default), 2, device=power.device)
    turns.index_add_(0, searches.turns, torch.stack([power, torch.ones_like(power)], dim=1))
    total, count = sum_over_ranks(turns).unbind(1)
    mean = total / count.clamp(min=1)
    sizes = (mean / mean[0].clamp(min=1e-20)).sqrt().clamp(min=1e-4)
    return torch.where(count > 0, sizes, default)
