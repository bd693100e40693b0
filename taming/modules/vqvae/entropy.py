"""Bits of a loop's codes and lengths, by running shares of what has been written.

Axis letters: B images, N sites, K codes, T turns, P partial paths, k candidates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.distributed import sum_over_ranks
from taming.modules.util import count_codes

UNIFORM = 0.01  # weight of the uniform share: what was never seen has finite bits


class Price(NamedTuple):
    """What a code costs in a search, in squared distance.

    Attributes:
        codes: (T, K) float32, bits of each code at each turn.
        weight: (N,) float32, squared distance that is worth a bit, of each site.
    """

    codes: Tensor
    weight: Tensor

    def of_sites(self, sites: Tensor) -> Price:
        """Choose some sites (M,)."""
        return Price(self.codes, self.weight[sites])

    def of_paths(self, written: Tensor, found: Tensor) -> Tensor:
        """Add up partial paths (N, P, n) and their candidates (N, P, k): costs (N, P, k)."""
        turn = written.shape[2]
        before = self.codes[torch.arange(turn, device=written.device), written].sum(dim=2)
        return self.weight[:, None, None] * (before[..., None] + self.codes[turn][found])

    def expected_bits(self, residual: Tensor, seen: Tensor, turn: int) -> Tensor:
        """Bits of a turn, if its code k is drawn with probability q_k, with gradient.

        ``q_k ~ 2^-(|r - M e_k|^2 / weight + bits_k)``, the assignment of least distance at a rate
        (Blahut 1972): nearly the code taken, and soft where others are about as good.

        Args:
            residual: (M, D) float32, r of each site.
            seen: (K, D) float32, the codebook as this turn sees it.
            turn: Which turn, in [0, T).

        Returns:
            (M,) float32.
        """
        bits = self.codes[turn]
        with torch.autocast(residual.device.type, enabled=False):
            mean = seen.mean(dim=0)  # far from the origin, digits would be lost
            residual, seen = residual - mean, seen - mean
            # |r|^2 is the same for all codes.
            nearness = 2 * residual @ seen.T - seen.square().sum(dim=1)  # (M, K)
            log2_share = nearness / self.weight.clamp(min=1e-20)[:, None] - bits
            return (log2_share * math.log(2)).softmax(dim=1) @ bits


class EntropyTables(nn.Module):
    """Order-0 statistics of the codes of loops: how often each is written at each turn.

    They start uniform, and are those of a checkpoint that has none. Codes at a threshold do not
    depend on them, only those chosen by rate.

    Args:
        n_e: K, number of codes.
        max_loops: T, most turns of a site.
        dummies: True if a site writes its one code at its last turn.

    Attributes:
        codes: (T, K) float32, share of each code among those written at a turn.
        going_on: (T,) float32, share of the sites of a turn that go on to the next; the last is 0.

    Example:
        >>> tables = EntropyTables(n_e=4, max_loops=2)
        >>> tables.bits(torch.tensor([[3, -1], [3, 0]])).tolist()  # log2(4) a code, 1 for going on
        [3.0, 5.0]
        >>> tables.count(torch.tensor([[3, -1]] * 1000), alpha=0.0)
        >>> bool(tables.bits(torch.tensor([[3, -1]])) < 0.1)
        True
    """

    codes: Tensor
    going_on: Tensor

    def __init__(self, n_e: int, max_loops: int, dummies: bool = False) -> None:
        super().__init__()
        self.n_e, self.max_loops, self.dummies = n_e, max_loops, dummies
        for name, value in self._uniform().items():
            self.register_buffer(name, value)

    @property
    def learned(self) -> bool:
        """True if the tables are no longer uniform."""
        uniform = self._uniform()
        return any(bool((v != uniform[name].to(v)).any()) for name, v in self.named_buffers())

    def code_bits(self) -> Tensor:
        """Bits of each code at each turn, (T, K) float32."""
        return -(self.codes.float() * (1 - UNIFORM) + UNIFORM / self.n_e).log2()

    def end_bits(self) -> Tensor:
        """Bits of ending at each turn and of going on, (T, 2) float32.

        At the last turn they are 0 and inf: there, every loop ends.
        """
        on = F.pad(self.going_on[:-1].float() * (1 - UNIFORM) + UNIFORM / 2, (0, 1))  # (T,)
        return -torch.stack([1 - on, on], dim=1).log2() + 0.0  # no -0

    def bits(self, codes: Tensor) -> Tensor:
        """Add up the bits of each site.

        Args:
            codes: (N, T) int64, valid codes.

        Returns:
            (N,) float32.
        """
        turn = torch.arange(self.max_loops, device=codes.device)
        each = self.code_bits()[turn, codes.clamp(0, self.n_e - 1)]  # (N, T)
        written = ((codes >= 0) & (codes < self.n_e)).to(each)
        end, on = self.end_bits().unbind(1)  # (T,)
        of_lengths = end + F.pad(on[:-1].cumsum(0), (1, 0))  # (T,)
        return (each * written).sum(dim=1) + of_lengths[(codes >= 0).sum(dim=1) - 1]

    def bits_of_images(self, codes: Tensor) -> Tensor:
        """Add up the bits of codes (B, ..., T): (B,) float64, on the CPU."""
        bits = self.bits(codes.reshape(-1, self.max_loops)).cpu().double()
        return bits.reshape(codes.shape[:-1]).flatten(1).sum(dim=1)

    # --- learning --------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, codes: Tensor, momentum: float) -> None:
        """Update the shares from a batch of all ranks.

        They are shares of running means of counts, so that a turn which few sites take is averaged
        over as many codes as one which all take, only over more batches.

        Args:
            codes: (N, T) int64.
            momentum: Weight of the old means.
        """
        found, taken = self._tally(codes)
        sites, going_on = taken[0].clamp(min=1), self.going_on.float()
        reached = F.pad(going_on[:-1].cumprod(0), (1, 0), value=1.0)  # (T,), of all sites
        written = reached * (1 - going_on) if self.dummies else reached
        found = torch.lerp(found / sites, written[:, None] * self.codes.float(), momentum)  # (T, K)
        taken = torch.lerp(taken / sites, reached, momentum)
        self._set(found, taken[:-1], taken[1:])

    @torch.no_grad()
    def count(self, codes: Tensor, alpha: float = 1.0) -> None:
        """Replace the tables by those of a data set's codes, of all ranks.

        To count tables for a rate, encode the data set at that rate, count, and do both again
        until the tables hardly move.

        Args:
            codes: (..., T) int64.
            alpha: Counts added to each code, and to ending and going on.
        """
        found, taken = self._tally(codes.reshape(-1, self.max_loops))
        self._set(found + alpha, taken[:-1] + 2 * alpha, taken[1:] + alpha)

    def _tally(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Count codes (T, K) and sites (T,) by turn, over all ranks, in codes (N, T)."""
        found = torch.stack([count_codes(column, self.n_e) for column in codes.unbind(1)])
        taken = (codes >= 0).sum(dim=0)
        total = sum_over_ranks(torch.cat([found, taken[:, None]], dim=1)).float()
        return total[:, :-1], total[:, -1]

    def _set(self, found: Tensor, taken: Tensor, went_on: Tensor) -> None:
        """Set shares to those of counts (T, K), (T - 1,) and (T - 1,), where there are any."""
        total = found.sum(dim=1, keepdim=True)
        shares = found / total.clamp(min=1e-20)
        self.codes.copy_(torch.where(total > 0, shares, self.codes.float()))
        on = went_on / taken.clamp(min=1e-20)
        self.going_on[:-1] = torch.where(taken > 0, on, self.going_on[:-1].float())

    # --- checkpoints -----------------------------------------------------------------------------

    def _uniform(self) -> dict[str, Tensor]:
        """Tables of one that has learned nothing."""
        codes = torch.full((self.max_loops, self.n_e), 1 / self.n_e, dtype=torch.float32)
        on = torch.full((self.max_loops,), 0.5, dtype=torch.float32)
        on[-1] = 0
        return {"codes": codes, "going_on": on}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load as `nn.Module` does; of a checkpoint from before there were tables, uniform ones."""
        uniform = {prefix + name: value for name, value in self._uniform().items()}
        if not uniform.keys() & state_dict.keys():
            state_dict = {**state_dict, **uniform}
        super()._load_from_state_dict(state_dict, prefix, *rest)
