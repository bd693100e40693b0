"""The PixelCNN prior measures what its tokenizer writes, and everything it draws decodes."""

import math

import pytest
import torch
from support.caches import write_cache
from support.models import every_tokenizer, images, tokenizer_config, trainer
from support.models import prior as transformer_prior
from torch.utils.data import DataLoader

from taming.data.token_files import CacheInfo
from taming.data.tokens import TokenCache
from taming.data.utils import custom_collate
from taming.models.pixelcnn import PixelCNNPrior
from taming.models.sampling import Progress
from taming.modules.transformer.generate import SamplingParams, generators_of

STACKS = {
    "target": "taming.modules.pixelcnn.stacks.GatedStacks",
    "params": {"channels": 8, "layers": 2},
}
LABELS = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
PICTURES = {"inputs", "reconstructions", "samples_half", "samples_nopix", "samples_det"}
SIDE = 8  # sites of a tiny image


def prior(kind: str = "residual", **kwargs) -> PixelCNNPrior:
    """A small prior whose tokenizer spreads latents over its codes."""
    built = PixelCNNPrior(tokenizer_config(kind), STACKS, **kwargs)
    with torch.no_grad():
        quantize = built.first_stage_model.quantize
        quantize.embedding.weight.copy_(torch.randn(16, 4) * 0.5)
    return built


@every_tokenizer
def test_training_lowers_the_bits_and_leaves_the_tokenizer(kind: str, tmp_path) -> None:
    model = prior(kind)
    frozen = {k: v.clone() for k, v in model.first_stage_model.state_dict().items()}
    model.learning_rate = 3e-3
    fit = trainer(tmp_path, max_epochs=8)
    fit.fit(model.train(), images(8, 4), images(4, 4))
    for name, value in model.first_stage_model.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    assert not model.first_stage_model.training
    logged = {k.removeprefix("val/"): v for k, v in fit.callback_metrics.items() if "val/" in k}
    bits = logged["bits_per_token"]
    torch.testing.assert_close(bits, logged["loss"] / math.log(2))
    torch.testing.assert_close(bits * logged["tokens_per_image"], logged["bits_per_image"])
    torch.testing.assert_close(logged["bits_per_image"] / 16**2, logged["bits_per_pixel"])
    x = next(iter(images(4, 4)))["image"].permute(0, 3, 1, 2)
    codes = model.encode_codes(x)
    _, lengths = model.first_stage_model.quantize.sequence.encode(codes)
    assert logged["tokens_per_image"] == lengths.float().mean()
    symbols = model.pixelcnn.site.of_codes(codes)
    values = torch.tensor(model.pixelcnn.site.sizes, dtype=torch.float32)
    uniform = torch.where(symbols >= 0, values.log2(), 0).sum() / 4
    assert logged["bits_per_image"] < uniform


@every_tokenizer
def test_its_numbers_are_those_that_a_transformer_logs(kind: str, tmp_path) -> None:
    """The same names and the same count of tokens, so that bits can be compared."""
    models, numbers = (prior(kind), transformer_prior(kind)), []
    for model in models:
        model.first_stage_model.load_state_dict(models[0].first_stage_model.state_dict())
        numbers += trainer(tmp_path).validate(model, images(4, 4), verbose=False)
    one, other = numbers
    assert one.keys() == other.keys()
    assert one["val/tokens_per_image"] == other["val/tokens_per_image"]
    for logged in numbers:
        per_image = logged["val/bits_per_token"] * logged["val/tokens_per_image"]
        assert logged["val/bits_per_image"] == pytest.approx(per_image)
        assert logged["val/bits_per_pixel"] == pytest.approx(per_image / 16**2)


