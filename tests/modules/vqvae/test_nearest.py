"""The search agrees with the full distance matrix, whatever the chunk."""

import pytest
import torch

from taming.modules.vqvae.nearest import nearest_codes


@pytest.mark.reported(25)
@pytest.mark.parametrize("max_scores", [1, 50, 64, 1 << 20])
def test_equals_full_matrix_for_every_chunk(max_scores: int) -> None:
    vectors, codebook = torch.randn(37, 5), torch.randn(11, 5)
    full = torch.cdist(vectors, codebook)
    found = nearest_codes(vectors, codebook, max_scores=max_scores)
    assert torch.equal(found.indices, full.argmin(dim=1))
    torch.testing.assert_close(found.distances, full.min(dim=1).values)


@pytest.mark.parametrize("max_scores", [1, 50, 1 << 20])
def test_several_are_the_nearest_in_order(max_scores: int) -> None:
    vectors, codebook = torch.randn(37, 5), torch.randn(11, 5)
    distances, indices = torch.cdist(vectors, codebook).sort(dim=1)
    found = nearest_codes(vectors, codebook, k=4, max_scores=max_scores)
    assert torch.equal(found.indices, indices[:, :4])
    torch.testing.assert_close(found.distances, distances[:, :4])


def test_a_code_finds_itself_at_distance_zero_even_under_autocast() -> None:
    codebook = torch.randn(64, 16) * 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_codes(codebook, codebook)
    assert torch.equal(found.indices, torch.arange(64))
    assert torch.equal(found.distances, torch.zeros(64))


def test_no_vectors_find_nothing() -> None:
    assert nearest_codes(torch.empty(0, 4), torch.randn(3, 4)).indices.shape == (0,)
