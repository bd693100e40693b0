"""Residual quantization whose turns all see one codebook, each through a map of its own.

Axis letters: N latents, D channels, K codes, T turns, P partial paths, M searches.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.vqvae.loop import ABSENT, Path, Searches, Transform
from taming.modules.vqvae.nearest import nearest_codes


class Cascade(Transform):
    """Subtract the nearest code and go on with what is left: r <- r - M_t e_k, writing k.

    All codes compete again in each turn, which sees the one codebook through a linear map M_t of
    its own, M_0 = 1: what is left has another size and shape than the latents. A site decodes to
    sum_t M_t e_{k_t}. The distance |r - M_t e_k| is |z - z_q|, so the threshold bounds the error
    of every site that ends by itself. The greedy path does not depend on the threshold, which only
    cuts it. With M_t = 1 this is residual quantization with a shared codebook (Lee et al. 2022,
    arXiv:2203.01941).

    Args:
        max_loops: T.
        depth_embedding: See `Transform`.
        beam: Partial paths kept for a latent in each turn. 1 takes the nearest code, and a shorter
            path is then the beginning of a longer one; more finds better paths, at that many times
            the cost of the search.

    Raises:
        ValueError: ``beam`` is out of range.
    """

    dummies = False

    def __init__(
        self, max_loops: int, depth_embedding: tuple[int, int] | None = None, beam: int = 1
    ) -> None:
        super().__init__(depth_embedding)
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        self.max_loops = max_loops
        self.beam = beam

    @abstractmethod
    def see(self, codebook: Tensor, turn: int) -> Tensor:
        """Map codes (K, D) as a turn sees them: M_t e."""

    @abstractmethod
    def pull(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Map errors (M, D) of a turn to its codes: M_t^T times them, and |M_t|^2 / D, a scalar."""

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError if it was built for another number of turns T (see `Transform`)."""
        if self.max_loops != max_loops:
            raise ValueError(
                f"{type(self).__name__} has max_loops={self.max_loops}, but its quantizer "
                f"{max_loops}"
            )
        super().check(e_dim, max_loops)

    @torch.no_grad()
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; only those still in it are searched (see `Transform`)."""
        codes = torch.full((len(z), max_loops, max_loops), ABSENT, device=z.device)
        distances = torch.full((len(z), max_loops), math.inf, device=z.device)
        sites, residual = torch.arange(len(z), device=z.device), z[:, None]
        written = torch.empty(len(z), 1, 0, dtype=torch.int64, device=z.device)
        for turn in range(max_loops):
            residual, written, distance = self._extend(residual, written, self.see(codebook, turn))
            codes[sites, turn, : turn + 1] = written[:, 0]
            distances[sites, turn] = distance[:, 0]
            on = distance[:, 0] > threshold[sites]
            if not on.any():
                break
            sites, written, residual = sites[on], written[on], residual[on]
        return Path(codes, distances)

    def _extend(
        self, residual: Tensor, written: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the best next codes of partial paths; P are kept of a latent, at most ``beam``.

        Args:
            residual: (N, P, D).
            written: (N, P, t) int64.
            seen: (K, D), the codebook as this turn sees it.

        Returns:
            Residuals (N, P, D), codes written (N, P, t + 1) and distances (N, P), nearest first.
        """
        latents, paths, _ = residual.shape
        each = min(self.beam, len(seen))
        found, distance = nearest_codes(residual.flatten(0, 1), seen, k=each)
        kept = min(self.beam, paths * each)
        distance, best = distance.view(latents, -1).topk(kept, largest=False)
        code = found.view(latents, -1).gather(1, best)
        parent = (best // each)[..., None]
        residual = residual.take_along_dim(parent, dim=1) - seen[code]
        written = torch.cat([written.take_along_dim(parent, dim=1), code[..., None]], dim=2)
        return residual, written, distance

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the searches of each latent, one turn after the other (see `Transform`)."""
        sites, sums = torch.arange(len(z), device=z.device), torch.zeros_like(z)
        searches = []
        for turn in range(self.max_loops):
            on = codes[sites, turn] >= 0
            sites, before = sites[on], sums[on].detach()
            found = codes[sites, turn]
            sums = before + F.embedding(found, self.see(codebook, turn))
            # A code comes nearer to what it is to be down the gradient of |z - z_q|^2.
            pulls, weight = self.pull(z[sites] - sums.detach(), turn)
            targets = codebook.detach()[found] + pulls / weight
            columns = (torch.full_like(sites, turn), z[sites] - before, found, sums, targets)
            searches.append((sites, *columns, weight.expand(len(sites))))
        return Searches(*(torch.cat(column) for column in zip(*searches, strict=True)))

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into the sums of shape (N, D) (see `Transform`)."""
        z_q = codebook.new_zeros(len(codes), codebook.shape[1])
        for turn, code in enumerate(codes.unbind(1)):
            part = F.embedding(code.clamp(min=0), self.see(codebook, turn))
            # Zero is added where the site has ended, which leaves its sum as it is, bit for bit.
            z_q = z_q + part * (code >= 0)[:, None]
        return z_q
