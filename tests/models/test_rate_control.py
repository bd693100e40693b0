"""A trained loopy tokenizer is used at any rate, image by image."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.models import DDCONFIG, GAN, LOOPY, PLAIN, images, trainer
from torchmetrics.functional.image import peak_signal_noise_ratio

from taming.codec.files import Codec
from taming.models.vqgan import VQModel
from taming.modules.batches import pixels_inside
from taming.modules.vqvae.rate import fewest_codes
from taming.pictures import pad, psnr_of
from taming.tokenizer import Tokenizer

SITES = 64


def pictures() -> torch.Tensor:
    """Five smooth images, such that more codes give better ones."""
    noise = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(noise, size=(16, 16), mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def model() -> VQModel:
    """A slightly trained tokenizer, whose decoder distinguishes good codes from bad ones."""
    torch.manual_seed(0)
    tokenizer = VQModel(DDCONFIG, PLAIN, 16, 4, quantizer_config=LOOPY)
    tokenizer.learning_rate = 1e-2
    x = pictures()
    optimizer = tokenizer.configure_optimizers()[0][0]
    for _ in range(150):
        x_rec, loss = tokenizer(x)
        optimizer.zero_grad()
        ((x_rec - x).square().mean() + loss).backward()
        optimizer.step()
    return tokenizer.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return pictures()


def codes(quantized) -> torch.Tensor:
    return quantized.info.encodings.lengths.sum((1, 2))


def psnr(model: VQModel, quantized, x: torch.Tensor) -> torch.Tensor:
    x_rec = model.decode(quantized.z_q).clamp(-1, 1)
    return peak_signal_noise_ratio(x_rec, x, data_range=2.0, dim=(1, 2, 3), reduction="none")


@torch.no_grad()
def test_a_smaller_threshold_writes_more_codes(model, x) -> None:
    few, many = (model.encode(x, threshold=t * model.quantize.latent_std) for t in (0.5, 0.05))
    assert (codes(few) < codes(many)).all()


@torch.no_grad()
def test_max_codes_hold_for_each_image_whatever_its_batch(model, x) -> None:
    wanted = torch.tensor([64, 80, 100, 120, 1000])
    together = model.encode(x, max_codes=wanted)
    assert (codes(together) <= wanted).all() and codes(together)[0] == SITES
    for i, amount in enumerate(wanted.tolist()):
        alone = model.encode_to_codes(x[i : i + 1], max_codes=amount)
        assert torch.equal(alone[0], together.info.indices[i])
    alias = model.encode(x, max_tokens=wanted)
    assert torch.equal(alias.info.indices, together.info.indices)


@torch.no_grad()
def test_a_psnr_is_of_the_range_of_the_input(model, x, monkeypatch) -> None:
    monkeypatch.setattr(VQModel, "value_range", (0.0, 1.0))
    x = x / 2 + 0.5
    everything = model.encode(x, max_codes=SITES * model.quantize.max_loops)
    error = (model.decode(everything.z_q).clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
    reached = model.encode(x, target_psnr=-10 * error.log10() + 6)  # none does
    assert torch.equal(reached.info.indices, everything.info.indices)
    fewer = model.encode(x, target_psnr=-10 * error.log10() - 6)
    assert (codes(fewer) < codes(everything)).all()


@torch.no_grad()
def test_a_psnr_is_reached_with_the_fewest_codes(model, x) -> None:
    budgets = torch.linspace(SITES, SITES * model.quantize.max_loops, 9).long()
    target = psnr(model, model.encode(x, max_codes=int(budgets[3])), x) - 1e-3
    quantized = model.encode(x, target_psnr=target)
    whole = codes(quantized) == SITES * model.quantize.max_loops
    assert ((psnr(model, quantized, x) >= target) | whole).all()
    assert (codes(quantized) <= budgets[4]).any()


@torch.no_grad()
def test_a_psnr_is_of_the_picture_and_not_of_what_extends_it(model, x) -> None:
    sizes = torch.tensor([[15, 16], [16, 11], [9, 15], [7, 8], [12, 12]])
    inside = pixels_inside(x, sizes)[:, None]
    x = x.where(inside, torch.rand_like(x) * 2 - 1)  # which no code brings near

    def own(codes: torch.Tensor) -> torch.Tensor:
        shown = zip(model.decode_code(codes).clamp(-1, 1), x, sizes, strict=True)
        return torch.tensor([psnr_of(a[:, :h, :w], b[:, :h, :w]) for a, b, (h, w) in shown])

    target = own(model.encode_to_codes(x, max_codes=120)) - 1e-3
    found = model.encode_to_codes(x, target_psnr=target, size=sizes)
    whole = (found >= 0).flatten(1).all(dim=1)  # out of reach
    assert ((own(found) >= target) | whole).all() and not whole.all()


@torch.no_grad()
def test_a_tokenizer_reaches_the_psnr_of_a_picture_of_any_size(model, x) -> None:
    cut = x[:, :, :15, :15].clone()
    cut[:, :, 13] = torch.rand(5, 3, 15) * 2 - 1  # the row that is repeated to fill a site
    tokenizer = Tokenizer(model)
    for picture, codes in zip(cut, tokenizer.encode([*cut], target_psnr=17.5), strict=True):
        found, size = Codec(model).unpack(tokenizer.compress(picture, psnr=17.5))
        padded = pad(picture, model.factor)[None]
        alone = model.encode_to_codes(padded, target_psnr=17.5, size=size)[0]
        assert torch.equal(codes.indices, alone) and torch.equal(codes.indices, found)
        whole = model.encode_to_codes(padded, target_psnr=17.5)
    assert (whole >= 0).sum() > len(codes)


@torch.no_grad()
def test_a_psnr_takes_one_walk_and_nine_decoded_batches(model, x, monkeypatch) -> None:
    target, calls = psnr(model, model.encode(x, max_codes=130), x), Counter()

    def count(part, method: str) -> None:
        original = getattr(part, method)

        def counted(*given):
            calls[method] += 1
            return original(*given)

        monkeypatch.setattr(part, method, counted)

    count(model.quantize.transform, "search")
    count(model.decoder, "forward")
    model.encode(x, target_psnr=target)
    assert calls["search"] == 1 and 1 <= calls["forward"] <= 9


def test_a_wide_range_is_searched_to_a_256th_of_it() -> None:
    needed, calls = torch.tensor([4096, 4097, 9000, 16000, 16384]), []

    def quality(budgets: torch.Tensor) -> torch.Tensor:
        calls.append(budgets)
        return (budgets >= needed).float()

    found = fewest_codes(quality, torch.ones(5), sites=4096, max_loops=4)
    assert len(calls) == 9
    assert (found >= needed).all() and (found - needed <= 3 * 4096 / 256).all()


@torch.no_grad()
def test_where_a_psnr_is_out_of_reach_all_turns_are_taken(model, x) -> None:
    whole = SITES * model.quantize.max_loops
    everything = model.encode(x, max_codes=whole)
    assert torch.equal(model.encode(x, target_psnr=99.0).info.indices, everything.info.indices)


def test_bisection_finds_the_least_that_reaches_a_monotone_quality() -> None:
    needed = torch.tensor([4, 5, 11, 12, 99])
    found = fewest_codes(lambda n: (n >= needed).float(), torch.ones(5), sites=4, max_loops=3)
    assert found.tolist() == [4, 5, 11, 12, 12]


def test_what_bisection_finds_reaches_the_target_though_quality_goes_up_and_down() -> None:
    quality = torch.tensor([0.0] * 20 + [5.0, 4.0, 1.0, 5.0] * 20)
    found = fewest_codes(lambda n: quality[n], torch.full((3,), 4.5), sites=10, max_loops=8)
    assert (quality[found] >= 4.5).all() and (found < 80).all()


@torch.no_grad()
def test_bits_by_the_tables_are_never_above_a_target_whatever_the_batch(model, x) -> None:
    least, most = (model.bits_of(model.encode_to_codes(x, rate=rate)) for rate in (1e9, 0.0))
    target = least + torch.tensor([0.0, 0.3, 0.6, 0.9, 2.0]) * (most - least)
    together = model.encode_to_codes(x, target_bits=target)
    assert (model.bits_of(together) <= target).all()
    assert torch.equal(together, model.encode(x, target_bits=target).info.indices)
    for i in range(5):
        alone = model.encode_to_codes(x[i : i + 1], target_bits=float(target[i]))
        assert torch.equal(alone[0], together[i])


@torch.no_grad()
def test_a_larger_rate_has_fewer_bits_and_a_lower_psnr(model, x) -> None:
    encoded = [model.encode(x, rate=rate) for rate in (1e-4, 1e-2, 1.0)]
    bits = torch.stack([model.bits_of(own.info.indices) for own in encoded]).mean(dim=1)
    quality = torch.stack([psnr(model, own, x) for own in encoded]).mean(dim=1)
    assert (bits.diff() < 0).all() and (quality.diff() < 0).all()
    each = torch.tensor([1e-4, 1e-2, 1.0, 1e-2, 1e-4])
    mixed = model.encode_to_codes(x, rate=each)
    assert torch.equal(mixed[1], encoded[1].info.indices[1])


def test_rates_that_make_no_sense_are_refused(model, x) -> None:
    with pytest.raises(ValueError, match="give one rate, got threshold and max_codes"):
        model.encode(x, threshold=1.0, max_codes=100)
    with pytest.raises(ValueError, match="got .*max_codes.*max_tokens"):
        model.encode(x, max_codes=100, max_tokens=200)
    with pytest.raises(ValueError, match="target quality must be .* each of 5 images"):
        model.encode(x, target_psnr=torch.tensor([20.0, 30.0]))
    with pytest.raises(ValueError, match="target_psnr must be a number of dB, got nan"):
        model.encode(x, target_psnr=float("nan"))
    with pytest.raises(ValueError, match="64 sites.* 64 .*3"):
        model.encode(x, max_codes=3)
    plain = VQModel(DDCONFIG, PLAIN, 16, 4)
    with pytest.raises(ValueError, match="VectorQuantizer2 has a fixed rate.*max_codes"):
        plain.encode(x, max_codes=100)
    with pytest.raises(ValueError, match="target_psnr .*eval mode"):
        VQModel(DDCONFIG, PLAIN, 16, 4, quantizer_config=LOOPY).encode(x, target_psnr=20.0)


@pytest.mark.parametrize("lossconfig", [GAN, PLAIN], ids=["gan", "plain"])
def test_learning_rates_follow_the_schedule_by_generator_steps(tmp_path, lossconfig) -> None:
    schedule = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {
            "warm_up_steps": 2,
            "lr_start": 0.1,
            "lr_max": 1.0,
            "lr_min": 0.0,
            "max_decay_steps": 10,
        },
    }
    tokenizer = VQModel(DDCONFIG, lossconfig, 16, 4, scheduler_config=schedule)
    tokenizer.learning_rate, tokenizer.accumulate_grad_batches = 1e-3, 2
    fit = trainer(tmp_path)
    fit.fit(tokenizer, images(16), images(2))
    assert fit.global_step == 4 and len(fit.optimizers) == (2 if lossconfig is GAN else 1)
    for optimizer in fit.optimizers:
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(1e-3 * tokenizer.schedule(4))
