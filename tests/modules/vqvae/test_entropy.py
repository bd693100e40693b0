"""Laws of the tables of entropy."""

import math

import pytest
import torch
from torch import Tensor

from taming.modules.vqvae.entropy import UNIFORM, EntropyTables, Price
from taming.modules.vqvae.loopy import LoopyVectorQuantizer

K, T = 6, 4
LOOSE = {"atol": 0.02, "rtol": 0.0}  # float32 at 100 has 5 digits of a tenth


def sites(n: int, dummies: bool = False, share: float = 0.6) -> Tensor:
    """Valid codes (N, T) of loops that go on with a probability; low codes are more frequent."""
    codes = (torch.rand(n, T) ** 2 * K).long()
    lengths = 1 + (torch.rand(n, T - 1) < share).int().cumprod(dim=1).sum(dim=1)
    turn = torch.arange(1, T + 1)
    if dummies:
        codes = torch.where(turn < lengths[:, None], K, codes)
    return torch.where(turn > lengths[:, None], -1, codes)


def spelled_bits(tables: EntropyTables, codes: Tensor) -> list[float]:
    """The definition, one site and one turn at a time."""
    bits = []
    for site in codes.tolist():
        written = [code for code in site if code >= 0]
        total = 0.0
        for turn, code in enumerate(written):
            if code < K:
                share = (1 - UNIFORM) * float(tables.codes[turn, code]) + UNIFORM / K
                total -= math.log2(share)
            on = (1 - UNIFORM) * float(tables.going_on[turn]) + UNIFORM / 2
            if turn < T - 1:
                total -= math.log2(on if turn < len(written) - 1 else 1 - on)
        bits.append(total)
    return bits


every_form = pytest.mark.parametrize("dummies", [False, True], ids=["codes", "dummies"])


@every_form
def test_bits_are_those_of_the_definition(dummies: bool) -> None:
    tables, codes = EntropyTables(K, T, dummies), sites(40, dummies)
    for _ in range(2):
        expected = torch.tensor(spelled_bits(tables, codes))
        torch.testing.assert_close(tables.bits(codes), expected)
        tables.count(sites(300, dummies))


@every_form
def test_uniform_tables_say_log2_of_k_for_a_code_and_one_bit_for_each_choice(dummies) -> None:
    tables, codes = EntropyTables(K, T, dummies), sites(50, dummies)
    lengths = (codes >= 0).sum(dim=1)
    written = torch.ones_like(lengths) if dummies else lengths
    expected = written * math.log2(K) + lengths.clamp(max=T - 1)
    torch.testing.assert_close(tables.bits(codes), expected.float())
    assert not tables.learned


