"""The loop as its quantizer sees it: paths of latents, the searches on them, and what a turn does.

Slots of codes hold 0..K-1 for a codebook vector, K for the dummy D ("transformed, went round
again") and -1 after the end of the loop.

Axis letters: N latents, D channels, K codes, T turns, M searches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.nearest import nearest_codes

ABSENT = -1


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Return a module's public attributes that are numbers, strings, bools or tuples of these."""
    plain = (bool, int, float, str)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
        if isinstance(value, plain)
        or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value))
    }


class Path(NamedTuple):
    """Where the loop of each latent may end.

    Attributes:
        codes: (N, T, T) int64; ``codes[:, t]`` are the slots written if the loop ends at turn t.
        distances: (N, T) float32, what is compared with the threshold at each turn: from where the
            latent has come to the nearest code. In a `Cascade` this is |z - z_q|, before any depth
            embedding. inf at turns after the one at which it was told to end.
    """

    codes: Tensor
    distances: Tensor

    def end_at(self, lengths: Tensor) -> Tensor:
        """Codes (N, T) of loops that end after ``lengths`` turns, (N,) int64 in [1, T]."""
        return self.codes[torch.arange(len(lengths), device=lengths.device), lengths - 1]


def check_codes(codes: Tensor, n_e: int, dummies: bool) -> None:
    """Refuse codes (N, T) with a site that has no code or goes on after its end.

    Args:
        codes: (N, T) int64.
        n_e: K.
        dummies: See `Transform`.

    Raises:
        ValueError: They are not codes that a loop writes.
    """
    last = (codes >= 0).sum(dim=1, keepdim=True) - 1
    slot = torch.arange(codes.shape[1], device=codes.device)
    is_code = (codes >= 0) & (codes < n_e)
    body = (codes == n_e) if dummies else is_code
    right = torch.where(slot < last, body, torch.where(slot == last, is_code, codes == ABSENT))
    wrong = ~right.all(dim=1) | (last.squeeze(1) < 0)
    if wrong.any():
        site = int(wrong.nonzero()[0])
        form = "D,D,A'" if dummies else "A1,A2,A3"
        raise ValueError(
            f"site {site} reads {codes[site].tolist()}, which is no sequence of the form "
            f"{form} with codes 0..{n_e - 1}, D = {n_e} and -1 after the end"
        )


class Searches(NamedTuple):
    """The searches by which codes were found: one per latent and turn for `Residual`.

    Attributes:
        sites: (M,) int64 in [0, N), the latent of each search.
        turns: (M,) int64 in [0, T), the turn of each search.
        queries: (M, D) float32, the vector that was searched, in the space of z.
        found: (M,) int64 in [0, K), the code written.
        approximations: (M, D) float32, z_q if the loop ended there. Their gradient goes to the
            code written last, since the loop is greedy.
        targets: (M, D) float32, to where in the codebook the query pulls the code.
        weights: (M,) float32, how far z_q moves with that code, squared.
    """

    sites: Tensor
    turns: Tensor
    queries: Tensor
    found: Tensor
    approximations: Tensor
    targets: Tensor
    weights: Tensor


class Transform(nn.Module, ABC):
    """One turn of the loop and its inverse.

    Args:
        depth_embedding: (T, D) of learned vectors b_n, started at zero and added to z_q by the
            number of turns n, which tells the decoder the count; None for none.

    Attributes:
        dummies: True if a site reads ``D,D,A'`` (dummies, then its one code); False if every turn
            writes a code (``A1,A2,A3``).
    """

    dummies: bool

    def __init__(self, depth_embedding: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.depth = None
        if depth_embedding is not None:
            self.depth = nn.Parameter(torch.zeros(*depth_embedding))

    @abstractmethod
    def search(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop until a code is within the threshold.

        Args:
            z: (N, D) float32 latents; not changed.
            codebook: (K, D) float32.
            threshold: (N,) float32, Euclidean distance in the space of z at which a loop ends.
            max_loops: T, the last turn ends every loop.

        Returns:
            The path; no gradient flows through it.
        """

    @abstractmethod
    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the searches by which latents z (N, D) were given their codes (N, T)."""

    @abstractmethod
    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into the vectors (N, D) that came nearest to the latents."""

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into z_q (N, D), with the depth embedding if there is one."""
        z_q = self.compose(codes, codebook)
        return z_q if self.depth is None else z_q + self.depth[(codes >= 0).sum(dim=1) - 1]

    def identity(self) -> dict[str, object]:
        """Return what, beside parameters and buffers, decides the codes; see `Quantizer`."""
        return {"kind": type(self).__name__, **plain_attributes(self)}

    def check(self, e_dim: int, max_loops: int) -> None:
        """Raise a ValueError for sizes D and T that it was not built for."""
        if self.depth is not None and self.depth.shape != (max_loops, e_dim):
            raise ValueError(
                f"depth_embedding {tuple(self.depth.shape)} must be (max_loops, e_dim) = "
                f"{(max_loops, e_dim)}"
            )

    def start(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Set what the transform learns from a first batch; nothing to do by default.

        Args:
            z: (N, D) latents of the batch.
            searches: The searches made for them.
            codebook: (K, D).
        """

    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Update what the transform learns from a training batch (see `start`)."""


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
    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Map codes (K, D) as a turn sees them: M_t e."""

    @abstractmethod
    def backproject(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
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
    def search(self, z: Tensor, codebook: Tensor, threshold: Tensor, max_loops: int) -> Path:
        """Follow latents round the loop; only those still in it are searched (see `Transform`)."""
        codes = torch.full((len(z), max_loops, max_loops), ABSENT, device=z.device)
        distances = torch.full((len(z), max_loops), math.inf, device=z.device)
        sites, residual = torch.arange(len(z), device=z.device), z[:, None]
        written = torch.empty(len(z), 1, 0, dtype=torch.int64, device=z.device)
        for turn in range(max_loops):
            residual, written, distance = self._extend(
                residual, written, self.project(codebook, turn)
            )
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
            sums = before + F.embedding(found, self.project(codebook, turn))
            # A code comes nearer to what it is to be down the gradient of |z - z_q|^2.
            pulls, weight = self.backproject(z[sites] - sums.detach(), turn)
            targets = codebook.detach()[found] + pulls / weight
            columns = (torch.full_like(sites, turn), z[sites] - before, found, sums, targets)
            searches.append((sites, *columns, weight.expand(len(sites))))
        return Searches(*(torch.cat(column) for column in zip(*searches, strict=True)))

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn codes (N, T) into the sums of shape (N, D) (see `Transform`)."""
        z_q = codebook.new_zeros(len(codes), codebook.shape[1])
        for turn, code in enumerate(codes.unbind(1)):
            part = F.embedding(code.clamp(min=0), self.project(codebook, turn))
            # Zero is added where the site has ended, which leaves its sum as it is, bit for bit.
            z_q = z_q + part * (code >= 0)[:, None]
        return z_q
