"""Transforms: one turn of the loop for a latent without a code within the threshold.

Axis letters: N latents, D channels, K codes, T turns, M searches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.distributed import sum_over_ranks
from taming.modules.vqvae.entropy import Price
from taming.modules.vqvae.loop import Cascade, DepthShape, Path, Searches, Transform
from taming.modules.vqvae.nearest import distance_to, nearest_codes

MOMENTUM = 0.95  # weight of the old value in running statistics
RIDGE = 1e-2  # of least squares, relative to the mean square of a code's coordinates


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices in float32, even under autocast: codes must not be rounded."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def relative_sizes(searches: Searches, default: Tensor) -> Tensor:
    """RMS of the queries of each turn over that of the latents, on all ranks.

    Args:
        searches: Of a `Cascade`; only latents that went on to a turn count there.
        default: (T,), for turns that no latent took.

    Returns:
        (T,) float32.
    """
    power = searches.queries.square().mean(dim=1)  # (M,)
    turns = power.new_zeros(len(default), 2)
    turns.index_add_(0, searches.turns, torch.stack([power, torch.ones_like(power)], dim=1))
    total, count = sum_over_ranks(turns).unbind(1)  # (T,)
    mean = total / count.clamp(min=1)
    sizes = (mean / mean[0].clamp(min=1e-20)).sqrt().clamp(min=1e-4)
    return torch.where(count > 0, sizes, default)


class Attract(Transform):
    """Pull the latent a step toward its nearest code: r <- r + step (e_k - r), writing D.

    Moving toward e_k never leaves its Voronoi cell, so k is the same in every turn, the distance
    is d (1 - step)^n after n of them, and the number of turns is known after one search: the loop
    writes ceil(log(tau / d) / log(1 - step)) dummies, from 0 to T - 1. A site decodes to e_k; only
    with a depth embedding does the length reach the decoder.

    Args:
        step: Fraction of the way to the code covered in a turn, in (0, 1].
        depth_embedding: (T, D) of the depth embedding; None for none.

    Example:
        >>> codebook, z = torch.tensor([[0.0], [8.0]]), torch.tensor([[0.5], [6.0]])
        >>> path = Attract(step=0.5).search(z, codebook, torch.full((2,), 0.5), max_loops=4)
        >>> path.distances[1].tolist()
        [2.0, 1.0, 0.5, 0.25]
        >>> path.end_at(torch.tensor([1, 3]))  # 2 is the dummy
        tensor([[ 0, -1, -1, -1],
                [ 2,  2,  1, -1]])
    """

    dummies = True

    def __init__(self, step: float = 0.5, depth_embedding: DepthShape = None) -> None:
        super().__init__(depth_embedding)
        if not 0 < step <= 1:
            raise ValueError(f"step must be in (0, 1], got {step}")
        self.step = step

    @torch.no_grad()
    def search(
        self,
        z: Tensor,
        codebook: Tensor,
        threshold: Tensor,
        max_loops: int,
        price: Price | None = None,
    ) -> Path:
        """Find the whole path of each latent by one search, at a cost independent of T."""
        found = nearest_codes(z, codebook)  # (N,)
        first = distance_to(z, F.embedding(found, codebook))  # (N,)
        turn = torch.arange(max_loops, device=z.device, dtype=z.dtype)
        codes = found[:, None, None].expand(-1, 1, max_loops)
        return Path(codes, first[:, None] * (1 - self.step) ** turn, dummy=len(codebook))

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the one search of each latent, with gradient."""
        found = self._last_code(codes)
        sites = torch.arange(z.shape[0], device=z.device)
        weights = torch.ones_like(z[:, 0])
        codes_of_sites = F.embedding(found, codebook)  # (N, D)
        return Searches(sites, torch.zeros_like(sites), z, found, codes_of_sites, z, weights)

    def mean_square(self, path: Path, lengths: Tensor) -> Tensor:
        """Average the squared distances of the one search."""
        return path.distances[:, 0].square().mean()

    def loop_tables(self, codebook: Tensor) -> dict[str, Tensor]:
        """Return the one codebook and the step."""
        return {"codebooks": codebook[None], "step": torch.tensor(self.step)}

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Look up e_k, of shape (N, D), for codes (N, T)."""
        return F.embedding(self._last_code(codes), codebook)

    @staticmethod
    def _last_code(codes: Tensor) -> Tensor:
        """Return the one code (N,) of each site, the last of codes (N, T)."""
        last = (codes >= 0).sum(dim=1, keepdim=True) - 1  # (N, 1)
        return codes.gather(1, last).squeeze(1)


class Residual(Cascade):
    """Rescale the residual to the size of the latents: M_n is the number S_n (see `Cascade`).

    With s_n = S_(n+1) / S_n that is r <- (r - e_k) / s_n, searched in the codebook as it is,
    which ignores the residual's shape.

    Args:
        max_loops: T.
        depth_embedding: (T, D) of the depth embedding; None for none.
        beam: Partial paths kept per latent in each turn.

    Attributes:
        scales: (T,) float32, S_n: running RMS of the residual at turn n over that of the latents.

    Example:
        >>> residual, codebook = Residual(max_loops=3), torch.tensor([[1.0], [4.0], [-0.5]])
        >>> z = torch.tensor([[4.5]])
        >>> path = residual.search(z, codebook, threshold=torch.zeros(1), max_loops=3)
        >>> path.codes[0, -1].tolist(), path.distances.tolist()
        ([1, 0, 2], [[0.5, 0.5, 0.0]])
    """

    def __init__(self, max_loops: int, depth_embedding: DepthShape = None, beam: int = 1) -> None:
        super().__init__(max_loops, depth_embedding, beam)
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(max_loops))

    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Scale codes (K, D) by S_n."""
        return codebook if turn == 0 else codebook * self.scales[turn]

    def backproject(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Scale errors (M, D) by S_n; return S_n^2 too."""
        return errors * self.scales[turn], self.scales[turn].square()

    @torch.no_grad()
    def initialize(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Set the scales to those of a batch of all ranks."""
        self.scales = relative_sizes(searches, self.scales)

    @torch.no_grad()
    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Move the scales toward those of a batch of all ranks."""
        # A new tensor: the step's backward pass may need the old one.
        self.scales = self.scales.lerp(relative_sizes(searches, self.scales), 1 - MOMENTUM)


class LinearResidual(Cascade):
    """Bring the codebook into the shape of the residuals: M_n is a matrix (see `Cascade`).

    The maps are the least-squares fit of M_n e_k to the queries of turn n, followed by a damped
    Newton step for each batch, so that maps and codebook together reduce ``|z - z_q|^2``. A
    ridge keeps axes in which codes hardly differ, and turns that few latents take, from noise.
    T - 1 maps of D x D numbers stand in for T separate codebooks of K x D.

    Args:
        max_loops: T.
        e_dim: D.
        depth_embedding: (T, D) of the depth embedding; None for none.
        beam: Partial paths kept per latent in each turn.

    Attributes:
        maps: (T, D, D) float32, M_n.
        moments: (T, D, D) float32, running mean of e e^T over the codes found at turn n.

    Example:
        >>> linear, z = LinearResidual(max_loops=3, e_dim=2), torch.randn(50, 2)
        >>> codebook = z[:8]
        >>> codes = linear.search(z, codebook, torch.zeros(50), max_loops=3).codes[:, -1]
        >>> linear.initialize(z, linear.retrace(z, codes, codebook), codebook)
        >>> bool(linear.maps[1, 0, 0] < 1)  # residuals are smaller than latents
        True
    """

    def __init__(
        self, max_loops: int, e_dim: int, depth_embedding: DepthShape = None, beam: int = 1
    ) -> None:
        super().__init__(max_loops, depth_embedding, beam)
        self.maps: Tensor
        self.moments: Tensor
        self.register_buffer("maps", torch.eye(e_dim).repeat(max_loops, 1, 1))
        self.register_buffer("moments", torch.eye(e_dim).repeat(max_loops, 1, 1))

    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Map codes (K, D) by M_n."""
        return codebook if turn == 0 else product(codebook, self.maps[turn].T)

    def backproject(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Map errors (M, D) by M_n^T; return the mean square of M_n's axes too."""
        axes = self.maps[turn]
        return product(errors, axes), axes.square().sum() / len(axes)

    @torch.no_grad()
    def initialize(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Set the maps to the relative sizes of the residuals, without their shape."""
        sizes = relative_sizes(searches, self.maps.diagonal(dim1=1, dim2=2).mean(dim=1))
        self.maps = sizes[:, None, None] * torch.eye(z.shape[1]).to(z)  # (T, D, D)
        self.moments = self._statistics(z, searches, codebook)[1]

    @torch.no_grad()
    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Step toward the least-squares maps of a batch of all ranks."""
        cross, moments, counts = self._statistics(z, searches, codebook)
        # The fewer searches, the less they determine a matrix.
        rate = ((1 - MOMENTUM) * counts / (counts + z.shape[1]))[:, None, None]  # (T, 1, 1)
        self.moments.lerp_(moments, rate)
        # Without the ridge, axes in which codes hardly differ would get maps made of noise.
        mean = self.moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        damped = self.moments + RIDGE * mean * torch.eye(z.shape[1]).to(z)
        wanted = (cross - RIDGE * mean * self.maps).mT
        step = torch.zeros_like(self.maps)  # M_0 stays 1: the first turn sees the codes as they are
        step[1:] = torch.linalg.solve(damped[1:], wanted[1:]).mT
        # A new tensor: the step's backward pass may need the old one.
        self.maps = self.maps + rate * step

    def _statistics(
        self, z: Tensor, searches: Searches, codebook: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of (z - z_q) e^T and of e e^T by turn, each (T, D, D); searches (T,); of all ranks.

        A turn that no latent took has zero error and keeps its moments.
        """
        codes = F.embedding(searches.found, codebook)  # (M, D)
        errors = F.embedding(searches.sites, z) - searches.approximations  # (M, D)
        counts = torch.bincount(searches.turns, minlength=self.max_loops)  # (T,)
        by_turn = [column.split(counts.tolist()) for column in (errors, codes)]  # listed by turn
        sums = [
            torch.cat([product(e.T, c), product(c.T, c)]) for e, c in zip(*by_turn, strict=True)
        ]
        counts = counts.to(z)
        total = sum_over_ranks(torch.cat([torch.stack(sums).flatten(1), counts[:, None]], dim=1))
        means = total[:, :-1] / total[:, -1:].clamp(min=1)  # (T, 2 D D)
        cross, moments = means.unflatten(1, (2, z.shape[1], z.shape[1])).unbind(1)  # (T, D, D)
        counts = total[:, -1]
        return cross, torch.where((counts > 0)[:, None, None], moments, self.moments), counts
