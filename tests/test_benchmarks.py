"""The benchmarks run, and count what they say they count."""

import argparse
import json
import math
import sys
from concurrent.futures import Future
from dataclasses import replace

import adaptivity
import pytest
import torch
from adaptivity import rank_correlation, site_statistics
from race.contenders import contenders
from race.measure import code_bits, cut_by, fixed_length, set_rate_for_mean, shuffled_lengths, usage
from race.peers import ResidualVQ
from race.plans import PLANS, images_of
from race.report import average, cell, codes_at, margins, quality_at, savings, write_report
from race.training import BASE, build_tokenizer, trained_base, trained_tokenizer
from rate_distortion import FIELDS, collect, load_rows, race
from scipy.stats import spearmanr

from taming.modules.vqvae.base import Quantizer


def test_a_race_measures_every_rate_and_is_reported(plan, parquet, tmp_path) -> None:
    options = argparse.Namespace(
        train=str(parquet),
        test=str(parquet),
        outdir=tmp_path,
        threads=1,
        precision="32-true",
        no_prior=False,
    )
    rows = [row for name in ("rvq-2-shared", "loopy-one") for row in race(plan, name, 0, options)]
    assert len(race(plan, "rvq-2-shared", 0, options)) == 1  # from the file this time
    assert {row["group"] for row in rows} == {
        "fixed depth, shared",
        "loopy, one checkpoint",
        "control: shuffled",
        "control: fixed depth",
    }
    for row in rows:
        assert math.isfinite(row["psnr"]) and 64 <= row["tokens"] <= 8 * 64
        if row["group"] == "loopy, one checkpoint":
            assert row["tokens"] / 64 == pytest.approx(float(row["length"]), abs=0.3)
            assert row["prior_bits"] > 0
        if row["group"] == "control: fixed depth":  # no token marks the end of a site
            assert row["raw_bits"] == pytest.approx(64 * int(row["length"]) * math.log2(16))
    write_report(rows, plan, tmp_path)
    assert "| rvq-2-shared |  | 128 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "rate_distortion.png").stat().st_size > 10_000


def test_a_race_that_fails_takes_nothing_from_the_others(tmp_path) -> None:
    table, races = tmp_path / "measurements.csv", {}
    for name in ("first", "second", "third"):
        races[finished := Future()] = (name, 0)
        if name == "second":
            finished.set_exception(ValueError("no such code"))
        else:
            finished.set_result([dict.fromkeys(FIELDS, name)])
    with pytest.raises(ValueError, match="no such code"):
        collect(races, [dict.fromkeys(FIELDS, "before")], table)
    assert {row["name"] for row in load_rows(table)} == {"before", "first", "third"}
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize("name", sorted(contenders(16, 8)))
def test_codes_of_every_contender_decode_to_what_it_gave(plan, name) -> None:
    model = build_tokenizer(plan, contenders(16, 8)[name])
    quantizer: Quantizer = model.quantize
    z = torch.randn(2, 8, 4, 4)
    quantizer.train()(z)
    out = quantizer.eval()(z)
    shape = (2, 4, 4, 8)
    z_q = quantizer.get_codebook_entry(out.info.indices, shape)
    torch.testing.assert_close(z_q, out.z_q)
    codes = out.info.indices.reshape(2, 4, 4, -1)
    tokens, _ = quantizer.sequence.encode(codes)
    assert torch.equal(quantizer.sequence.decode(tokens, (4, 4)), codes)


def test_contenders_of_a_seed_start_from_one_autoencoder(plan, parquet, tmp_path) -> None:
    data = images_of(str(parquet), "train", 32, train=True)
    where = (0, data, tmp_path, "32-true")
    base = trained_base(plan, *where)
    assert {name.split(".")[0] for name in base} == set(BASE) - {"shortcut"}
    still = replace(plan, learning_rate=0.0)
    for name in ("rvq-2-shared", "loopy-2"):
        state = trained_tokenizer(still, contenders(16, 8)[name], *where).state_dict()
        assert all(torch.equal(state[k], value) for k, value in base.items())
    state = trained_tokenizer(still, contenders(16, 8)["vq"], *where).state_dict()
    assert not torch.equal(state["encoder.conv_in.weight"], base["encoder.conv_in.weight"])