@every_form
def test_probabilities_of_all_sites_that_can_be_sum_to_one(dummies: bool) -> None:
    tables = EntropyTables(3, 3, dummies)
    codes = sites(200, dummies).clamp(max=3 if dummies else 2)[:, :3]
    if dummies:
        last = (codes >= 0).sum(dim=1) - 1
        codes[torch.arange(200), last] = codes[torch.arange(200), last].clamp(max=2)
    tables.count(codes)
    every = []
    for length in (1, 2, 3):
        free = 1 if dummies else length
        for number in range(3**free):
            own = [number // 3**i % 3 for i in range(free)]
            every.append([3] * (length - free) + own + [-1] * (3 - length))
    total = (-tables.bits(torch.tensor(every))).exp2().sum()
    assert total == pytest.approx(1.0, abs=1e-5)


def test_ends_are_finite_except_going_on_after_the_last_turn() -> None:
    tables = EntropyTables(K, T)
    for codes in (torch.tensor([[0, -1, -1, -1]]), torch.tensor([[0, 1, 2, 3]])):
        tables.count(codes.repeat(50, 1), alpha=0.0)
        ends = tables.end_bits()
        assert ends[:-1].isfinite().all() and ends[-1].tolist() == [0.0, math.inf]
        assert tables.code_bits().isfinite().all() and tables.code_bits().dtype == torch.float32


@every_form
def test_counting_gives_the_shares_of_the_codes(dummies: bool) -> None:
    tables, codes = EntropyTables(K, T, dummies), sites(500, dummies)
    tables.count(codes.view(5, 10, 10, T), alpha=0.0)
    for turn in range(T):
        found = codes[:, turn][(codes[:, turn] >= 0) & (codes[:, turn] < K)]
        share = torch.bincount(found, minlength=K) / max(len(found), 1)
        torch.testing.assert_close(tables.codes[turn], share)
        on = float((codes[:, turn + 1] >= 0).sum()) if turn < T - 1 else 0.0
        taken = float((codes[:, turn] >= 0).sum())
        assert float(tables.going_on[turn]) == pytest.approx(on / taken)
    assert tables.learned


def test_no_tables_say_the_codes_they_were_counted_from_in_fewer_bits() -> None:
    codes, own, other = sites(2000), EntropyTables(K, T), EntropyTables(K, T)
    own.count(codes, alpha=0.0)
    other.count(sites(2000, share=0.3))
    uniform = EntropyTables(K, T).bits(codes).mean()
    assert own.bits(codes).mean() < other.bits(codes).mean() < uniform


@every_form
def test_learning_is_counting_over_the_batches_weighted_by_their_age(dummies: bool) -> None:
    """Also where few sites of a batch take a turn, or none: no mean of shares."""
    learned, counted = EntropyTables(K, T, dummies), EntropyTables(K, T, dummies)
    batches = [sites(64, dummies, share) for share in (0.7, 0.0, 0.2, 0.5)]
    for number, batch in enumerate(batches):
        learned.learn(batch, 0.0 if number == 0 else 0.5)
    weights = [1, 1, 2, 4]  # of eight
    whole = [batch for batch, weight in zip(batches, weights, strict=True) for _ in range(weight)]
    counted.count(torch.cat(whole), alpha=0.0)
    torch.testing.assert_close(learned.codes, counted.codes)
    torch.testing.assert_close(learned.going_on, counted.going_on)


def test_a_turn_that_no_site_took_keeps_its_shares() -> None:
    tables = EntropyTables(K, T)
    tables.learn(torch.tensor([[0, 1, -1, -1], [0, -1, -1, -1]]), 0.0)
    assert torch.equal(tables.codes[2:], torch.full((2, K), 1 / K))
    assert tables.going_on.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_bits_of_images_are_the_sums_over_their_sites() -> None:
    tables, codes = EntropyTables(K, T), sites(24)
    tables.count(sites(100))
    bits = tables.bits(codes).double()
    found = tables.bits_of_images(codes.view(2, 3, 4, T))
    torch.testing.assert_close(found, bits.view(2, 12).sum(dim=1))
    assert tables.bits_of_images(codes[:0].view(0, 3, 4, T)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_counts_that_half_precision_cannot_hold_are_counted(dtype: torch.dtype) -> None:
    whole, half = EntropyTables(K, T), EntropyTables(K, T).to(dtype)
    assert not half.learned
    codes = sites(1000).repeat(100, 1)
    for tables in (whole, half):
        tables.count(codes)
        tables.learn(codes[:500], 0.9)
    torch.testing.assert_close(half.codes.float(), whole.codes, atol=4e-3, rtol=0)
    assert half.bits(codes).dtype == torch.float32


def quantizer(**kwargs) -> LoopyVectorQuantizer:
    return LoopyVectorQuantizer(K, 3, threshold=0.3, max_loops=T, start_batches=0, **kwargs)


def test_a_checkpoint_without_tables_loads_with_uniform_ones_and_nothing_else_may_lack() -> None:
    trained, other = quantizer().train(), quantizer().train()
    for each in (trained, other):
        each(torch.randn(100, 3))
        assert each.entropy.learned
    state = trained.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.entropy.codes, trained.entropy.codes)
    old = {key: value for key, value in state.items() if not key.startswith("entropy.")}
    assert len(old) == len(state) - 2
    other.load_state_dict(old)
    assert not other.entropy.learned and torch.equal(other.latent_std, trained.latent_std)
    assert old.keys() == {key for key in state if not key.startswith("entropy.")}
    for key in ("latent_std", "embedding.usage", "entropy.codes", "entropy.going_on"):
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*{key}"):
            other.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="size mismatch for entropy.codes"):
        other.load_state_dict({**state, "entropy.codes": torch.ones(T, K + 1)})


def test_training_learns_the_shares_of_its_codes() -> None:
    learner, tables = quantizer().train(), EntropyTables(K, T)
    codes = learner(torch.randn(2, 3, 8, 8)).info.indices
    tables.learn(codes.flatten(0, 2), 0.0)
    assert torch.equal(learner.entropy.codes, tables.codes)
    assert torch.equal(learner.entropy.going_on, tables.going_on)
    kept = learner.entropy.codes.clone()
    learner.eval()(torch.randn(2, 3, 8, 8))
    assert torch.equal(learner.entropy.codes, kept)


def test_expected_bits_do_not_depend_on_where_the_latents_lie() -> None:
    bits, seen, residual = 8 * torch.rand(2, 32), 0.1 * torch.randn(32, 4), 0.1 * torch.randn(9, 4)
    price = Price(bits, 0.01 * torch.rand(9))
    near = price.expected_bits(residual, seen, 1)
    torch.testing.assert_close(price.expected_bits(residual + 100, seen + 100, 1), near, **LOOSE)
