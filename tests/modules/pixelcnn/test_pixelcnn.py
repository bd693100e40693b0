"""Laws of the PixelCNN: what sees what, that it is a distribution, and fast sampling = naive."""

from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.sampling import SAMPLERS
from taming.modules.pixelcnn.model import PixelCNN
from taming.modules.pixelcnn.site import SiteSymbols
from taming.modules.pixelcnn.stacks import GatedLayer, GatedStacks

H, W, K, T, CLASSES = 4, 5, 3, 3, 2
SITES = {
    "plain": SiteSymbols(K, 1, dummies=False),
    "attract": SiteSymbols(K, T, dummies=True),
    "residual": SiteSymbols(K, T, dummies=False),
    "fixed": SiteSymbols(K, T, dummies=False, fixed_length=True),
}
every_kind = pytest.mark.parametrize("kind", list(SITES))
every_kernel = pytest.mark.parametrize("kernel_size", [3, 5])


def stacks(layers: int = 2, kernel_size: int = 3) -> GatedStacks:
    """Random stacks in float64, so that equal means equal but for the last digits."""
    return GatedStacks(4, layers, kernel_size).double().eval()


def model(kind: str, layers: int = 2, kernel_size: int = 3) -> PixelCNN:
    return PixelCNN(SITES[kind], CLASSES, stacks(layers, kernel_size)).double().eval()


def all_sites(kind: str) -> Tensor:
    """Every code (N, T) that a site can have."""
    if kind == "plain":
        return torch.arange(K)[:, None]
    if kind == "fixed":
        return torch.tensor([*product(range(K), repeat=T)])
    sites = [
        [*([K] * (n - 1) if kind == "attract" else codes[: n - 1]), codes[-1], *[-1] * (T - n)]
        for n in range(1, T + 1)
        for codes in product(range(K), repeat=1 if kind == "attract" else n)
    ]
    return torch.tensor(sites)


def random_codes(kind: str, *shape: int) -> Tensor:
    sites = all_sites(kind)
    return sites[torch.randint(len(sites), shape)]


@pytest.mark.parametrize("stack", ["vertical", "horizontal"])
def test_dropout_of_each_stack_is_there_in_training_only(stack: str) -> None:
    layer = GatedLayer(4, kernel_size=3, dropout=0.5).eval()
    x, condition, above = torch.randn(2, 4, 4, 5), torch.randn(2, 4), torch.randn(2, 8, 4, 4)

    def passed() -> Tensor:
        return layer.down(x, condition)[0] if stack == "vertical" else layer.right(x, above)[1]

    assert torch.equal(passed(), passed())
    layer.train()
    assert not torch.allclose(passed(), passed())


@every_kind
def test_symbols_write_every_code_and_nothing_else(kind: str) -> None:
    site, codes = SITES[kind], all_sites(kind)
    symbols = site.of_codes(codes)
    assert torch.equal(site.to_codes(symbols), codes)
    assert len(symbols.unique(dim=0)) == len(codes)
    drawn = torch.tensor(list(product(*map(range, site.sizes))))
    assert torch.equal(site.to_codes(drawn).unique(dim=0), codes.unique(dim=0))


@every_kernel
def test_every_site_sees_all_sites_before_it_and_no_others(kernel_size: int) -> None:
    """With layers enough to reach across the grid: no blind spot, and nothing from after."""
    net = stacks(layers=6, kernel_size=kernel_size)
    x = torch.randn(1, 4, H, W, dtype=torch.float64)
    condition = torch.randn(1, 4, dtype=torch.float64)
    before = net(x, condition)
    for place in range(H * W):
        moved = x.clone()
        moved[:, :, place // W, place % W] += 1
        changed = (net(moved, condition) != before).any(dim=1).flatten()
        assert changed.tolist() == [later > place for later in range(H * W)]


@every_kind
def test_every_symbol_sees_only_what_comes_before_it(kind: str) -> None:
    net, labels = model(kind, layers=6), torch.zeros(1, dtype=torch.int64)
    sizes = SITES[kind].sizes
    symbols = torch.cat([torch.randint(size, (1, H, W, 1)) for size in sizes], dim=-1)
    count = len(sizes)

    def predictions(symbols: Tensor) -> list[Tensor]:
        """One for each symbol, in the order in which they are drawn."""
        logits = [part.flatten(0, 2) for part in net(symbols, labels)]
        return [part[place] for place in range(H * W) for part in logits]

    before = predictions(symbols)
    for place in range(H * W * count):
        moved = symbols.flatten().clone()
        moved[place] = (moved[place] + 1) % sizes[place % count]
        after = predictions(moved.view_as(symbols))
        changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert changed == [later > place for later in range(H * W * count)]


@every_kind
def test_the_likelihood_sums_to_one_over_all_codes(kind: str) -> None:
    net, sites = model(kind), all_sites(kind)
    grids = torch.stack([sites[list(ids)] for ids in product(range(len(sites)), repeat=2)])
    for grid in ((1, 2), (2, 1)):
        labels = torch.ones(len(grids), dtype=torch.int64)
        total = (-net.nll(grids.reshape(-1, *grid, sites.shape[1]), labels).double()).exp().sum()
        assert total.item() == pytest.approx(1.0, abs=1e-5)


@every_kind
def test_the_class_changes_every_prediction(kind: str) -> None:
    net, codes = model(kind), random_codes(kind, 1, H, W)
    one, other = (net(net.site.of_codes(codes), torch.tensor([label])) for label in (0, 1))
    assert all((a != b).any(dim=-1).all() for a, b in zip(one, other, strict=True))
    assert not torch.equal(*(net.nll(codes, torch.tensor([label])) for label in (0, 1)))


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1)


