"""Orbit: every turn lets all codes compete again, as f^-t(e_k)."""

import pytest
import torch

from taming.modules.vqvae.orbit import Orbit
from taming.modules.vqvae.quantize import LoopyVectorQuantizer

K, D, T = 8, 4, 5


def moved() -> Orbit:
    """An orbit whose turns are far from the identity."""
    orbit = Orbit(T, D)
    with torch.no_grad():
        orbit.skew.normal_()
        orbit.log_scale.fill_(0.3)
        orbit.offset.normal_()
    return orbit


def literal_turn(orbit: Orbit, r: torch.Tensor) -> torch.Tensor:
    """f(r) = s Q r + b for one latent."""
    rotation = torch.matrix_exp(orbit.skew - orbit.skew.T)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(D))
    return orbit.log_scale.exp() * rotation @ r + orbit.offset


def test_latents_are_carried_by_as_many_turns_as_each_takes() -> None:
    orbit, z, turns = moved(), torch.randn(T, D), torch.arange(T)
    expected = []
    for latent, count in zip(z, turns, strict=True):
        for _ in range(count):
            latent = literal_turn(orbit, latent)
        expected.append(latent)
    torch.testing.assert_close(orbit.carry(z, turns), torch.stack(expected))


def test_codes_are_carried_back() -> None:
    orbit, codebook = moved(), torch.randn(K, D)
    for turn, seen in enumerate(orbit.orbits(codebook)):
        torch.testing.assert_close(orbit.carry(seen, torch.full((K,), turn)), codebook)


def test_the_nearest_of_all_orbits_is_written() -> None:
    orbit, z, codebook = moved(), torch.randn(100, D), torch.randn(K, D)
    path = orbit.walk(z, codebook, torch.zeros(100), T)
    distance, nearest = torch.cdist(z, orbit.orbits(codebook).flatten(0, 1)).min(dim=1)
    torch.testing.assert_close(path.distances[:, -1], distance)
    for written, where in zip(path.codes[:, -1], nearest, strict=True):
        turn, code = divmod(int(where), K)
        assert written.tolist() == [K] * turn + [code] + [-1] * (T - 1 - turn)


def test_a_site_ends_at_the_first_turn_within_the_threshold() -> None:
    orbit, z, codebook = moved(), torch.randn(100, D), torch.randn(K, D)
    quantizer = LoopyVectorQuantizer(K, D, threshold=0.8, max_loops=T, start_batches=0)
    quantizer.transform = orbit
    with torch.no_grad():
        quantizer.embedding.weight.copy_(codebook)
    trace = quantizer.eval()(z).info.encodings
    within = (torch.cdist(orbit.orbits(codebook), z.expand(T, -1, -1)).amin(dim=1) <= 0.8).T
    assert torch.equal(trace.within, within.any(dim=1)) and trace.within.any()
    ended = trace.within
    assert torch.equal(trace.lengths[ended], within[ended].int().argmax(dim=1) + 1)
    assert not ended.all() and trace.lengths[~ended].unique().numel() > 1


def test_turns_learn_from_what_the_decoder_sees() -> None:
    orbit, z, codebook = moved(), torch.randn(300, D), torch.randn(K, D)
    optimizer = torch.optim.Adam(orbit.parameters(), 0.01)
    errors = []
    for _ in range(50):
        codes = orbit.walk(z, codebook, torch.zeros(300), T).codes[:, -1]
        loss = (orbit.compose(codes, codebook) - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.9 * errors[0]


def test_sizes_of_another_quantizer_are_refused() -> None:
    block = {
        "target": "taming.modules.vqvae.orbit.Orbit",
        "params": {"max_loops": T, "e_dim": D + 1},
    }
    with pytest.raises(ValueError, match="'e_dim': 5.*its quantizer for {'e_dim': 4"):
        LoopyVectorQuantizer(K, D, threshold=1.0, max_loops=T, transform_config=block)