def test_cached_tokens_cost_the_same_as_their_images(tmp_path) -> None:
    model, data = prior(cond_stage_config=LABELS).eval(), images(4, 4)
    sequence = model.first_stage_model.quantize.sequence
    info = CacheInfo(model.fingerprint, sequence.vocab_size, 2)
    codes = torch.cat([model.encode_codes(model.get_xc(batch)[0]) for batch in data])
    labels = {"class_label": torch.cat([batch["class_label"] for batch in data]).tolist()}
    write_cache(tmp_path / "cache", sequence.encode(codes)[0], labels, info, [(16, 16)])
    cache = TokenCache(str(tmp_path / "cache"))
    cached = DataLoader(cache, batch_size=4, collate_fn=custom_collate)
    numbers = [trainer(tmp_path).validate(model, d, verbose=False) for d in (data, cached)]
    assert numbers[0] == numbers[1]
    assert set(model.log_images(next(iter(cached)))) == PICTURES - {"inputs"}


@every_tokenizer
def test_an_image_has_the_same_likelihood_alone_and_in_a_batch(kind: str) -> None:
    model, x = prior(kind).eval(), torch.rand(3, 3, 16, 16)
    x[1] = 0.5  # a flat image has fewer codes than its neighbours
    with torch.no_grad():
        nats, lengths = model(x, x)
        alone = [model(image[None], image[None]) for image in x]
    torch.testing.assert_close(nats, torch.cat([each for each, _ in alone]))
    assert torch.equal(lengths, torch.cat([each for _, each in alone]))


@every_tokenizer
def test_pictures_of_a_batch(kind: str) -> None:
    pictures = prior(kind).eval().log_images(next(iter(images(3, 3))))
    assert set(pictures) == PICTURES
    assert all(picture.shape == (3, 3, 16, 16) for picture in pictures.values())


@every_tokenizer
def test_a_mask_says_what_is_known(kind: str) -> None:
    model = prior(kind).eval()
    given = model.encode_codes(torch.rand(2, 3, 16, 16))
    known = torch.rand(SIDE, SIDE) < 0.7
    before, labels = given.clone(), torch.zeros(2, 1, dtype=torch.int64)
    codes = model.sample_codes(labels, codes=given, known=known)
    assert torch.equal(given, before)
    assert torch.equal(codes[:, known], given[:, known])
    assert not torch.equal(codes[:, ~known], given[:, ~known])


def test_an_image_does_not_depend_on_the_others_drawn_with_it() -> None:
    model = prior().eval()

    def drawn(images: range) -> torch.Tensor:
        labels = torch.zeros(len(images), 1, dtype=torch.int64)
        return model.sample_codes(labels, SamplingParams(generators=generators_of(3, images)))

    together = drawn(range(5))
    assert torch.equal(together, torch.cat([drawn(range(2)), drawn(range(2, 5))]))
    assert not torch.equal(together[0], together[1])


@every_tokenizer
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.7, 3, 0.9), SamplingParams(greedy=True)]
)
def test_every_sample_decodes_on_any_grid(kind: str, params: SamplingParams) -> None:
    model, grid = prior(kind).eval(), (3, 11)
    codes = model.sample_codes(torch.zeros(5, 1, dtype=torch.int64), params, grid=grid)
    assert model.decode_codes(codes).shape == (5, 3, 6, 22)
    sequence = model.sequence
    assert torch.equal(sequence.decode(sequence.encode(codes)[0], grid), codes)
    if kind == "plain":
        assert codes.max() < 16 and codes.shape[-1] == 1
    elif not params.greedy:
        assert len((codes >= 0).sum(dim=-1).unique()) == 3  # all lengths occur


@every_tokenizer
def test_completion_keeps_what_is_known_and_counts_what_is_drawn(kind: str) -> None:
    model, x = prior(kind).eval(), torch.rand(2, 3, 16, 16)
    assert model.grid == (SIDE, SIDE)
    given = model.encode_codes(x)
    seen, latest = [], given

    def follow(progress: Progress) -> None:
        nonlocal latest
        latest = progress.codes()
        seen.append((progress.tokens, progress.most, progress.sites()))
        flat = progress.codes().flatten(1, 2)
        assert (flat[:, : progress.sites(), 0] >= 0).all()
        assert (flat[:, progress.sites() :, 0] == 0).all()

    labels = torch.zeros(2, 1, dtype=torch.int64)
    codes = model.sample_codes(labels, codes=given, known=30, callback=follow)
    known = torch.arange(SIDE**2) < 30
    assert torch.equal(codes.flatten(1, 2)[:, known], given.flatten(1, 2)[:, known])
    assert not torch.equal(codes, given)
    most = model.sequence.site_tokens
    left = SIDE**2 - 30
    assert seen == [(n * most, left * most, 30 + n) for n in range(1, left + 1)]
    assert torch.equal(latest, codes)