def write_naively(net: PixelCNN, codes: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Run the whole network for each symbol."""
    symbols = net.site.of_codes(codes)
    for row, column in product(range(H), range(W)):
        if known[row, column]:
            continue
        symbols[:, row, column] = -1
        for number in range(symbols.shape[-1]):
            logits = net(symbols, labels)[number][:, row, column]
            symbols[:, row, column, number] = multinomial(logits)
        site = net.site.to_codes(symbols[:, row, column])
        symbols[:, row, column] = net.site.of_codes(site)
    return net.site.to_codes(symbols)


def first_sites(amount: int) -> Tensor:
    return (torch.arange(H * W) < amount).view(H, W)


HOLES = torch.rand(H, W, generator=torch.Generator().manual_seed(4)) < 0.5
KNOWN = {
    **{f"first {amount}": first_sites(amount) for amount in (0, W - 1, 2 * W, 2 * W + 3, H * W)},
    **{"holes": HOLES, "holes below": HOLES | first_sites(W + 1)},
}


@every_kernel
@every_kind
@pytest.mark.parametrize("name", list(KNOWN))
def test_fast_sampling_equals_naive_sampling(kind: str, kernel_size: int, name: str) -> None:
    net, codes = model(kind, layers=3, kernel_size=kernel_size), random_codes(kind, 6, H, W)
    labels, known = torch.randint(CLASSES, (6,)), KNOWN[name]
    torch.manual_seed(1)
    expected = write_naively(net, codes.clone(), labels, known)
    torch.manual_seed(1)
    given, done = codes.masked_fill(~known[..., None], -1), []  # unknown codes are ignored
    before = given.clone()
    sampled = net.sample(given, labels, multinomial, known, lambda sites, _: done.append(sites))
    assert torch.equal(sampled, expected) and torch.equal(given, before)
    assert torch.equal(sampled[:, known], codes[:, known])
    unknown = (~known).flatten().nonzero()[:, 0].tolist() or [0, -1]  # known sites after are free
    assert done == list(range(unknown[0] + 1, unknown[-1] + 2))


@every_kind
def test_the_ways_that_the_benchmark_compares_draw_the_same_codes(kind: str) -> None:
    net, labels, sampled = model(kind, layers=3), torch.zeros(2, dtype=torch.int64), []
    for sample in SAMPLERS.values():
        torch.manual_seed(1)
        sampled.append(sample(net, torch.full((2, H, W, SITES[kind].max_loops), -7), labels))
    assert all(torch.equal(codes, sampled[0]) for codes in sampled[1:])


def test_the_vertical_stack_computes_each_row_once_and_the_horizontal_each_site_once() -> None:
    net, codes = model("residual"), random_codes("residual", 1, H, W)
    outputs = {"vertical": 0, "horizontal": 0}
    for name in outputs:

        def count(_module, _inputs, output: Tensor, name: str = name) -> None:
            outputs[name] += output.shape[2] * output.shape[3]

        getattr(net.stacks.layers[0], name).register_forward_hook(count)
    net.sample(codes, torch.zeros(1, dtype=torch.int64), multinomial)
    assert outputs == {"vertical": H * W, "horizontal": H * W}


@every_kind
def test_training_learns_what_stands_above(kind: str) -> None:
    """A grid whose rows repeat costs little more than its first row."""
    net = PixelCNN(SITES[kind], CLASSES, GatedStacks(16, 2))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    labels = torch.zeros(16, dtype=torch.int64)

    def repeating() -> Tensor:
        return random_codes(kind, 16, 1, W).expand(-1, H, -1, -1).contiguous()

    for _ in range(120):
        loss = net.nll(repeating(), labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = repeating()
    first = net.nll(codes[:, :1], labels).mean()
    assert net.nll(codes, labels).mean() < 1.3 * first


@pytest.mark.parametrize("wrong", [{"kernel_size": 4}, {"kernel_size": 1}, {"layers": 0}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be .*at least"):
        GatedStacks(**{"channels": 4, "layers": 1, **wrong})
