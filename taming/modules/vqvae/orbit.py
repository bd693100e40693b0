"""A turn that rotates the latent, so that a code is met again as another vector.

Axis letters: N latents, D channels, K codes, T turns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taming.modules.vqvae.loop import ABSENT, Path, Searches, Transform
from taming.modules.vqvae.nearest import nearest_codes

START = 0.05  # size of the first turn: near the identity, where f^-t(e_k) are all near the latents


class Orbit(Transform):
    """Carry the latent on: r <- f(r) = s Q r + b with Q orthogonal and s > 0, writing D.

    All codes compete again in every turn. In the space of z they are then f^-t(e_k), so K codes
    stand for K T vectors, and a sequence ``D,D,A'`` is a power of f and a code; a site decodes to
    f^-t(e_k). If the loop ends at a turn by force, the best turn so far is written instead.

    f is learned by gradient through z_q, with whatever the decoder is trained on.

    Args:
        max_loops: T.
        e_dim: D.
        depth_embedding: See `Transform`.

    Attributes:
        skew: (D, D), of which Q is the exponential of the antisymmetric part, doubled.
        log_scale: Scalar, log s.
        offset: (D,), b.
    """

    dummies = True

    def __init__(
        self, max_loops: int, e_dim: int, depth_embedding: tuple[int, int] | None = None
    ) -> None:
        super().__init__(depth_embedding)
        self.max_loops = max_loops
        self.skew = nn.Parameter(START * torch.randn(e_dim, e_dim))
        self.log_scale = nn.Parameter(torch.tensor(START))
        self.offset = nn.Parameter(torch.zeros(e_dim))

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError for sizes D and T that it was not built for (see `Transform`)."""
        own = {"e_dim": len(self.offset), "max_loops": self.max_loops}
        wanted = {"e_dim": e_dim, "max_loops": max_loops}
        if own != wanted:
            raise ValueError(f"Orbit was built for {own}, but its quantizer for {wanted}")
        super().check(e_dim, max_loops)

    def orbits(self, codebook: Tensor) -> Tensor:
        """Carry codes (K, D) back by 0 to T - 1 turns: f^-t(e_k) of shape (T, K, D)."""
        with torch.autocast(codebook.device.type, enabled=False):
            turn = torch.matrix_exp(self.skew - self.skew.T) / self.log_scale.exp()
            orbit = [codebook]
            for _ in range(self.max_loops - 1):
                orbit.append((orbit[-1] - self.offset) @ turn)
            return torch.stack(orbit)

    def carry(self, z: Tensor, turns: Tensor) -> Tensor:
        """Carry latents (N, D) on by ``turns`` (N,) each: f^t(z)."""
        with torch.autocast(z.device.type, enabled=False):
            turn = torch.matrix_exp(self.skew.T - self.skew) * self.log_scale.exp()
            for done in range(self.max_loops - 1):
                z = torch.where((done < turns)[:, None], z @ turn + self.offset, z)
            return z

    @torch.no_grad()
    def walk(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; one search for each turn (see `Transform`)."""
        codes, distances = [], []
        for turn, seen in enumerate(self.orbits(codebook)):
            found, distance = nearest_codes(z, seen)
            written = torch.full((len(z), max_loops), ABSENT, device=z.device)
            written[:, :turn] = len(codebook)
            written[:, turn] = found
            if turn > 0:
                nearer = distance < distances[-1]
                written = torch.where(nearer[:, None], written, codes[-1])
                distance = torch.where(nearer, distance, distances[-1])
            codes.append(written)
            distances.append(distance)
        return Path(torch.stack(codes, dim=1), torch.stack(distances, dim=1))

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the one search of each latent that is written (see `Transform`)."""
        turns, found = self._read(codes)
        sites = torch.arange(len(z), device=z.device)
        approximations = self.orbits(codebook)[turns, found]
        weights = torch.exp(-2 * self.log_scale.detach() * turns)
        targets = self.carry(z, turns).detach()
        return Searches(sites, turns, z, found, approximations, targets, weights)

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into f^-t(e_k) of shape (N, D) (see `Transform`)."""
        return self.orbits(codebook)[self._read(codes)]

    @staticmethod
    def _read(codes: Tensor) -> tuple[Tensor, Tensor]:
        """Turns t and codes k, both (N,), of codes (N, T)."""
        turns = (codes >= 0).sum(dim=1) - 1
        return turns, codes.gather(1, turns[:, None]).squeeze(1)
