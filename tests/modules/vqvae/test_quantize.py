"""The original's quantizers: its numbers and index shapes, and its bugs, which are gone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reliability.files import count, failures
from support.original import load_golden

from taming.modules.vqvae import codebook, quantize
from taming.modules.vqvae.quantize import (
    EMAVectorQuantizer,
    GumbelQuantize,
    VectorQuantizer,
    VectorQuantizer2,
)

K, D, B, H, W = 16, 4, 2, 3, 5
USED = np.array([7, 2, 11])


@pytest.fixture
def remap(tmp_path) -> str:
    np.save(tmp_path / "used.npy", USED)
    return str(tmp_path / "used.npy")


def ema(**kwargs) -> EMAVectorQuantizer:
    return EMAVectorQuantizer(K, D, beta=0.25, **kwargs)


# Kind -> how it is built (with or without the file of used codes), and the shape of its indices.
SHAPES = {
    "vq": (lambda _: VectorQuantizer(K, D, 0.25), (B * H * W, 1)),
    "vq2": (lambda _: VectorQuantizer2(K, D, 0.25), (B * H * W,)),
    "vq2-remap": (lambda remap: VectorQuantizer2(K, D, 0.25, remap), (B * H * W, 1)),
    "vq2-sane": (lambda _: VectorQuantizer2(K, D, 0.25, sane_index_shape=True), (B, H, W)),
    "vq2-remap-sane": (
        lambda remap: VectorQuantizer2(K, D, 0.25, remap, sane_index_shape=True),
        (B, H, W),
    ),
    "gumbel": (lambda _: GumbelQuantize(D, D, K), (B, H, W)),
    "gumbel-remap": (lambda remap: GumbelQuantize(D, D, K, remap=remap), (B, H, W)),
    "ema": (lambda _: ema(), (B * H * W,)),
    "ema-remap": (lambda remap: ema(remap=remap), (B * H * W,)),
    "ema-sane": (lambda _: ema(sane_index_shape=True), (B, H, W)),
}
every_kind = pytest.mark.parametrize("kind", list(SHAPES))


def build(kind: str, remap: str):
    """A quantizer in eval mode whose latents fall on many codes."""
    quantizer = SHAPES[kind][0](remap).eval()
    torch.nn.init.normal_(quantizer.codebook)
    return quantizer


def test_first_quantizer_equals_the_original(shared) -> None:
    golden = load_golden(shared, "vq1")
    quant, loss, (perplexity, encodings, indices) = golden.build()(golden.io["z"])
    assert torch.equal(indices, golden.io["indices"])
    torch.testing.assert_close(quant, golden.io["quant"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, golden.io["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(perplexity, golden.io["perplexity"], rtol=1e-5, atol=0)
    assert torch.equal(encodings.argmax(dim=1), indices[:, 0])
    assert (encodings.sum(dim=1) == 1).all()


@pytest.mark.parametrize("name", ["vq2_legacy", "vq2_fixed", "vq2_sane", "vq2_remap"])
def test_vector_quantizer_2_equals_the_original(name: str, shared, tmp_path) -> None:
    golden = load_golden(shared, name)
    if "remap" in golden.config["params"]:
        golden.config["params"]["remap"] = str(tmp_path / "used.npy")
        np.save(tmp_path / "used.npy", np.arange(0, 64, 2))
    quantizer = golden.build()
    quant, loss, (_, _, indices) = quantizer(golden.io["z"])
    assert torch.equal(indices, golden.io["indices"])
    torch.testing.assert_close(quant, golden.io["quant"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, golden.io["loss"], rtol=1e-5, atol=0)
    if "entry" in golden.io:
        entry = quantizer.get_codebook_entry(indices, (2, 5, 7, 16))
        torch.testing.assert_close(entry, golden.io["entry"])


@pytest.mark.reported(19)
@pytest.mark.parametrize("unknown", ["random", "extra", 1])
def test_remap_is_inverted_on_used_codes(unknown, tmp_path) -> None:
    np.save(tmp_path / "used.npy", np.array([7, 2, 11]))
    quantizer = VectorQuantizer2(K, D, 0.25, str(tmp_path / "used.npy"), unknown_index=unknown)
    codes = torch.tensor([[2, 7], [11, 5]])
    new = quantizer.remap_to_used(codes)
    assert new[0].tolist() == [1, 0] and new[1, 0] == 2 and new[1, 1] < quantizer.re_embed
    kept = new.clone()
    assert quantizer.unmap_to_all(new)[0].tolist() == [2, 7]
    assert torch.equal(new, kept)


@pytest.mark.reported(18)
@every_kind
def test_index_shapes_are_the_originals_and_decode(kind: str, remap: str) -> None:
    quantizer, z = build(kind, remap), torch.randn(B, D, H, W)
    z_q, _, (_, _, indices) = quantizer(z)
    assert indices.shape == SHAPES[kind][1] and indices.dtype == torch.int64
    assert quantizer.re_embed == (len(USED) if "remap" in kind else K)
    assert indices.min() >= 0 and indices.max() < quantizer.re_embed
    entry = quantizer.get_codebook_entry(indices, (B, H, W, D))
    assert torch.equal(quantizer.get_codebook_entry(indices.flatten(), (B, H, W, D)), entry)
    rows = quantizer.get_codebook_entry(indices)
    assert torch.equal(rows, entry.permute(0, 2, 3, 1).flatten(0, 2))
    if "remap" not in kind or "gumbel" in kind:
        assert torch.equal(entry, z_q)
    else:
        used = torch.isin(quantizer.get_codebook_entry(indices), quantizer.codebook[quantizer.used])
        assert used.all()


@every_kind
def test_sequence_counts_the_indices_that_there_are(kind: str, remap: str) -> None:
    quantizer = build(kind, remap)
    assert (quantizer.n_e, quantizer.e_dim) == (K, D)
    assert quantizer.sequence.vocab_size == quantizer.re_embed
    names = {"vq": ["embedding.weight"], "gu": ["proj.weight", "proj.bias", "embed.weight"]}
    names["em"] = ["embedding.weight", "embedding.cluster_size", "embedding.embed_avg"]
    expected = names[kind[:2]] + ["used"] * ("remap" in kind)
    assert sorted(quantizer.state_dict()) == sorted(expected)


def test_unknown_index_must_be_one(remap: str) -> None:
    with pytest.raises(ValueError, match="'random', 'extra' .*'rnd'"):
        VectorQuantizer2(K, D, 0.25, remap, unknown_index="rnd")


def test_codes_that_do_not_exist_are_refused(remap: str, tmp_path) -> None:
    for quantizer in (ema(), VectorQuantizer2(K, D, 0.25, remap), GumbelQuantize(D, D, K)):
        for wrong in (-1, quantizer.re_embed):
            with pytest.raises(ValueError, match=rf"index {wrong} .* 0..{quantizer.re_embed - 1}"):
                quantizer.get_codebook_entry(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="unknown_index must be in 0..2.* got -5"):
        VectorQuantizer2(K, D, 0.25, remap, unknown_index=-5)
    for wrong in ([3, K], [-1], [], [1.0, 2.0], [[1], [2]], [3, 3], [2**64 - 1], [True]):
        np.save(tmp_path / "wrong.npy", np.array(wrong))
        with pytest.raises(ValueError, match=r"wrong.npy (must name codes 0..|cannot be read)"):
            VectorQuantizer2(K, D, 0.25, str(tmp_path / "wrong.npy"))


@pytest.mark.parametrize("name", ["remap .npy", "picture .npy", "picture .npz"])
def test_damaged_arrays_are_refused_or_arrays(name: str) -> None:
    counts = count(name, n=60)
    assert counts["refused"] > 10 and not any(counts[result] for result in failures(name))


def test_latents_without_a_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, h, w\), got \(10, 4\)"):
        ema()(torch.randn(10, D))


def test_averages_of_few_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="codebook is torch.bfloat16.*train with --precision"):
        ema().bfloat16().train()(torch.randn(B, D, H, W))


def test_averages_after_a_step_lie_between_start_and_latents() -> None:
    quantizer, z = ema(decay=0.75).train(), torch.randn(B, D, H, W)
    start = quantizer.codebook.clone()
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    z_q, loss, (_, _, codes) = quantizer(z)
    torch.testing.assert_close(z_q.permute(0, 2, 3, 1).flatten(0, 2), start[codes])
    torch.testing.assert_close(loss, 0.25 * F.mse_loss(start[codes], rows))
    for code in range(K):
        mine = rows[codes == code]
        expected = (0.75 * start[code] + 0.25 * mine.sum(0)) / (0.75 + 0.25 * len(mine))
        torch.testing.assert_close(quantizer.codebook[code], expected)


@pytest.mark.reported(15)
def test_averages_reach_the_means_of_clusters() -> None:
    centers = torch.randn(4, D) * 5
    quantizer = ema(decay=0.9).train()
    with torch.no_grad():
        quantizer.embedding.weight[:4] = centers + 1
        quantizer.embedding.embed_avg[:4] = centers + 1
    for _ in range(100):
        rows = centers[torch.arange(400) % 4] + 0.1 * torch.randn(400, D)
        quantizer(rows.T.reshape(1, D, 20, 20))
    assert (quantizer.codebook[:4] - centers).abs().max() < 0.05


def test_averages_do_not_move_in_eval_mode_nor_by_gradient() -> None:
    quantizer, z = ema().eval(), torch.randn(B, D, H, W, requires_grad=True)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(z).loss.backward()
    assert z.grad is not None and not any(p.requires_grad for p in quantizer.parameters())
    torch.testing.assert_close(quantizer.state_dict(), before, rtol=0, atol=0)


def test_averages_are_those_of_all_ranks(monkeypatch) -> None:
    whole, z = ema().train(), torch.randn(4, D, H, W)
    ranks = [copy.deepcopy(whole) for _ in range(2)]
    whole(z)
    seen: list[torch.Tensor] = []
    for module in (quantize, codebook):
        monkeypatch.setattr(module, "sum_over_ranks", lambda part: seen.append(part) or part)
    for rank, part in zip(ranks, z.split(2), strict=True):
        copy.deepcopy(rank)(part)
    total = {a.shape: a + b for a, b in zip(seen[:2], seen[2:], strict=True)}
    for module in (quantize, codebook):
        monkeypatch.setattr(module, "sum_over_ranks", lambda part: total[part.shape])
    for rank, part in zip(ranks, z.split(2), strict=True):
        rank(part)
        torch.testing.assert_close(rank.state_dict(), whole.state_dict())


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5, float("nan")])
def test_averages_that_would_not_be_any_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\)"):
        EMAVectorQuantizer(16, 4, beta=0.25, decay=decay)