def test_known_sites_after_the_last_unknown_one_cost_nothing() -> None:
    model = prior().eval()
    given = model.encode_codes(torch.rand(2, 3, 16, 16))
    labels, columns = torch.zeros(2, 1, dtype=torch.int64), []
    known = torch.ones(SIDE, SIDE, dtype=torch.bool)
    known[0, 2] = known[0, 4] = False
    horizontal = model.pixelcnn.stacks.layers[0].horizontal
    horizontal.register_forward_hook(lambda *_: columns.append(1))
    codes = model.sample_codes(labels, codes=given, known=known)
    assert len(columns) == 5
    assert torch.equal(codes[:, known], given[:, known])
    known[:] = True
    assert torch.equal(model.sample_codes(labels, codes=given, known=known), given)
    assert len(columns) == 5


def test_the_filters_cut_off_what_is_unlikely() -> None:
    model, labels = prior().eval(), torch.zeros(4, 1, dtype=torch.int64)
    drawn = {
        params: model.sample_codes(labels, params)
        for params in (
            SamplingParams(greedy=True),
            SamplingParams(top_k=1),
            SamplingParams(top_p=1e-6),
            SamplingParams(),
        )
    }
    greedy, top_k, top_p, free = drawn.values()
    assert torch.equal(greedy, top_k) and torch.equal(greedy, top_p)
    assert not torch.equal(greedy, free)


def test_a_class_changes_what_is_likely(tmp_path) -> None:
    model = prior(cond_stage_config=LABELS)
    model.learning_rate = 1e-3
    trainer(tmp_path, max_epochs=2).fit(model, images(8, 4), images(4, 4))
    x = next(iter(images(4, 4)))["image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        one, other = (model.eval()(x, torch.full((4,), label))[0] for label in (1, 7))
    assert (one != other).all()
    with pytest.raises(ValueError, match="labels from 3 to 10 .*n_classes 10"):
        model(x[:2], torch.tensor([3, 10]))


def test_guidance_is_refused() -> None:
    model, labels = prior().eval(), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="PixelCNNPrior .*guidance.* 2"):
        model.sample_codes(labels, SamplingParams(guidance=2.0))


def test_only_weights_of_layers_decay_and_a_schedule_scales() -> None:
    schedule = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {
            "warm_up_steps": 4,
            "lr_min": 0.1,
            "lr_max": 1.0,
            "lr_start": 0.5,
            "max_decay_steps": 20,
        },
    }
    model = prior(scheduler_config=schedule)
    model.learning_rate = 1e-3
    (optimizer,), (scheduler,) = model.configure_optimizers()
    assert scheduler["interval"] == "step"
    decay, rest = optimizer.param_groups
    assert decay["weight_decay"] == 0.01 and rest["weight_decay"] == 0.0
    assert decay["lr"] == rest["lr"] == 0.5e-3
    total = sum(p.numel() for p in decay["params"] + rest["params"])
    assert total == sum(p.numel() for p in model.pixelcnn.parameters())
    assert model.pixelcnn.embed.table.weight.data_ptr() in {p.data_ptr() for p in rest["params"]}


@pytest.mark.parametrize(
    "config",
    [
        "__is_first_stage__",
        {"target": "taming.modules.util.SOSProvider", "params": {"sos_token": 0}},
    ],
)
def test_conditions_that_are_no_classes_are_refused(config) -> None:
    with pytest.raises(ValueError, match="target .*Labelator"):
        prior(cond_stage_config=config)
