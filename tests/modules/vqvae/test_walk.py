"""Laws of rates by bits: each turn takes the code, and each site the end, of least J."""

import math

import pytest
import torch
from modules.vqvae.test_loopy import TRANSFORMS, D, K, T, loopy
from torch import Tensor

from taming.modules.vqvae.loop import Cascade
from taming.modules.vqvae.loopy import LoopyVectorQuantizer
from taming.modules.vqvae.nearest import cheapest_codes, nearest_codes
from taming.modules.vqvae.transforms import Attract

RATED = [name for name in TRANSFORMS if not name.startswith("attract")]
every_rated = pytest.mark.parametrize("transform", RATED)


def rated(transform: str = "residual", **kwargs) -> LoopyVectorQuantizer:
    """A small quantizer with tables and a spread that are not those of its start."""
    quantizer = loopy(transform, **kwargs)
    quantizer.latent_std.fill_(1.7)
    quantizer.entropy.codes.copy_(torch.rand(T, K).square().softmax(dim=1) ** 4)
    quantizer.entropy.codes /= quantizer.entropy.codes.sum(dim=1, keepdim=True)
    quantizer.entropy.going_on[:-1].uniform_(0.3, 0.9)
    return quantizer


def distortion(quantizer: LoopyVectorQuantizer, z: Tensor, codes: Tensor) -> Tensor:
    """|z - z_q|^2 / latent_std^2 of each site, z_q before a depth embedding."""
    z_q = quantizer.transform.compose(codes, quantizer.embedding.weight.detach())
    return (z - z_q).square().sum(dim=1) / quantizer.latent_std**2


def literal_walk(quantizer: LoopyVectorQuantizer, z: Tensor, rate: float) -> list[list[int]]:
    """The definition in float64, one latent, path and turn at a time."""
    codebook, transform = quantizer.embedding.weight.detach(), quantizer.transform
    assert isinstance(transform, Cascade)
    beam, spread = transform.beam, float(quantizer.latent_std) ** 2
    seen = [transform.project(codebook, turn).double() for turn in range(T)]
    bits, ends = quantizer.entropy.code_bits().double(), quantizer.entropy.end_bits().double()
    found = []
    for latent in z.double():
        paths, whole = [(0.0, latent, [])], []
        going = 0.0
        for turn in range(T):
            longer = []
            for spent, residual, written in paths:
                for code in range(K):
                    left = residual - seen[turn][code]
                    total = spent + float(bits[turn, code])
                    cost = float(left.square().sum()) / spread + rate * total
                    longer.append((cost, (total, left, [*written, code])))
            longer.sort(key=lambda entry: entry[0])
            cost, (_, _, written) = longer[0]
            whole.append((cost + rate * (going + float(ends[turn, 0])), written))
            going += float(ends[turn, 1])
            paths = [path for _, path in longer[:beam]]
        best = min(whole, key=lambda entry: entry[0])[1]
        found.append(best + [-1] * (T - len(best)))
    return found


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.2])
@every_rated
def test_a_rate_equals_the_literal_walk(transform: str, rate: float) -> None:
    quantizer, z = rated(transform), torch.randn(25, D)
    codes = quantizer(z, rate=rate).info.indices
    assert codes.tolist() == literal_walk(quantizer, z, rate)
    nearest = quantizer(z, max_codes=25 * T).info.indices
    assert not torch.equal(codes, nearest)


@every_rated
def test_rate_0_is_the_whole_path_cut_where_it_is_nearest(transform: str) -> None:
    quantizer, z = rated(transform), torch.randn(2, D, 6, 6)
    path = quantizer.whole_path(z)
    out = quantizer(z, rate=0.0)
    lengths = path.distances.argmin(dim=1) + 1
    assert torch.equal(out.info.encodings.lengths.flatten(), lengths)
    assert torch.equal(out.info.indices.flatten(0, 2), path.end_at(lengths))
    whole = quantizer(z, max_codes=36 * T).info.indices.flatten(0, 2)
    falling = (path.distances.diff(dim=1) < 0).all(dim=1)  # every turn comes nearer
    assert falling.any() and torch.equal(out.info.indices.flatten(0, 2)[falling], whole[falling])


@every_rated
def test_without_bits_that_differ_a_large_rate_is_one_turn_to_the_nearest_code(transform) -> None:
    quantizer, z = loopy(transform), torch.randn(2, D, 6, 6)
    codes = quantizer(z, rate=1e3).info.indices
    assert torch.equal(codes, quantizer(z, max_codes=36).info.indices)


