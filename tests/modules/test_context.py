"""The context network computes in integers: equal to an integer reference, whatever the order."""

import copy

import numpy as np
import pytest
import torch
from support.context import codes_of, network_of

from taming.modules import context
from taming.modules.context import GROUPS, ContextNetwork, snap


def test_snapped_numbers_are_the_nearest_of_their_grid_and_pass_gradients() -> None:
    x = torch.randn(1000, requires_grad=True)
    found = snap(x, 3)
    assert torch.equal(found * 8, (found * 8).round()) and bool(((found - x).abs() <= 1 / 16).all())
    assert torch.equal(snap(torch.tensor([0.5, 1.5, -0.5]), 0), torch.tensor([1.0, 2.0, 0.0]))
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones(1000))


def test_each_site_is_told_after_neighbours_of_earlier_groups() -> None:
    """All but the first group have sent sites within reach on opposite sides."""
    plane = np.tile(np.array(GROUPS), (3, 3))
    for row, column in np.ndindex(4, 4):
        around = plane[row + 2 : row + 7, column + 2 : column + 7]
        sent = around < around[2, 2]
        assert np.array_equal(sent, sent[::-1, ::-1])
        assert sent.any() == (around[2, 2] > 0)


class Reference:
    """The network in int64, site by site, as its documentation has it."""

    def __init__(self, network: ContextNetwork) -> None:
        state = network.frozen().state_dict()
        fine = {k: v * 2 ** (10 if k in ("symbols", "inside") else 12) for k, v in state.items()}
        assert all(torch.equal(v, v.round()) for v in fine.values())
        self.values = {k: v.long().numpy() for k, v in fine.items()}
        self.limit = 16 << 10

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """In steps of 2**-22."""
        found = self.values[f"{name}.weight"] @ x
        return found + (self.values.get(f"{name}.bias", np.int64(0)) << 10)

    def activate(self, x: np.ndarray, least: int = 0) -> np.ndarray:
        return (np.clip(x, least << 12, self.limit << 12) + (1 << 11)) >> 12

    def features(self, plane: np.ndarray, row: int, column: int, turn: int, group: int):
        around = plane[row : row + 5, column : column + 5].reshape(-1)
        found = self.linear("look", np.clip(around, -self.limit, self.limit))
        found = self.activate(found + (self.values["step"][turn, group] << 10))
        wide = self.activate(self.linear("widen", found))
        return self.activate((found << 12) + self.linear("narrow", wide), -self.limit)

    def logits(self, codes: np.ndarray) -> list[np.ndarray]:
        """All logits of codes (h, w, T) in steps of 2**-22, sites in raster order in a group."""
        (h, w, turns), n_codes = codes.shape, self.values["codes.weight"].shape[0]
        plane = np.zeros((h + 4, w + 4, len(self.values["inside"])), np.int64)
        plane[2:-2, 2:-2] = self.values["inside"]
        found = []
        for turn in range(turns):
            for group in range(5):
                before, part = plane.copy(), ([], [])
                for row, column in np.ndindex(h, w):
                    if GROUPS[row % 4][column % 4] != group or (
                        turn and codes[row, column, turn - 1] < 0
                    ):
                        continue
                    code = codes[row, column, turn]
                    features = self.features(before, row, column, turn, group)
                    if turn:
                        part[0].append(np.array([0, self.linear("going", features)[turn]]))
                    if code >= 0:
                        shares = self.values["shares"][turn] << 10
                        part[1].append(self.linear("codes", features) + shares)
                    plane[row + 2, column + 2] += self.values["symbols"][
                        turn, code if code >= 0 else n_codes
                    ]
                found += [np.stack(logits) for logits in part if logits]
        return found


