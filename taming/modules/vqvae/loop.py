"""The loop of one site: the path of a latent, the searches along it, and the transform of a turn.

A latent z goes round the loop for at most T turns, n = 0..T-1. With r_0 = z, turn n is::

    k_n     = argmin_k |r_n - M_n e_k|          the nearest code wins
    d_n     = |r_n - M_n e_{k_n}|               how far r_n is from that code
    d_n <= tau, or n = T-1:  write k_n and end  here the site ends
    otherwise:               write a code, transform r_n to r_{n+1}, go round again

    Attract  writes D,    r_{n+1} = r_n + step (e_{k_n} - r_n),  z_q = e_{k_n},            M_n = 1
    Cascade  writes k_n,  r_{n+1} = r_n - M_n e_{k_n},           z_q = sum_n M_n e_{k_n},  M_0 = 1

At a price of codes, a Cascade takes the least ``|r_n - M_n e_k|^2`` + price instead (see `walk`).

The path does not depend on the threshold tau, which only decides where it is cut: `Path` lists, for
every turn, the codes if the site ended there; `lengths_within` finds the first within tau.

A transform implements these turns as three methods:

- ``search``: latents -> path, without gradient: argmin has none. All K codes compete in every
  turn, so most of the time is spent here; it stops once every site has ended. A beam keeps several
  partial paths, so the codes up to turn n need not be the beginning of those up to turn n+1.
- ``retrace``: latents and codes -> searches, with the graph of the codebook. The path is known by
  now, so a turn costs a lookup. It lists query, code and target of each turn that a site took. The
  loss, the codebook's averages and revival, and the transform itself learn from this list.
- ``compose``: codes -> vectors, since a decoder has only codes. The quantizer's ``forward`` takes
  z_q from here too, not from z minus the last residual: decoding then repeats the same sums in the
  same order and gives the same z_q, bit for bit.

Codes are 0..K-1 for a codebook vector, K for the dummy D ("transformed, went round again") and -1
after the end.

Axis letters: N latents, D channels, K codes, T turns, M searches, P partial paths.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.base import Part
from taming.modules.vqvae.checks import ABSENT
from taming.modules.vqvae.entropy import Price
from taming.modules.vqvae.nearest import cheapest_codes, nearest_codes
from taming.modules.vqvae.paths import Path, Searches
from taming.util import instantiate_with_sizes

DepthShape = tuple[int, int] | None  # (T, D)
RESIDUAL: Mapping[str, Any] = {"target": "taming.modules.vqvae.transforms.Residual"}


class Transform(Part, ABC):
    """One turn of the loop and its inverse.

    Args:
        depth_embedding: (T, D) of learned vectors b_n, started at zero and added to z_q according
            to the number of turns n, which lets the decoder see the length; None for none. In a
            quantizer's ``transform_config``, true stands for its sizes.

    Attributes:
        dummies: True if a site reads ``D,D,A'`` (dummies, then its one code); False if every turn
            writes a code (``A1,A2,A3``).
    """

    dummies: bool
    depth: nn.Parameter | None

    def __init__(self, depth_embedding: DepthShape = None) -> None:
        super().__init__()
        start = None if depth_embedding is None else nn.Parameter(torch.zeros(*depth_embedding))
        self.register_parameter("depth", start)

    @abstractmethod
    def search(
        self,
        z: Tensor,
        codebook: Tensor,
        threshold: Tensor,
        max_loops: int,
        price: Price | None = None,
    ) -> Path:
        """Find the path of each latent, at least to the turn that is within the threshold.

        Args:
            z: (N, D) float32 latents; not changed.
            codebook: (K, D) float32.
            threshold: (N,) float32, Euclidean distance in the space of z at which a loop ends.
            max_loops: T; the last turn ends every loop.
            price: Of codes, added to the squared distance by which they are chosen. A transform
                with ``dummies`` never gets one.

        Returns:
            The path, without gradient.
        """

    @abstractmethod
    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the searches by which latents z (N, D) got their codes (N, T), with gradient."""

    @abstractmethod
    def mean_square(self, path: Path, lengths: Tensor) -> Tensor | None:
        """Mean of ``|z - z_q|^2``, a scalar, over searches of a path that ends at lengths (N,).

        None if it takes a `retrace`.
        """

    @abstractmethod
    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into the vectors (N, D) that they stand for, with gradient."""

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Turn valid codes (N, T) into z_q (N, D): `compose`, plus the depth embedding if any."""
        z_q = self.compose(codes, codebook)
        return z_q if self.depth is None else z_q + self.depth[(codes >= 0).sum(dim=1) - 1]

    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Map codes (K, D) as a turn sees them, or raise a ValueError if it sees no such codes."""
        raise ValueError(
            f"{type(self).__name__} has no codes of a turn: rate_weight has no meaning"
        )

    def loop_tables(self, codebook: Tensor) -> dict[str, Tensor]:
        """Return what its turns need outside of torch (`taming.modules.vqvae.numpy_loop`).

        Raises:
            ValueError: They take more than tables.
        """
        raise ValueError(f"the turns of a {type(self).__name__} cannot be made by tables alone")

    def initialize(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Initialize the transform's statistics from a first batch; by default, nothing.

        Args:
            z: (N, D) latents of the batch.
            searches: The searches made for them.
            codebook: (K, D).
        """

    def learn(self, z: Tensor, searches: Searches, codebook: Tensor) -> None:
        """Update the transform's statistics from a training batch; arguments of `initialize`."""


