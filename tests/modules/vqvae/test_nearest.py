"""The search agrees with the full distance matrix, whatever the sizes and the device's way."""

import pytest
import torch
from torch import Tensor

from taming.modules.vqvae import nearest
from taming.modules.vqvae.nearest import cheapest_codes, distance_to, nearest_codes
from taming.util import NonFiniteError


def exact(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances (N, K) in float64."""
    return torch.cdist(
        vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()


def is_nearest(found: Tensor, vectors: Tensor, codebook: Tensor) -> Tensor:
    """True (N,) where no code is nearer than the one found by more than float32 can resolve."""
    squares = exact(vectors, codebook)
    centred = vectors - codebook.mean(dim=0)
    scale = centred.norm(dim=1) * (codebook - codebook.mean(dim=0)).norm(dim=1).max()
    excess = squares.gather(1, found[:, None])[:, 0] - squares.amin(dim=1)
    return excess <= 8 * torch.finfo(torch.float32).eps * scale


@pytest.fixture(params=["in the cache", "in whole chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search as on a CPU, or as on any other device."""
    if request.param != "in the cache":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.reported(25)
@pytest.mark.parametrize("chunk", [1, 50, 640, 1 << 20])
@pytest.mark.parametrize("many", [1, 64])
def test_equals_full_matrix_for_every_chunk(
    way: None, monkeypatch: pytest.MonkeyPatch, chunk: int, many: int
) -> None:
    for name, size in {"MAX_SCORES": chunk, "_SCORES": chunk, "_CODES": 32, "_MANY": many}.items():
        monkeypatch.setattr(nearest, name, size)
    monkeypatch.setattr(nearest, "_SCORES_OF_MANY", chunk)
    vectors, codebook = torch.randn(37, 5), torch.randn(75, 5)
    found = nearest_codes(vectors, codebook)
    assert torch.equal(found, exact(vectors, codebook).argmin(dim=1))
    torch.testing.assert_close(
        distance_to(vectors, codebook[found]), torch.cdist(vectors, codebook).amin(dim=1)
    )


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 1, 7), (1500, 8, 1), (1025, 3, 2100), (40, 64, 33)]
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_is_the_argmin_of_float64_but_for_ties(
    way: None, sizes: tuple[int, int, int], offset: float
) -> None:
    n, d, k = sizes
    vectors, codebook = torch.randn(n, d) + offset, torch.randn(k, d) + offset
    found = nearest_codes(vectors, codebook)
    assert is_nearest(found, vectors, codebook).all()
    differ = found != exact(vectors, codebook).argmin(dim=1)
    assert differ.float().mean() <= 1e-3


def test_a_vector_far_from_the_codebook_keeps_its_digits(way: None) -> None:
    codebook = torch.randn(64, 16)
    vectors = codebook[:8] + 100 * torch.randn(16)
    assert is_nearest(nearest_codes(vectors, codebook), vectors, codebook).all()


@pytest.mark.parametrize("channels", [4, 70])
def test_equal_codes_are_found_by_the_lowest_index(way: None, channels: int) -> None:
    apart = torch.randn(700, channels)
    codebook = apart.repeat(3, 1)
    assert torch.equal(nearest_codes(codebook, codebook), torch.arange(700).repeat(3))
    together = apart.repeat_interleave(3, dim=0)
    assert torch.equal(nearest_codes(apart, together), torch.arange(700) * 3)


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_several_are_the_nearest_in_order(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(nearest, "MAX_SCORES", chunk)
    vectors, codebook = torch.randn(37, 5), torch.randn(11, 5)
    indices = torch.cdist(vectors, codebook).sort(dim=1).indices
    assert torch.equal(nearest_codes(vectors, codebook, k=4), indices[:, :4])
    assert torch.equal(nearest_codes(vectors, codebook, k=1), indices[:, :1])


def test_a_code_finds_itself_at_distance_zero_even_under_autocast(way: None) -> None:
    codebook = torch.randn(64, 16) * 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_codes(codebook, codebook)
    assert torch.equal(found, torch.arange(64))
    assert torch.equal(distance_to(codebook, codebook[found]), torch.zeros(64))


def test_no_vectors_find_nothing(way: None) -> None:
    for empty in (torch.empty(0, 4), torch.empty(0, 4, 2, 3), torch.empty(2, 4, 0, 3)):
        assert nearest_codes(empty, torch.randn(3, 4)).shape == (0,)


@pytest.mark.parametrize("scores", [1, 40, 150, 1 << 18])
def test_maps_are_searched_as_their_rows(
    way: None, monkeypatch: pytest.MonkeyPatch, scores: int
) -> None:
    monkeypatch.setattr(nearest, "_SCORES", scores)  # parts of an image, or several images
    z, codebook = torch.randn(5, 3, 2, 4), torch.randn(9, 3)
    rows = z.movedim(1, 3).reshape(-1, 3)
    for maps in (z, z.contiguous(memory_format=torch.channels_last), z.double()):
        assert torch.equal(nearest_codes(maps, codebook), nearest_codes(rows, codebook))
    assert nearest_codes(z, codebook, k=2).shape == (40, 2)


@pytest.mark.parametrize("place", ["vectors", "codebook"])
def test_a_nan_is_not_hidden_by_other_codes(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"vectors": torch.randn(5, 4), "codebook": torch.randn(40, 4)}
    tensors[place][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="not a number"):
        nearest_codes(**tensors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = nearest_codes(**tensors)
    if place == "codebook":
        assert (found == 3).all()


@pytest.mark.parametrize("far", [0, 100])
def test_the_cheapest_are_those_of_the_definition_wherever_the_codes_lie(far: float) -> None:
    codebook, vectors = 0.1 * torch.randn(256, 8), 0.1 * torch.randn(300, 8)
    codebook, vectors = codebook + far, vectors + far
    bits, weight = 10 * torch.rand(256), 0.01 * torch.rand(300)
    cost = exact(vectors, codebook) + weight[:, None] * bits
    found = cheapest_codes(vectors, codebook, bits, weight)
    excess = cost.gather(1, found[:, None])[:, 0] - cost.amin(dim=1)
    assert float(excess.max()) < 1e-5