@every_rated
def test_in_the_limit_every_site_has_the_cheapest_codes_there_are(transform: str) -> None:
    quantizer, z = rated(transform), torch.randn(1, D, 6, 6)
    tables = quantizer.entropy
    lengths = torch.arange(1, T + 1)
    cheapest = tables.code_bits().argmin(dim=1).expand(T, T)
    every_end = torch.where(lengths <= lengths[:, None], cheapest, -1)
    best = every_end[tables.bits(every_end).argmin()]
    codes = quantizer(z, rate=1e9).info.indices.flatten(0, 2)
    assert (best >= 0).sum() == 1  # of most tables: here, too
    assert (codes == best).all()


@every_rated
def test_a_larger_rate_has_fewer_bits_and_no_less_error_at_least_j(transform: str) -> None:
    quantizer, z = rated(transform), torch.randn(400, D)
    rates = [0.0, 0.01, 0.05, 0.2, 1.0]
    bits, errors = [], []
    for rate in rates:
        codes = quantizer(z, rate=rate).info.indices
        bits.append(quantizer.entropy.bits(codes).mean())
        errors.append(distortion(quantizer, z, codes).mean())
    assert all(a > b for a, b in zip(bits, bits[1:], strict=False))
    assert all(a < b for a, b in zip(errors, errors[1:], strict=False))


@every_rated
def test_rates_are_of_an_image_whatever_its_batch(transform: str) -> None:
    quantizer, z = rated(transform), torch.randn(4, D, 3, 3)
    rates = torch.tensor([0.0, 0.01, 0.1, 1.0])
    together = quantizer(z, rate=rates).info.indices
    alone = [quantizer(z[i : i + 1], rate=rates[i]).info.indices for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


@every_rated
def test_what_a_rate_chooses_decodes_exactly_and_is_traced(transform: str) -> None:
    quantizer, z = rated(transform), torch.randn(2, D, 4, 4)
    with torch.no_grad():
        plain = quantizer(z, rate=0.05)
    out = quantizer(z, rate=0.05)
    assert torch.equal(quantizer.get_codebook_entry(out.info.indices), out.z_q)
    trace, codes = out.info.encodings, out.info.indices
    assert torch.equal(trace.lengths, (codes >= 0).sum(dim=-1)) and trace.within.all()
    rows = z.movedim(1, 3).flatten(0, 2)
    error = distortion(quantizer, rows, codes.flatten(0, 2)).sqrt() * quantizer.latent_std
    torch.testing.assert_close(trace.distances.flatten(), error)
    torch.testing.assert_close(plain.loss, out.loss.detach())


# --- bits ----------------------------------------------------------------------------------------


@every_rated
def test_bits_are_never_above_the_target_and_close_to_it(transform: str) -> None:
    quantizer, z = rated(transform), torch.randn(6, D, 12, 12)
    least = quantizer.bits(quantizer(z, rate=1e9).info.indices)
    most = quantizer.bits(quantizer(z, rate=0.0).info.indices)
    share = torch.tensor([0.001, 0.2, 0.5, 0.8, 1.0, 1.5])
    target = least + share * (most - least)
    bits = quantizer.bits(quantizer(z, target_bits=target).info.indices)
    assert (bits <= target).all()
    assert (bits[1:4] > 0.97 * target[1:4]).all()
    assert torch.equal(bits[4:], most[4:])
    alone = [quantizer(z[i : i + 1], target_bits=float(target[i])).info.indices for i in range(6)]
    assert (torch.cat([quantizer.bits(codes) for codes in alone]) <= target).all()


def test_the_smallest_bits_that_can_be_reached_can_be_reached() -> None:
    quantizer, z = rated(), torch.randn(2, D, 5, 5)
    least = quantizer.bits(quantizer(z, rate=1e9).info.indices)
    found = quantizer(z, target_bits=least).info.indices
    assert torch.equal(quantizer.bits(found), least)
    with pytest.raises(ValueError, match=rf"less than the {float(least[1])} bits .* image 1"):
        quantizer(z, target_bits=torch.stack([least[0], least[1] - 1]))


def test_target_bits_walk_once_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, walks = rated(), []
    search = quantizer.transform.search

    def counted(*given, **price):
        walks.append(price)
        return search(*given, **price)

    monkeypatch.setattr(quantizer.transform, "search", counted)
    quantizer(torch.randn(3, D, 8, 8), target_bits=400.0)
    assert 3 <= len(walks) <= 14


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rate", "target_bits"])
def test_rates_that_make_no_sense_are_refused(name: str) -> None:
    z = torch.randn(2, D, 3, 3)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got {value}"):
            loopy()(z, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be one number or one for each of 2 images"):
        loopy()(z, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match=f"give one rate, got threshold and {name}"):
        loopy()(z, threshold=1.0, **{name: 1.0})
    for transform in ("attract", "attract-depth"):
        with pytest.raises(ValueError, match=f"Attract decodes .* nearer: {name} has no meaning"):
            loopy(transform)(z, **{name: 1.0})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rate_range": (0.0, 1.0)}, "rate_range must be two lambdas above 0, got"),
        ({"rate_range": (0.2, 0.1)}, "rate_range must be"),
        ({"rate_range": (0.1, math.inf)}, "rate_range must be"),
        ({"rate_range": (0.1,)}, "rate_range must be"),
        ({"rate_range": (0.1, 1.0), "length_range": (1.0, 2.0)}, "length_range or rate_range"),
        ({"rate": 0.1}, "one of threshold, target_length, rate"),
        ({"rate": -0.1, "threshold": None}, "rate must be a lambda of at least 0, got"),
        ({"rate": math.nan, "threshold": None}, "rate must be a lambda of at least 0, got"),
        ({"rate_weight": 0.1}, "rate_weight must be at least 0 and needs rate or rate_range"),
        ({"rate_weight": -1.0, "rate_range": (0.1, 1.0)}, "rate_weight must be at least 0"),
    ],
)
def test_ranges_of_rates_that_make_no_sense_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loopy(**kwargs)