def test_peers_are_cut_to_fewer_turns() -> None:
    peer = ResidualVQ(16, 8, 4, quantize_dropout=True)
    z = torch.randn(2, 8, 4, 4)
    peer.train()(z)
    errors = []
    for turns in (1, 2, 4):
        peer.shorten(turns)
        out = peer.eval()(z)
        codes = out.info.indices
        assert codes.shape == (2, 4, 4, turns) and (codes >= 0).all()
        assert peer.sequence.encode(codes)[1].tolist() == [16 * turns] * 2
        torch.testing.assert_close(peer.get_codebook_entry(codes), out.z_q)
        errors.append(float((out.z_q - z).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_peers_gradient_to_the_latents_is_the_loops(dropout: bool) -> None:
    peer = ResidualVQ(16, 8, 4, quantize_dropout=dropout).train()
    for _ in range(4):  # depths are drawn
        z = torch.randn(2, 8, 4, 4, requires_grad=True)
        peer(z).z_q.sum().backward()
        assert z.grad is not None and torch.equal(z.grad, torch.ones_like(z))


def test_every_codebook_counts_in_a_peers_usage() -> None:
    codes = torch.tensor([[0, 1], [0, 1]])
    assert usage(codes, ResidualVQ(4, 8, 2)) == 0.25
    assert usage(codes, ResidualVQ(4, 8, 2, shared_codebook=True)) == 0.5


def test_a_peers_wider_search_comes_nearer() -> None:
    peer = ResidualVQ(16, 8, 4)
    z = torch.randn(8, 8, 4, 4)
    peer.train()(z)
    narrow = peer.eval()(z)
    peer.widen(4)
    wide = peer(z)
    assert (wide.z_q - z).square().mean() < (narrow.z_q - z).square().mean()
    torch.testing.assert_close(peer.get_codebook_entry(wide.info.indices), wide.z_q)


def test_controls_keep_the_mean_length(plan) -> None:
    model = build_tokenizer(plan, contenders(16, 8)["loopy-one"]).eval()
    z = torch.randn(3, 8, 4, 4)
    path = model.quantize.whole_path(z)
    tau = path.distances[:, 2].median()
    own = model.quantize(z, tau).info.encodings.lengths
    shuffled = cut_by(model, shuffled_lengths(tau))(z)[1]
    lengths = (shuffled >= 0).sum(-1)
    assert torch.equal(lengths.sum((1, 2)), own.sum((1, 2)))
    assert not torch.equal(lengths, own)
    assert ((cut_by(model, fixed_length(3))(z)[1] >= 0).sum(-1) == 3).all()


def test_bits_are_those_of_the_entropy() -> None:
    codes = torch.tensor([[0, 1, -1], [1, 1, -1], [2, 1, -1], [3, 1, -1]])
    # The second code and the length are certain.
    assert code_bits(codes, 4) == pytest.approx(4 * 2)
    codes[:2, 1] = -1
    # Now the length is worth a bit a site.
    assert code_bits(codes, 4) == pytest.approx(4 * 2 + 4 * 1)


def test_dummies_cost_no_more_than_the_length_that_counts_them() -> None:
    codes = torch.tensor([[0, -1], [1, 0]])  # A and D, A
    assert code_bits(codes, 1) == pytest.approx(2 * 1)


def test_adaptivity_of_a_races_tokenizer(
    plan, parquet, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLANS, "quick", plan)
    out = tmp_path / "out"
    words = f"adaptivity.py --race {tmp_path} --plan quick --test {parquet} -n 10 -o {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(ValueError, match=r"has no loopy-one-0\.pt"):
        adaptivity.main()
    model = build_tokenizer(plan, contenders(16, 8)["loopy-one"])
    model.quantize.train()(torch.randn(2, 8, 8, 8))
    torch.save(model.state_dict(), tmp_path / "loopy-one-0.pt")
    adaptivity.main()
    found = json.loads((out / "adaptivity.json").read_text())
    assert [len(found[k]) for k in ("codes per image", "rank correlation")] == [7, 5]
    for limit, row in found["code limits"].items():
        assert row["exceeded"] == 0 and 64 <= row["mean used"] <= int(limit)
    for row in found["fixed error"].values():
        assert row["gave up early"] == 0 and row["10%"] <= row["mean"] <= 8 * 64
    assert found["never seen"]["valid sequences"] is True
    assert (out / "images.png").is_file() and (out / "new.png").is_file()


def test_rank_correlation_equals_scipys() -> None:
    a, b = torch.randint(0, 5, (200,)), torch.randn(200)
    assert rank_correlation(a, b + a) == pytest.approx(spearmanr(a, b + a).statistic)


def test_site_statistics_are_those_of_the_sites() -> None:
    x = torch.zeros(1, 3, 8, 8)
    x[..., :4, 4:] = torch.tensor([1.0, -1.0]).repeat(2)
    deviation = site_statistics(x, 2, 2)["standard deviation"]
    torch.testing.assert_close(deviation, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))


def row(name: str, group: str, seed: int, tokens: float, psnr: float) -> dict:
    numbers = {"raw_bits": 1, "entropy_bits": 1, "prior_bits": "", "ssim": 1, "usage": 1}
    own = {"name": name, "group": group, "seed": seed, "length": "", "tokens": tokens}
    return {**own, "psnr": psnr, **numbers}


def test_margins_compare_at_the_peers_own_rate_and_never_beyond_what_was_measured() -> None:
    rows = [
        row("a", "ours", 0, 64, 20.0),
        row("a2", "ours", 0, 256, 22.0),
        row("peer", "theirs", 0, 128, 20.5),
        row("far", "theirs", 0, 512, 30.0),
    ]
    assert quality_at(rows, "ours", 0, "tokens", 128) == pytest.approx(21.0)
    peer, far = (next(p for p in average(rows) if p["name"] == n) for n in ("peer", "far"))
    assert margins(rows, peer, "ours", "tokens") == pytest.approx([0.5])
    assert margins(rows, far, "ours", "tokens") == [None]
    # 20.5 dB lies a quarter of the way from 64 to 256 codes in their logarithm.
    assert codes_at(rows, "ours", 0, 20.5) == pytest.approx(64 * 4**0.25)
    assert savings(rows, peer, "ours") == pytest.approx([100 * (1 - 64 * 4**0.25 / 128)])
    assert savings(rows, far, "ours") == [None]


def test_a_seed_without_comparison_is_named() -> None:
    assert cell([0.5, None, 1.5], 2) == "+1.00 ± 0.71 (2 of 3 seeds)"
    assert cell([None], 2) == ""


@pytest.mark.parametrize("length", [1.5, 2.5])
def test_a_lambda_gives_the_mean_length_that_is_wanted(plan, length) -> None:
    model = build_tokenizer(plan, contenders(16, 8)["rate-one"])
    images = [torch.rand(8, 3, 32, 32) * 2 - 1 for _ in range(2)]
    for x in images:
        model.train().quantize(model.encode_to_prequant(x))
    set_rate_for_mean(model.eval(), images, length)
    codes = torch.cat([model.encode_to_codes(x) for x in images])
    assert float((codes >= 0).sum(dim=-1).float().mean()) == pytest.approx(length, rel=0.15)