def told_logits(network: ContextNetwork, codes: torch.Tensor) -> list[torch.Tensor]:
    """All logits of codes (h, w, T), as `ContextNetwork.walk` sends them."""
    found = []

    def send(logits: torch.Tensor, wanted: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        found.append(logits)
        return wanted

    symbols = torch.where(codes < 0, network.n_codes, codes)[None]
    list(network.walk(symbols, send))
    return [logits for logits in found if len(logits)]


@pytest.mark.parametrize("grid", [(6, 5), (1, 1), (4, 9)])
def test_float64_equals_int64(grid: tuple[int, int]) -> None:
    network, codes = network_of(16, 3), codes_of(grid, 3, 16)
    found = told_logits(network.frozen(), codes)
    wanted = Reference(network).logits(codes.numpy())
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal((ours * 2**22).numpy(), theirs)


def test_logits_are_those_of_any_split_thread_count_and_batch(monkeypatch) -> None:
    network, codes = network_of(16, 3).frozen(), codes_of((9, 10), 3, 16)
    whole = told_logits(network, codes)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found = told_logits(network, codes)
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))
    torch.set_num_threads(threads)
    monkeypatch.setattr(context, "_AT_ONCE", 3)
    split = [logits.flatten() for logits in told_logits(network, codes)]
    assert len(split) > len(whole)
    assert torch.equal(torch.cat(split), torch.cat([logits.flatten() for logits in whole]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_are_those_of_a_gpu() -> None:
    network, codes = network_of(1024, 3).frozen(), codes_of((33, 40), 3, 1024)
    ours, theirs = told_logits(network, codes), told_logits(network.cuda(), codes.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fixed", [False, True])
def test_nats_are_those_of_the_logits_told(fixed: bool) -> None:
    network = network_of(16, 3, fixed_length=fixed)
    codes, other = (codes_of((6, 5), 3, 16, seed).clamp(min=0 if fixed else -1) for seed in (0, 1))
    nats = torch.zeros((), dtype=torch.float64)

    def send(logits: torch.Tensor, wanted: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        nats.add_(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        return wanted

    symbols = torch.where(codes < 0, 16, codes)
    with torch.no_grad():
        list(network.frozen().walk(symbols[None], send))
        both = network.frozen().nats(torch.stack([codes, other]))
        rough = network.nats(codes[None])
    torch.testing.assert_close(both[0], nats)
    torch.testing.assert_close(rough[0].double(), nats, rtol=1e-3, atol=0)


def test_training_lowers_the_nats_of_what_depends_on_its_neighbours() -> None:
    torch.manual_seed(0)
    network = ContextNetwork(4, 2, channels=8, hidden=16)
    plain = torch.randint(4, (8, 1, 1, 1)).expand(8, 6, 6, 2)  # all codes of an image are one
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        network.nats(plain).mean().backward()
        optimizer.step()
    order_0 = 6 * 6 * 2 * np.log(4)
    assert float(network.nats(plain).mean().detach()) < 0.5 * order_0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_what_could_be_inexact_is_refused() -> None:
    network = network_of(16, 3)
    with pytest.raises(ValueError, match="call eval"):
        copy.deepcopy(network).train().frozen()
    for name, value in (("codes.weight", 1e9), ("symbols", 1e14), ("narrow.bias", 1e12)):
        large = copy.deepcopy(network)
        with torch.no_grad():
            large.get_parameter(name).view(-1)[0] = value
        with pytest.raises(ValueError, match="too large"):
            large.frozen()
        with torch.no_grad():
            large.get_parameter(name).view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=rf"{name} .* not finite"):
            large.frozen()
    with pytest.raises(ValueError, match="bits=40"):
        ContextNetwork(16, 3, 8, 16, bits=40).eval().frozen()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ContextNetwork(0, 3)


def test_nats_of_few_digits_are_summed_in_many() -> None:
    network, codes = ContextNetwork(16, 1, channels=4, hidden=8), torch.randint(16, (1, 32, 32, 1))
    exact = network.nats(codes)
    found = network.bfloat16().nats(codes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