def test_a_range_of_rates_needs_a_transform_with_rates() -> None:
    with pytest.raises(ValueError, match="Attract decodes .*rate_range has no meaning"):
        loopy("attract", rate_range=(0.1, 1.0))
    with pytest.raises(ValueError, match="Attract decodes .*rate has no meaning"):
        loopy("attract", rate=0.1, threshold=None)


class Stranger(Attract):
    """A transform that writes a code every turn, but not those of a mapped codebook."""

    dummies = False


def test_a_weight_of_bits_needs_a_transform_with_codes_of_a_turn() -> None:
    config = {"target": f"{__name__}.Stranger"}
    with pytest.raises(ValueError, match="Stranger has no codes of a turn: rate_weight"):
        LoopyVectorQuantizer(K, D, rate=0.1, rate_weight=1.0, transform_config=config)


@every_rated
def test_a_rate_of_its_own_is_that_rate_given(transform: str) -> None:
    quantizer = rated(transform, rate=0.03, threshold=None)
    given = loopy(transform)
    state = {k: v for k, v in quantizer.state_dict().items() if k != "threshold"}
    given.load_state_dict(state, strict=False)
    z = torch.randn(2, D, 5, 5)
    assert torch.equal(quantizer(z).info.indices, given(z, rate=0.03).info.indices)
    assert torch.equal(quantizer(z, threshold=0.8).info.indices, given(z).info.indices)
    before = quantizer.identity()
    quantizer.entropy.count(torch.randint(K, (50, T)))
    assert quantizer.identity() != before  # its tables choose its codes


# --- training ------------------------------------------------------------------------------------


def test_rates_are_drawn_per_image_in_training_only() -> None:
    plain, drawn = rated(), loopy(rate_range=(1e-4, 1.0))
    drawn.load_state_dict(plain.state_dict())
    z = torch.randn(64, D, 4, 4)
    assert torch.equal(plain(z).info.indices, drawn(z).info.indices)
    assert drawn.identity() == plain.identity()
    drawn.embedding.steps.fill_(1)
    lengths = drawn.train()(z).info.encodings.lengths.float().mean(dim=(1, 2))
    assert lengths.min() < 1.5 and lengths.max() > 2.5


@pytest.mark.parametrize("transform", ["residual", "linear", "residual-beam"])
def test_training_at_rates_fits_clusters(transform: str) -> None:
    centers = torch.randn(4, D) * 5
    quantizer = LoopyVectorQuantizer(
        K, D, 0.25, 1.0, T, TRANSFORMS[transform], ema_decay=0.9, rate_range=(1e-4, 1e-2)
    ).train()
    for _ in range(60):
        z = centers[torch.randint(4, (8, 9))] + 0.1 * torch.randn(8, 9, D)
        quantizer(z.movedim(2, 1)[..., None])
    out = quantizer.eval()(centers, rate=1e-4)
    assert (out.z_q - centers).norm(dim=1).max() < 0.5
    assert quantizer.entropy.learned


