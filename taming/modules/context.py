"""A small causal network over codes that gives the same frequencies on every machine.

A range decoder needs each frequency exactly as the encoder had it, but floating-point sums differ
between machines, thread counts and batches in the last bit. So all numbers of this network lie on
binary grids: inputs and activations are multiples of 2**-10, weights of 2**-12, their products of
2**-22. In float64 every sum of less than 2**53 steps of its grid is exact, in whatever order it is
taken, and `ContextNetwork.frozen` refuses weights with which a sum could be larger. Nonlinearities
are clamps and roundings, and frequencies follow from integers of a table. In training, the same
lines run in float32, and gradients pass the roundings unchanged (straight-through, Bengio et al.
2013, arXiv:1308.3432).

Codes are sent turn by turn, and a turn in five groups of sites: of every 4 x 4 sites the first,
then the one between four that are known, and so on down to half of all sites (``GROUPS``). A group
is predicted in one pass, from all turns before and the groups before it.

Axis letters: B images, h w grid, S = B h w sites, T turns, K codes, C channels of a site, H of a
hidden layer, P places of the padded grids, N sites sent together, V values of a symbol.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.recorded import Recorded

GROUPS = ((0, 4, 2, 4), (4, 3, 4, 3), (2, 4, 1, 4), (4, 3, 4, 3))
_N_GROUPS = max(max(row) for row in GROUPS) + 1
REACH = 2  # sites seen to each side
_LIMIT = 16.0  # of activations
_AT_ONCE = 2048  # sites, which bounds the memory of a large picture

# Logits (N, V), the values wanted (N,) or -1, and images (N,) -> the values sent (N,).
Send = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Snap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return (x * scale + 0.5).floor_() / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def snap(x: Tensor, bits: int) -> Tensor:
    """Round to the nearest multiple of 2**-bits, halves up; the gradient passes unchanged."""
    return _Snap.apply(x, 2.0**bits)  # type: ignore[return-value]


class _Layout(NamedTuple):
    """Where the sites of images stand, in raster order.

    Attributes:
        place: (S,) int64, row of the padded plane (P, C).
        group: (S,) int64, in 0..4.
        image: (S,) int64, number of the image.
        seen: (25,) int64, what to add to a place for those that a site sees.
    """

    place: Tensor
    group: Tensor
    image: Tensor
    seen: Tensor

    def by_group(self, sites: Tensor) -> list[Tensor]:
        """Split sites (N,) by their group, in the order in which they are sent."""
        group = self.group[sites]
        return [sites[group == number] for number in range(_N_GROUPS)]


def _layout(batch: int, h: int, w: int, device: torch.device) -> _Layout:
    rows, columns = h + 2 * REACH, w + 2 * REACH
    places = torch.arange(batch * rows * columns, device=device).view(batch, rows, columns)
    place = places[:, REACH:-REACH, REACH:-REACH].flatten()
    pattern = torch.tensor(GROUPS, device=device)
    group = pattern.repeat(-(-h // 4), -(-w // 4))[:h, :w].expand(batch, h, w).flatten()
    step = torch.arange(-REACH, REACH + 1, device=device)
    image = torch.arange(batch, device=device).repeat_interleave(h * w)
    return _Layout(place, group, image, (step[:, None] * columns + step).flatten())


def _nats_of(logits: Tensor, values: Tensor) -> Tensor:
    """Return -log p (N,) of values (N,) by logits (N, V)."""
    return F.cross_entropy(logits.to(_summed_in(logits)), values, reduction="none")


def _summed_in(values: Tensor) -> torch.dtype:
    """Return the dtype in which values are summed: float32, or their own if it has more digits."""
    return torch.promote_types(values.dtype, torch.float32)


class ContextNetwork(Recorded, nn.Module):
    """Frequencies of each code and of going on, given the codes sent before.

    A site is the sum of vectors of its symbols so far. A first layer looks at 5 x 5 sites; a second
    one refines what it found.

    Args:
        n_codes: K, number of codes, each of which a turn can write.
        max_loops: T, most turns of a site.
        channels: C.
        hidden: H.
        bits: Inputs and activations are multiples of 2**-bits; weights are 4 times finer.
        fixed_length: True if every site takes T turns, so that going on needs no symbols.

    Raises:
        ValueError: A size is out of range.

    Example:
        >>> network = ContextNetwork(n_codes=16, max_loops=2, channels=8, hidden=16)
        >>> codes = torch.randint(16, (3, 5, 7, 2))
        >>> network.nats(codes).shape  # -log p of each image
        torch.Size([3])
    """

    def __init__(
        self,
        n_codes: int,
        max_loops: int,
        channels: int = 32,
        hidden: int = 128,
        bits: int = 10,
        fixed_length: bool = False,
    ) -> None:
        super().__init__()
        if min(n_codes, max_loops, channels, hidden) < 1:
            raise ValueError(
                "n_codes, max_loops, channels and hidden must be at least 1, got "
                f"{n_codes}, {max_loops}, {channels} and {hidden}"
            )
        self.n_codes, self.max_loops, self.bits = n_codes, max_loops, bits
        self.fixed_length = fixed_length
        # Of each turn: the codes, and K for a site that does not take it.
        self.symbols = nn.Parameter(0.3 * torch.randn(max_loops, n_codes + 1, channels))
        self.inside = nn.Parameter(0.3 * torch.randn(channels))  # places beside the grid are 0
        self.step = nn.Parameter(torch.zeros(max_loops, _N_GROUPS, hidden))
        self.look = nn.Linear((2 * REACH + 1) ** 2 * channels, hidden, bias=False)
        self.widen = nn.Linear(hidden, 2 * hidden)
        self.narrow = nn.Linear(2 * hidden, hidden)
        self.going = nn.Linear(hidden, max_loops)
        self.codes = nn.Linear(hidden, n_codes, bias=False)
        self.shares = nn.Parameter(torch.zeros(max_loops, n_codes))  # logits without a context

    # --- exactness -------------------------------------------------------------------------------

    def frozen(self) -> ContextNetwork:
        """Return a copy for coding: in float64, on the CPU or where this one is, without gradient.

        Raises:
            ValueError: This one is in training mode, a weight is not finite, or with some codes a
                sum could be inexact.
        """
        if self.training:
            raise ValueError("a ContextNetwork in training mode cannot code: call eval() first")
        network = copy.deepcopy(self).requires_grad_(False).double()
        for name, value in network.named_parameters():
            if not value.isfinite().all():
                raise ValueError(f"the weights {name} of the ContextNetwork are not finite")
            value.copy_(snap(value, self.bits if name in ("symbols", "inside") else self.bits + 2))
        if network._largest_sum() >= 2.0**52:
            raise ValueError(
                "the weights of the ContextNetwork are too large, or its grids too fine, for exact "
                f"sums in float64: bits={self.bits}"
            )
        return network

    def _largest_sum(self) -> float:
        """Bound every sum of snapped weights, in steps of its grid."""
        plane = self.inside.abs() + self.symbols.abs().amax(dim=1).sum(dim=0)  # (C,)
        sums = [float(plane.max()) * 2.0**self.bits]
        for name, extra in (
            ("look", self.step),
            ("widen", self.widen.bias),
            ("narrow", self.narrow.bias.abs() + _LIMIT),
            ("going", self.going.bias),
            ("codes", self.shares),
        ):
            inputs = _LIMIT * self.get_parameter(f"{name}.weight").abs().sum(dim=1).max()
            sums.append(float(inputs + extra.abs().max()) * 2.0 ** (2 * self.bits + 2))
        return max(sums)

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Apply a layer with its weights on their grid."""
        bias = None if layer.bias is None else snap(layer.bias, self.bits + 2)
        return F.linear(x, snap(layer.weight, self.bits + 2), bias)

    def _activate(self, x: Tensor, least: float = 0.0) -> Tensor:
        return snap(x.clamp(least, _LIMIT), self.bits)

    # --- a pass ----------------------------------------------------------------------------------

    def _start(self, batch: int, h: int, w: int) -> Tensor:
        """Return the padded plane (P, C) of which nothing is sent."""
        inside = snap(self.inside, self.bits).expand(batch, h, w, -1)
        return F.pad(inside, (0, 0, *4 * [REACH])).flatten(0, 2)

    def _vectors(self, symbols: Tensor, turn: int) -> Tensor:
        """Return the vectors (N, C) of symbols (N,) of a turn."""
        return snap(F.embedding(symbols, self.symbols[turn]), self.bits)

    def _see(self, plane: Tensor, layout: _Layout, sites: Tensor, turn: int, group: int) -> Tensor:
        """Return the features (N, H) of sites (N,), given the plane (P, C) of all that is sent."""
        around = layout.place[sites][:, None] + layout.seen  # (N, 25)
        patches = F.embedding(around, plane).flatten(1)  # (N, 25 C)
        found = self._linear(self.look, patches.clamp(-_LIMIT, _LIMIT))
        found = self._activate(found + snap(self.step[turn, group], self.bits + 2))  # (N, H)
        refined = self._linear(self.narrow, self._activate(self._linear(self.widen, found)))
        return self._activate(found + refined, -_LIMIT)  # (N, H)

    def _going_logits(self, features: Tensor, turn: int) -> Tensor:
        """Return logits (N, 2) of ending before a turn, and of taking it."""
        logit = self._linear(self.going, features)[:, turn]
        return torch.stack([torch.zeros_like(logit), logit], dim=1)

    def _code_logits(self, features: Tensor, turn: int) -> Tensor:
        """Return logits (N, K) of the code of a turn."""
        return self._linear(self.codes, features) + snap(self.shares[turn], self.bits + 2)

    # --- codes -----------------------------------------------------------------------------------

    def nats(self, codes: Tensor) -> Tensor:
        """Measure -log p of codes (B, h, w, T) int64, lengths included: (B,) in nats."""
        batch, h, w, _ = codes.shape
        layout = _layout(batch, h, w, codes.device)
        symbols = torch.where(codes < 0, self.n_codes, codes).flatten(0, 2)  # (S, T)
        plane = self._start(batch, h, w)
        group_at = layout.group.new_zeros(len(plane)).index_copy(0, layout.place, layout.group)
        nats = plane.new_zeros(batch, dtype=_summed_in(plane))
        alive = torch.arange(len(symbols), device=codes.device)
        for turn in range(self.max_loops):
            vectors = self._vectors(symbols[alive, turn], turn)
            after = plane.index_add(0, layout.place[alive], vectors)
            for group, sites in enumerate(layout.by_group(alive)):
                sent = torch.where((group_at < group)[:, None], after, plane)  # (P, C)
                features = self._see(sent, layout, sites, turn, group)
                wanted, image = symbols[sites, turn], layout.image[sites]
                on = wanted < self.n_codes
                if turn and not self.fixed_length:
                    logits = self._going_logits(features, turn)
                    nats = nats.index_add(0, image, _nats_of(logits, on.long()))
                logits = self._code_logits(features[on], turn)
                nats = nats.index_add(0, image[on], _nats_of(logits, wanted[on]))
            plane, alive = after, alive[symbols[alive, turn] < self.n_codes]
        return nats

    def walk(self, symbols: Tensor, send: Send) -> Iterator[Tensor]:
        """Go through codes as they are sent: turn by turn, group by group.

        Of each group, ``send`` is called for who takes the turn (values 1 and 0; all take the first
        one, and every one at a fixed length), then, for some sites at once, for the codes of those
        that do, both in raster order.

        Args:
            symbols: (B, h, w, T) int64, or fewer turns: codes, K after a site's end, -1 for what is
                not known.
            send: Called with logits (N, V), the values wanted (N,) int64, -1 for what is not known,
                and the number (N,) of the image of each; returns the values (N,) int64.

        Yields:
            The symbols (B, h, w) of each turn that a site can take.
        """
        batch, h, w, turns = symbols.shape
        layout, symbols = _layout(batch, h, w, symbols.device), symbols.flatten(0, 2)
        plane = self._start(batch, h, w)
        alive = torch.arange(len(symbols), device=symbols.device)
        for turn in range(turns):
            if not len(alive):
                return
            sent = torch.full_like(symbols[:, turn], self.n_codes)  # (S,)
            for group, sites in enumerate(layout.by_group(alive)):
                parts = sites.split(_AT_ONCE)
                features = torch.cat([self._see(plane, layout, p, turn, group) for p in parts])
                wanted, image = symbols[sites, turn], layout.image[sites]
                on = torch.ones_like(sites, dtype=torch.bool)
                if turn and not self.fixed_length:
                    going = torch.where(wanted < 0, -1, (wanted < self.n_codes).long())
                    on = send(self._going_logits(features, turn), going, image) == 1
                for some in on.nonzero()[:, 0].split(_AT_ONCE):
                    logits = self._code_logits(features[some], turn)
                    sent[sites[some]] = send(logits, wanted[some], image[some])
                plane = plane.index_add(0, layout.place[sites], self._vectors(sent[sites], turn))
            yield sent.view(batch, h, w)
            alive = alive[sent[alive] < self.n_codes]
