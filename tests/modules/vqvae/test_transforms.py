"""Transforms equal the loop as it is written down, turn by turn."""

import math

import pytest
import torch
from torch import Tensor

from taming.modules.vqvae.codebook import k_means
from taming.modules.vqvae.loop import Path, Searches, Transform
from taming.modules.vqvae.rate import lengths_within
from taming.modules.vqvae.transforms import Attract, LinearResidual, Residual

K, D, T = 12, 3, 6


def spell(path: Path, tau: float) -> tuple[Tensor, Tensor]:
    """Codes and lengths of a path that ends at a threshold."""
    lengths = lengths_within(path.distances, torch.full((len(path.distances),), tau))
    return path.end_at(lengths), lengths


def literal_loop(z: Tensor, codebook: Tensor, tau: float, turn, scale) -> list[list[int]]:
    """The definition: one latent at a time, one turn at a time.

    ``turn(r, e, t)`` transforms and gives what is written (None for the code itself); ``scale(t)``
    brings a distance of turn t back to the space of z.
    """
    written = []
    for latent in z:
        r, slots = latent, []
        for t in range(T):
            distance = (codebook - r).norm(dim=1)
            k = int(distance.argmin())
            if distance[k] * scale(t) <= tau or t == T - 1:
                slots.append(k)
                break
            r, wrote = turn(r, codebook[k], t)
            slots.append(k if wrote is None else wrote)
        written.append(slots + [-1] * (T - len(slots)))
    return written


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("tau", [0.0, 0.11, 0.53, math.inf])
def test_attract_equals_the_literal_loop(step: float, tau: float) -> None:
    z, codebook = torch.randn(60, D), torch.randn(K, D)
    attract = Attract(step)
    path = attract.search(z, codebook, torch.full((60,), tau), T)
    expected = literal_loop(
        z, codebook, tau, lambda r, e, t: (torch.lerp(r, e, step), K), lambda t: 1.0
    )
    assert spell(path, tau)[0].tolist() == expected


def scaled(beam: int = 1, max_loops: int = T) -> Residual:
    """A residual whose scales fall."""
    residual = Residual(max_loops, beam=beam)
    residual.scales.copy_(0.6 ** torch.arange(max_loops))
    return residual


def mapped(beam: int = 1) -> LinearResidual:
    """A residual whose maps shrink and mix the axes."""
    residual = LinearResidual(T, D, beam=beam)
    for turn in range(1, T):
        residual.maps[turn] = 0.6**turn * (torch.eye(D) + 0.3 * torch.randn(D, D))
    return residual


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.1, math.inf])
def test_residual_equals_the_literal_loop(tau: float) -> None:
    z, codebook, residual = torch.randn(60, D), torch.randn(K, D), scaled()
    sums = residual.scales.tolist()
    path = residual.search(z, codebook, torch.full((60,), tau), T)
    expected = literal_loop(
        z,
        codebook,
        tau,
        lambda r, e, t: ((r - e) * sums[t] / sums[t + 1], None),
        lambda t: sums[t],
    )
    assert spell(path, tau)[0].tolist() == expected


