"""Transforms equal the loop as it is written down, turn by turn."""

import math

import pytest
import torch
from torch import Tensor

from taming.modules.vqvae.transforms import Attract, Residual

K, D, T = 12, 3, 6


def literal_loop(z: Tensor, codebook: Tensor, tau: float, turn, scale) -> list[list[int]]:
    """The definition: one latent at a time, one turn at a time.

    ``turn(r, e, t)`` transforms and says what is written (None for the code itself); ``scale(t)``
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
    path = Attract(step).walk(z, codebook, torch.full((60,), tau), T)
    expected = literal_loop(
        z, codebook, tau, lambda r, e, t: (torch.lerp(r, e, step), K), lambda t: 1.0
    )
    assert path.codes.tolist() == expected


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.1, math.inf])
def test_residual_equals_the_literal_loop(tau: float) -> None:
    z, codebook = torch.randn(60, D), torch.randn(K, D)
    residual = Residual(T)
    residual.scales.uniform_(0.4, 0.9)
    sums = [1.0, *residual.scales.cumprod(0).tolist()]
    path = residual.walk(z, codebook, torch.full((60,), tau), T)
    expected = literal_loop(
        z,
        codebook,
        tau,
        lambda r, e, t: ((r - e) / residual.scales[t], None),
        lambda t: sums[t],
    )
    assert path.codes.tolist() == expected


def test_residual_distance_is_the_error_and_the_threshold_bounds_it() -> None:
    z, codebook, tau = torch.randn(200, D), torch.randn(K, D), 0.4
    residual = Residual(T)
    residual.scales.fill_(0.6)
    path = residual.walk(z, codebook, torch.full((200,), tau), T)
    error = (z - residual.decode(path.codes, codebook)).norm(dim=1)
    length = (path.codes >= 0).sum(1)
    last = path.distances.gather(1, length[:, None] - 1).squeeze(1)
    torch.testing.assert_close(last, error)
    assert (error[length < T] <= tau + 1e-6).all()
    assert (length < T).any() and (length == T).any()


def test_a_threshold_only_cuts_the_residual_path() -> None:
    z, codebook = torch.randn(50, D), torch.randn(K, D)
    residual = Residual(T)
    residual.scales.fill_(0.7)
    whole = residual.walk(z, codebook, torch.zeros(50), T)
    cut = residual.walk(z, codebook, torch.full((50,), 0.5), T)
    kept = cut.codes >= 0
    assert torch.equal(cut.codes[kept], whole.codes[kept])
    torch.testing.assert_close(cut.distances[kept], whole.distances[kept])


def test_only_sites_in_the_loop_are_searched() -> None:
    z, codebook = torch.randn(50, D), torch.randn(K, D)
    path = Residual(T).walk(z, codebook, torch.full((50,), 0.5), T)
    assert len(path.queries) == (path.codes >= 0).sum()
    assert len(Attract(0.5).walk(z, codebook, torch.full((50,), 0.1), T).queries) == 50


def test_scales_bring_residuals_to_the_size_of_the_latents() -> None:
    z, codebook = torch.randn(500, D) * 3, torch.randn(K, D) * 3
    residual = Residual(T)
    for _ in range(T):
        path = residual.walk(z, codebook, torch.zeros(500), T)
        residual.adapt(z, path, momentum=0.0)
    path = residual.walk(z, codebook, torch.zeros(500), T)
    for turn in range(T):
        size = path.queries[path.turns == turn].square().mean().sqrt()
        torch.testing.assert_close(size, z.square().mean().sqrt(), rtol=1e-3, atol=0)


def test_depth_embedding_tells_turns_apart_and_learns() -> None:
    attract = Attract(0.5, depth_embedding=(T, D))
    with torch.no_grad():
        attract.depth.normal_()
    codebook = torch.randn(K, D)
    codes = torch.tensor([[2, -1, -1, -1, -1, -1], [K, K, 2, -1, -1, -1]])
    z_q = attract.decode(codes, codebook)
    torch.testing.assert_close(z_q[1] - z_q[0], attract.depth[2] - attract.depth[0])
    z_q.sum().backward()
    assert attract.depth.grad[2].abs().sum() > 0


@pytest.mark.parametrize("step", [0.0, 1.5, -1.0])
def test_a_step_out_of_range_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match=r"step must be in \(0, 1\]"):
        Attract(step)