class Cascade(Transform):
    """Subtract the nearest code and go on with the residual: r <- r - M_n e_k, writing k.

    All codes compete again in each turn, which sees the one codebook through a linear map M_n of
    its own, since residuals have another size and shape than latents. The distance is
    ``|z - z_q|``, so the threshold bounds the error of every site that ends before the last turn.
    With M_n = 1 this is residual quantization with a shared codebook (Lee et al. 2022,
    arXiv:2203.01941).

    Args:
        max_loops: T.
        depth_embedding: (T, D) of the depth embedding; None for none.
        beam: Partial paths kept per latent in each turn. 1 takes the nearest code, and a shorter
            path is then the beginning of a longer one; more finds better paths, at that many times
            the cost of the search. At least 1.
    """

    dummies = False

    def __init__(self, max_loops: int, depth_embedding: DepthShape = None, beam: int = 1) -> None:
        super().__init__(depth_embedding)
        if beam < 1:
            raise ValueError(f"beam must be at least 1, got {beam}")
        self.max_loops, self.beam = max_loops, beam

    def loop_tables(self, codebook: Tensor) -> dict[str, Tensor]:
        """Return the codebook as each turn sees it, (T, K, D)."""
        if self.beam > 1:
            raise ValueError(f"the loop outside of torch keeps one path, not a beam of {self.beam}")
        turns = range(self.max_loops)
        return {"codebooks": torch.stack([self.project(codebook, turn) for turn in turns])}

    @abstractmethod
    def project(self, codebook: Tensor, turn: int) -> Tensor:
        """Map codes (K, D) as a turn sees them: M_n e."""

    @abstractmethod
    def backproject(self, errors: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Map errors (M, D) of a turn to its codes: M_n^T times them, and ``|M_n|^2 / D``."""

    @torch.no_grad()
    def search(
        self,
        z: Tensor,
        codebook: Tensor,
        threshold: Tensor,
        max_loops: int,
        price: Price | None = None,
    ) -> Path:
        """Find the path of each latent; a turn searches only those still in the loop."""
        ends = 1 if self.beam == 1 else max_loops
        codes = torch.full((z.shape[0], ends, max_loops), ABSENT, device=z.device)
        distances = z.new_full((z.shape[0], max_loops), math.inf)
        sites, residual = torch.arange(z.shape[0], device=z.device), z[:, None]  # (N,), (N, 1, D)
        written = torch.empty(z.shape[0], 1, 0, dtype=torch.int64, device=z.device)
        for turn in range(max_loops):
            seen = self.project(codebook, turn)
            own = None if price is None else price.of_sites(sites)
            residual, written, distance = self._extend_beam(residual, written, seen, own)
            codes[sites, turn % ends, : turn + 1] = written[:, 0]  # the best of the beam
            distances[sites, turn] = distance[:, 0]
            if torch.compiler.is_compiling() or turn == max_loops - 1:
                continue  # a graph takes every turn, which changes no code of a cut path
            on = (distance[:, 0] > threshold[sites]).nonzero().squeeze(1)
            if len(on) == 0:
                break
            if len(on) < len(sites):
                sites, written, residual = sites[on], written[on], residual[on]
        return Path(codes, distances)

    def _extend_beam(
        self, residual: Tensor, written: Tensor, seen: Tensor, price: Price | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Extend each latent's P partial paths by a code; keep the best P' of them, <= ``beam``.

        Args:
            residual: (N, P, D).
            written: (N, P, n) int64, the codes of each path.
            seen: (K, D), the codebook as this turn sees it.
            price: Of codes, for these latents; None for none.

        Returns:
            Residuals (N, P', D), codes (N, P', n + 1) and distances (N, P'), the best first.
        """
        latents, paths, channels = residual.shape
        each = min(self.beam, len(seen))
        # No path can have more than ``beam`` survivors, so its best codes suffice.
        vectors = residual.flatten(0, 1)
        if price is None:
            found = nearest_codes(vectors, seen, k=each)
        else:
            weight = price.weight.repeat_interleave(paths)
            found = cheapest_codes(vectors, seen, price.codes[written.shape[2]], weight, k=each)
        found = found.view(latents, paths, each)
        left = residual[:, :, None] - F.embedding(found, seen)  # (N, P, each, D)
        distance = torch.linalg.vector_norm(left, dim=-1)  # (N, P, each)
        if paths == each == 1:
            return left[:, 0], torch.cat([written, found], dim=2), distance[:, 0]
        cost = distance if price is None else distance**2 + price.of_paths(written, found)
        kept = min(self.beam, paths * each)
        best = cost.flatten(1).topk(kept, largest=False).indices  # (N, P')
        distance = distance.flatten(1).gather(1, best)
        code = found.flatten(1).gather(1, best)  # (N, P')
        residual = left.flatten(1, 2).gather(1, best[..., None].expand(-1, -1, channels))
        parent = (best // each)[..., None]  # (N, P', 1), the path that each one extends
        written = written.gather(1, parent.expand(-1, -1, written.shape[2]))  # (N, P', n)
        written = torch.cat([written, code[..., None]], dim=2)
        return residual, written, distance

    def mean_square(self, path: Path, lengths: Tensor) -> Tensor | None:
        """Average the squared distances; of a beam, they are those of other paths."""
        if self.beam > 1:
            return None
        turn = torch.arange(path.distances.shape[1], device=lengths.device)  # (T,)
        squares = path.distances.square().where(turn < lengths[:, None], 0)
        return squares.sum() / lengths.sum()

    def retrace(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Searches:
        """List the searches of each latent, one turn after the other, with gradient."""
        sites, query, sums = torch.arange(z.shape[0], device=z.device), z, torch.zeros_like(z)
        searches = []
        for turn in range(self.max_loops):
            found = codes[sites, turn]
            # Detached: the loop is greedy, so a turn's error moves that turn's code alone.
            before = sums.detach()
            on = (found >= 0).nonzero().squeeze(1)
            if torch.compiler.is_compiling() or len(on) < len(sites):
                sites, found, query, before = sites[on], found[on], query[on], before[on]  # M
            sums = before + F.embedding(found, self.project(codebook, turn))
            # A code moves toward its target down the gradient of |z - z_q|^2.
            error = z[sites] - sums.detach()
            pulls, weight = self.backproject(error, turn)
            targets = F.embedding(found, codebook.detach()) + pulls / weight
            columns = (torch.full_like(sites, turn), query, found, sums, targets)
            searches.append((sites, *columns, weight.expand(sites.shape[0])))
            query = error
        return Searches(*(torch.cat(column) for column in zip(*searches, strict=True)))

    def compose(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Sum the codes (N, T) of each site as their turns saw them: (N, D), with gradient."""
        z_q = F.embedding(codes[:, 0], self.project(codebook, 0))  # (N, D)
        for turn, code in enumerate(codes[:, 1:].unbind(1), start=1):
            part = F.embedding(code.clamp(min=0), self.project(codebook, turn))  # (N, D)
            # Where the site has ended, zero is added, which leaves its sum bit for bit.
            z_q = torch.addcmul(z_q, part, (code >= 0).to(part)[:, None])
        return z_q


def build_transform(config: Mapping[str, Any] | None, max_loops: int, e_dim: int) -> Transform:
    """Build a transform from ``{target, params}`` with T and D filled in; None is `Residual`."""
    config = config or RESIDUAL
    sizes: dict[str, Any] = {"max_loops": max_loops, "e_dim": e_dim}
    params = dict(config.get("params") or {})
    if depth := params.pop("depth_embedding", None):
        sizes["depth_embedding"] = (max_loops, e_dim)
        params["depth_embedding"] = (max_loops, e_dim) if depth is True else tuple(depth)
    return instantiate_with_sizes({**config, "params": params}, sizes)