def literal_bits(quantizer: LoopyVectorQuantizer, z: Tensor, rate: float) -> float:
    """Lambda times the expected bits of a site in float64, one turn of one site at a time."""
    transform, codebook = quantizer.transform, quantizer.embedding.weight.detach()
    assert isinstance(transform, Cascade)
    seen = [transform.project(codebook, turn).double() for turn in range(T)]
    bits, weight = quantizer.entropy.code_bits().double(), rate * float(quantizer.latent_std) ** 2
    total = 0.0
    for residual, codes in zip(z.double(), quantizer(z, rate=rate).info.indices, strict=True):
        for turn, code in enumerate(codes[codes >= 0]):
            cost = (residual - seen[turn]).square().sum(dim=1) / weight + bits[turn]
            share = 2 ** (cost.min() - cost)
            total += float((share / share.sum() * bits[turn]).sum())
            residual = residual - seen[turn][code]
    return rate * total / len(z)


@every_rated
def test_the_rate_loss_is_the_literal_one_and_its_gradient_makes_codes_cheaper(transform) -> None:
    quantizer = rated(transform, rate_range=(0.1, 0.2), rate_weight=0.7)
    z = torch.randn(30, D, requires_grad=True)
    loss = quantizer(z, rate=0.05).loss
    quantizer.rate_weight = 0.0
    loss = loss - quantizer(z, rate=0.05).loss
    assert float(loss.detach()) == pytest.approx(
        0.7 * literal_bits(quantizer, z.detach(), 0.05), 1e-3
    )
    (slope,) = torch.autograd.grad(loss, z)
    cheaper = literal_bits(quantizer, z.detach() - 1e-3 * slope / slope.norm(), 0.05)
    expected = literal_bits(quantizer, z.detach(), 0.05) - 1e-3 * float(slope.norm()) / 0.7
    assert cheaper == pytest.approx(expected, rel=1e-5)


@every_rated
def test_latents_that_are_all_the_same_have_a_finite_loss(transform: str) -> None:
    kwargs = {"rate": 0.1, "rate_weight": 1.0, "threshold": None}
    quantizer, z = loopy(transform, **kwargs).train(), torch.zeros(9, D, requires_grad=True)
    loss = quantizer(z).loss
    loss.backward()
    assert quantizer.latent_std == 0 and loss.isfinite() and z.grad.isfinite().all()


def test_latents_learn_to_be_cheap() -> None:
    bits = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        quantizer = loopy(rate=0.1, rate_weight=weight, threshold=None, ema_decay=0.9).train()
        z = torch.randn(400, D)
        moved = z.clone().requires_grad_()
        optimizer = torch.optim.SGD([moved], 50.0)
        for _ in range(30):
            loss = quantizer(moved).loss + (moved - z).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bits.append(
            float(quantizer.entropy.bits(quantizer.eval()(moved.detach()).info.indices).mean())
        )
    assert bits[1] < bits[0]


# --- search --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_cheapest_codes_are_those_of_all_scores(k: int | None, size: float) -> None:
    vectors, codebook = size * torch.randn(300, 7), size * (3 + torch.randn(40, 7))
    bits, weight = 12 * torch.rand(40), size**2 * torch.rand(300) ** 3
    found = cheapest_codes(vectors, codebook, bits, weight, k)
    cost = torch.cdist(vectors.double(), codebook.double()) ** 2 + weight[:, None] * bits.double()
    least = cost.topk(k or 1, largest=False).indices
    assert torch.equal(found, least[:, 0] if k is None else least)


def test_codes_without_a_price_or_a_size_are_found_too() -> None:
    vectors, codebook, bits = torch.randn(50, 3), torch.randn(9, 3), torch.rand(9)
    free = cheapest_codes(vectors, codebook, bits, torch.zeros(50))
    assert torch.equal(free, nearest_codes(vectors, codebook))
    assert torch.equal(cheapest_codes(vectors, codebook, torch.zeros(9), torch.ones(50)), free)
    at_zero = cheapest_codes(vectors, torch.zeros(9, 3), bits, torch.ones(50))
    assert (at_zero == bits.argmin()).all()