def test_maps_that_only_scale_are_scales() -> None:
    z, codebook, residual, linear = torch.randn(60, D), torch.randn(K, D), scaled(), mapped()
    linear.maps.copy_(residual.scales[:, None, None] * torch.eye(D))
    ours, theirs = (t.search(z, codebook, torch.zeros(60), T) for t in (linear, residual))
    assert torch.equal(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.distances, theirs.distances)
    found = [t.retrace(z, ours.codes[:, -1], codebook) for t in (linear, residual)]
    for name, one, other in zip(found[0]._fields, *found, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_targets_step_down_the_gradient_of_the_error() -> None:
    z, codebook = torch.randn(60, D), torch.randn(K, D, requires_grad=True)
    for transform in (mapped(), scaled()):
        codes = transform.search(z, codebook.detach(), torch.zeros(60), T).codes[:, -1]
        searches = transform.retrace(z, codes, codebook)
        error = (searches.approximations - z[searches.sites]).square().sum() / 2
        (gradient,) = torch.autograd.grad(error, codebook)
        steps = (searches.targets - codebook.detach()[searches.found]) * searches.weights[:, None]
        total = torch.zeros(K, D).index_add_(0, searches.found, steps)
        torch.testing.assert_close(total, -gradient)


def test_residual_distance_is_the_error_and_the_threshold_bounds_it() -> None:
    z, codebook, tau, residual = torch.randn(200, D), torch.randn(K, D), 0.4, mapped()
    path = residual.search(z, codebook, torch.full((200,), tau), T)
    codes, length = spell(path, tau)
    error = (z - residual.decode(codes, codebook)).norm(dim=1)
    last = path.distances.gather(1, length[:, None] - 1).squeeze(1)
    torch.testing.assert_close(last, error)
    assert (error[length < T] <= tau + 1e-6).all()
    assert (length < T).any() and (length == T).any()


every_transform = pytest.mark.parametrize(
    "transform", [scaled(), scaled(beam=3), mapped(), mapped(beam=3), Attract(0.3)]
)


@every_transform
def test_a_threshold_only_cuts_the_path(transform: Transform) -> None:
    z, codebook, tau = torch.randn(50, D), torch.randn(K, D), 0.5
    whole = transform.search(z, codebook, torch.zeros(50), T)
    short = transform.search(z, codebook, torch.full((50,), tau), T)
    codes, lengths = spell(whole, tau)
    assert torch.equal(codes, spell(short, tau)[0])
    assert len(lengths.unique()) > 1


def test_a_wider_beam_comes_nearer_and_a_full_one_nearest() -> None:
    z, codebook, turns = torch.randn(40, D), torch.randn(K, D), 2
    distances = []
    for beam in (1, 4, K):
        residual = scaled(beam, turns)
        distances.append(residual.search(z, codebook, torch.zeros(40), turns).distances)
    sums = (codebook[:, None] + 0.6 * codebook).reshape(-1, D)
    torch.testing.assert_close(distances[2][:, 1], torch.cdist(z, sums).amin(dim=1))
    greedy, beam, full = (d[:, 1].mean() for d in distances)
    assert greedy > beam >= full
    assert all(torch.equal(d[:, 0], distances[0][:, 0]) for d in distances)


@every_transform
def test_searches_are_those_that_gave_the_codes(transform: Transform) -> None:
    z, codebook = torch.randn(50, D), torch.randn(K, D)
    codes, lengths = spell(transform.search(z, codebook, torch.full((50,), 0.5), T), 0.5)
    searches = transform.retrace(z, codes, codebook)
    last = torch.zeros(50, D)
    for site, approximation in zip(searches.sites, searches.approximations, strict=True):
        last[site] = approximation  # the searches of a site come in the order of its turns
    torch.testing.assert_close(last, transform.decode(codes, codebook))
    if not transform.dummies:
        assert len(searches.found) == lengths.sum()
        assert torch.equal(searches.found, codes[searches.sites, searches.turns])
    else:
        assert len(searches.found) == len(z)


def whole_paths(transform: Transform, z: Tensor, codebook: Tensor) -> Searches:
    """Searches of latents that take every turn."""
    codes = transform.search(z, codebook, torch.zeros(len(z)), T).codes[:, -1]
    return transform.retrace(z, codes, codebook)


def test_scales_bring_residuals_to_the_size_of_the_latents() -> None:
    z, codebook, residual = torch.randn(500, D) * 3, torch.randn(K, D) * 3, Residual(T)
    for _ in range(T):
        residual.initialize(z, whole_paths(residual, z, codebook), codebook)
    searches = whole_paths(residual, z, codebook)
    for turn in range(T):
        size = (searches.queries[searches.turns == turn] / residual.scales[turn]).square().mean()
        torch.testing.assert_close(size.sqrt(), z.square().mean().sqrt(), rtol=1e-3, atol=0)
    kept = residual.scales.clone()
    residual.learn(z, searches, codebook)
    torch.testing.assert_close(residual.scales, kept, rtol=1e-3, atol=0)


def test_turns_that_no_latent_took_keep_their_sizes() -> None:
    z, codebook, residual = torch.randn(50, D), torch.randn(K, D), Residual(T)
    residual.scales = torch.linspace(1, 0.5, T)
    kept = residual.scales.clone()
    ended_at_once = residual.search(z, codebook, torch.full((50,), math.inf), T).codes[:, 0]
    residual.initialize(z, residual.retrace(z, ended_at_once, codebook), codebook)
    assert torch.equal(residual.scales, kept)


def test_maps_become_the_least_squares_fit_and_beat_scales() -> None:
    z = torch.randn(2000, D) * torch.tensor([4.0, 1.0, 0.2])
    codebook = k_means(z, z[:K])
    errors = []
    for transform in (Residual(T), LinearResidual(T, D)):
        for step in range(150):
            searches = whole_paths(transform, z, codebook)
            (transform.initialize if step < T else transform.learn)(z, searches, codebook)
        searches = whole_paths(transform, z, codebook)
        last = searches.approximations[searches.turns == T - 1]
        errors.append((z - last).square().mean())
        if isinstance(transform, LinearResidual):
            on = searches.turns == 1
            codes, queries = codebook[searches.found[on]], searches.queries[on]
            best = (queries - codes @ torch.linalg.lstsq(codes, queries).solution).square().mean()
            found = (queries - codes @ transform.maps[1].T).square().mean()
            assert best <= found < 1.01 * best
    assert errors[1] < 0.5 * errors[0]


def test_maps_stay_small_where_codes_hardly_differ_and_latents_move() -> None:
    axes = torch.tensor([1.0, 1.0, 0.5, 0.5, 1e-3, 1e-3, 1e-3, 1e-3])
    transform = LinearResidual(5, 8)
    codebook = k_means(torch.randn(500, 8) * axes, torch.randn(16, 8) * axes)
    for step in range(300):
        z = torch.randn(64, 8) * axes * (1 + 0.2 * math.sin(step / 20))
        codes = transform.search(z, codebook, torch.full((64,), 0.5), 5).codes
        searches = transform.retrace(z, codes[:, -1], codebook)
        (transform.initialize if step < 4 else transform.learn)(z, searches, codebook)
    assert torch.linalg.matrix_norm(transform.maps, ord=2).max() < 2


@pytest.mark.parametrize(
    "transform, short, long",
    [
        (Attract(0.5, (T, D)), [2, -1, -1], [K, K, 2]),
        (Residual(T, (T, D)), [2, -1, -1], [2, 5, 5]),
        (LinearResidual(T, D, (T, D)), [2, -1, -1], [2, 5, 5]),
    ],
)
def test_depth_embedding_tells_turns_apart_and_learns(transform, short, long) -> None:
    with torch.no_grad():
        transform.depth.normal_()
    codebook = torch.randn(K, D)
    codes = torch.tensor([short + [-1] * 3, long + [-1] * 3])
    z_q = transform.decode(codes, codebook)
    plain = transform.compose(codes, codebook)
    torch.testing.assert_close(z_q - plain, transform.depth[[0, 2]])
    z_q.sum().backward()
    assert transform.depth.grad[2].abs().sum() > 0


def test_a_beam_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        Residual(T, beam=0)


@pytest.mark.parametrize("step", [0.0, 1.5, -1.0])
def test_a_step_out_of_range_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match=r"step must be in \(0, 1\]"):
        Attract(step)
