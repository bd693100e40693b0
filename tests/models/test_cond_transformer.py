"""The prior equals the original, ignores padding, and samples what decodes."""

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.caches import write_cache
from support.models import TRANSFORMS, every_tokenizer, images, prior, tokenizer_config, trainer
from support.original import load_golden
from torch import Tensor
from torch.utils.data import DataLoader

from taming.data.token_files import CacheInfo
from taming.data.tokens import TokenCache
from taming.data.utils import custom_collate
from taming.modules.vqvae.transforms import Residual
from taming.util import DataError, NonFiniteError


@pytest.mark.parametrize("name", ["net2net_class", "net2net_uncond"])
def test_equals_the_original(name: str, shared) -> None:
    golden = load_golden(shared, name)
    model, io = golden.build(), golden.io
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        c = io.get("c", io["x"])
        c = c[:, 0] if name == "net2net_class" else c
        logits, target = model(io["x"], c)
        assert torch.equal(target, io["target"])
        torch.testing.assert_close(logits, io["logits"], **close)
        if name == "net2net_class":
            quant, z_indices = model.encode_to_z(io["x"])
            _, c_indices = model.encode_to_c(c)
            assert torch.equal(z_indices, io["z_indices"])
            assert torch.equal(c_indices, io["c_indices"])
            decoded = model.decode_to_img(z_indices, quant.shape)
            torch.testing.assert_close(decoded, io["decoded"], **close)
            greedy = model.sample(z_indices[:, :250], c_indices, steps=6)
            assert torch.equal(greedy, io["greedy"])
            greedy = model.sample(z_indices[:, :0], c_indices, steps=6)
            assert torch.equal(greedy, io["greedy_with_past"])
            logits, _ = model.transformer(z_indices[:, :20], embeddings=io["embeddings"])
            torch.testing.assert_close(logits, io["logits_with_embeddings"], **close)


@every_tokenizer
def test_tokens_decode_to_the_reconstruction(kind: str) -> None:
    model, x = prior(kind).eval(), torch.rand(3, 3, 16, 16)
    quant, tokens = model.encode_to_z(x)
    expected = model.first_stage_model.decode(quant)
    torch.testing.assert_close(model.decode_to_img(tokens, quant.shape), expected)


@every_tokenizer
def test_an_order_of_sites_is_undone(kind: str) -> None:
    order = {
        "target": "taming.modules.transformer.permuter.SpiralIn",
        "params": {"H": 8, "W": 8},
    }
    model, x = prior(kind, permuter_config=order).eval(), torch.rand(3, 3, 16, 16)
    quant, tokens = model.encode_to_z(x)
    expected = model.first_stage_model.decode(quant)
    torch.testing.assert_close(model.decode_to_img(tokens, quant.shape), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch.compile itself
@pytest.mark.parametrize("levels", [1, 2])
def test_compiled_blocks_compute_the_same_and_sampling_does_not_use_them(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    sizes = {"site_shape": (8, 8, 4)}
    plain, compiled = prior("plain", sizes, levels), prior("plain", sizes, levels, compile=True)
    compiled.load_state_dict(plain.state_dict())
    _, tokens = plain.encode_to_z(torch.rand(2, 3, 16, 16))
    condition = torch.zeros(2, 1, dtype=torch.int64)
    nats = [each.nll(tokens, condition, (8, 8)) for each in (plain, compiled)]
    assert len(graphs) >= levels
    torch.testing.assert_close(*nats, rtol=1e-5, atol=1e-4)
    amount = len(graphs)
    compiled.eval().sample(tokens[:, :60], condition, grid=(8, 8))
    assert len(graphs) == amount


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_a_place_is_that_of_the_site_whatever_the_order(levels: int) -> None:
    order = {"target": "taming.modules.transformer.permuter.SpiralIn", "params": {"H": 8, "W": 8}}
    model = prior("plain", {"site_shape": (8, 8, 4)}, levels, permuter_config=order).eval()
    _, tokens = model.encode_to_z(torch.rand(2, 3, 16, 16))
    condition, seen = torch.zeros(2, 1, dtype=torch.int64), []
    model.transformer.site_emb.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.nll(tokens, condition, (8, 8))
    number = model.permuter(torch.arange(64)[None])[0]
    expected = torch.stack([number // 8, number % 8, torch.zeros_like(number)], dim=1)
    assert torch.equal(seen.pop(), expected.expand(2, -1, -1))
    model.sample(tokens[:, :20], condition, grid=(8, 8))
    assert (torch.cat(seen, dim=1) == expected).all()
    assert not any("site_order" in key for key in model.state_dict())


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_what_hides_a_class_takes_no_probability_from_images(levels: int) -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    given = {"cond_stage_config": labels, "cond_stage_key": "class_label"}
    model = prior("plain", levels=levels, condition_dropout=0.5, **given).eval()
    images = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    nats = model.nll(images, torch.full((256, 1), 3), (1, 2))
    torch.testing.assert_close(nats.neg().exp().sum(), torch.ones(()))


@every_tokenizer
@pytest.mark.parametrize("levels", [1, 2])
def test_likelihoods_are_those_of_the_logits_whatever_the_batch(kind: str, levels: int) -> None:
    model, x = prior(kind, levels=levels).eval(), torch.rand(4, 3, 16, 16)
    x[1] = 0.5  # a flat image has a shorter sequence than its neighbours
    with torch.no_grad():
        _, tokens = model.encode_to_z(x)
        _, condition = model.encode_to_c(x)
        nats = model.nll(tokens, condition, (8, 8))
        logits, target = model(x, x)
        picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        expected = -picked.masked_fill(target < 0, 0).sum(dim=1)
        torch.testing.assert_close(nats, expected)
        for row in range(4):
            own = tokens[row : row + 1, : int((tokens[row] >= 0).sum())]
            alone = model.nll(own, condition[:1], (8, 8))
            torch.testing.assert_close(alone[0], nats[row], rtol=1e-4, atol=1e-4)
    if kind != "plain":
        lengths = (tokens >= 0).sum(1)
        assert lengths.unique().numel() > 1


def test_bits_are_logged_per_token_image_and_pixel(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over batches of different size, whose images differ in tokens and in what these cost."""
    model, fit = prior().eval(), trainer(tmp_path)
    torch.nn.init.normal_(model.transformer.head.weight)

    def by_brightness(x: Tensor) -> Tensor:
        """A code for each site of which the image is bright, three for the others."""
        bright = x[:, 0, ::2, ::2, None] > 0
        return torch.where(bright & (torch.arange(3) > 0), -1, 5)

    monkeypatch.setattr(model, "encode_codes", by_brightness)
    brightness = torch.tensor([0.9, 0.5, 0.9, -0.9, -0.5])[:, None, None, None]
    x = torch.rand(5, 16, 16, 3) * 2 - 1 + brightness
    data = DataLoader([{"image": image} for image in x], batch_size=3)  # three and two
    (logged,) = fit.validate(model, data, verbose=False)
    with torch.no_grad():
        seen = [model.tokenize_batch(batch) for batch in data]
        nats = torch.cat([model.nll(s.tokens, s.condition, s.grid) for s in seen])
        tokens = sum(int((s.tokens >= 0).sum()) for s in seen)
    bits = float(nats.sum()) / math.log(2)
    expected = {
        "val/loss": float(nats.sum()) / tokens,
        "val/bits_per_token": bits / tokens,
        "val/bits_per_image": bits / 5,
        "val/bits_per_pixel": bits / 5 / 256,
        "val/tokens_per_image": tokens / 5,
    }
    assert logged == pytest.approx(expected, rel=1e-4)


@every_tokenizer
def test_losses_from_cached_tokens_are_those_from_images(kind: str, tmp_path) -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    order = {"target": "taming.modules.transformer.permuter.ZCurve", "params": {"H": 8, "W": 8}}
    model = prior(
        kind, cond_stage_config=labels, cond_stage_key="class_label", permuter_config=order
    ).eval()
    data, sequence = images(6, 3), model.first_stage_model.quantize.sequence
    info = CacheInfo(model.fingerprint, sequence.vocab_size, 2)
    codes = torch.cat([model.encode_codes(model.get_xc(batch)[0]) for batch in data])
    labels = {"class_label": torch.cat([batch["class_label"] for batch in data]).tolist()}
    write_cache(tmp_path / "cache", sequence.encode(codes)[0], labels, info, [(16, 16)])
    cached = DataLoader(
        TokenCache(str(tmp_path / "cache")), batch_size=3, collate_fn=custom_collate
    )
    results = [
        trainer(tmp_path / name).validate(model, loader, verbose=False)
        for name, loader in (("images", data), ("cached", cached))
    ]
    assert results[0] == results[1]
    pictures = model.log_images(next(iter(cached)))
    assert pictures["reconstructions"].shape == (3, 3, 16, 16)

    module = pl.LightningDataModule.from_datasets(val_dataset=cached.dataset)
    module.datasets = {"validation": cached.dataset}  # type: ignore[attr-defined]
    cached.dataset.table = None  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="or the tokenizer was trained further since"):
        trainer(tmp_path).validate(prior(kind), datamodule=module, verbose=False)
    del cached.dataset.table  # type: ignore[attr-defined]

    batch = next(iter(cached))
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint .* `taming encode`"):
        prior(kind).tokenize_batch(batch)
    both = batch | {"grid": torch.tensor([[8, 8], [4, 16], [8, 8]])}
    with pytest.raises(DataError, match="grids of .* sites"):
        model.tokenize_batch(both)
    model.cond_stage_key = "depth"
    with pytest.raises(ValueError, match="the token cache has no 'depth'.* only tokens, grid"):
        model.tokenize_batch(batch)


def test_bits_per_pixel_are_of_all_pixels_of_cached_tokens(tmp_path, monkeypatch) -> None:
    model, logged = prior("residual").eval(), dict[str, float]()
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: float(value)}))
    sequence = model.first_stage_model.quantize.sequence
    codes = torch.cat([model.encode_codes(model.get_xc(batch)[0]) for batch in images(3, 3)])
    info, sizes = (
        CacheInfo(model.fingerprint, sequence.vocab_size, 2),
        [(16, 16), (15, 15), (15, 16)],
    )
    write_cache(tmp_path / "cache", sequence.encode(codes)[0], {}, info, sizes)
    cached = DataLoader(
        TokenCache(str(tmp_path / "cache")), batch_size=3, collate_fn=custom_collate
    )
    with torch.no_grad():
        model.validation_step(next(iter(cached)), 0)
    pixels = sum(height * width for height, width in sizes)
    assert logged["val/bits_per_pixel"] == pytest.approx(3 * logged["val/bits_per_image"] / pixels)


@every_tokenizer
def test_codes_do_not_depend_on_the_precision_of_training(kind: str) -> None:
    model, x = prior(kind).eval(), torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.encode_codes(x)
        coarse = model.first_stage_model.encode(x).info.indices
    assert torch.equal(inside, model.encode_codes(x))
    assert not torch.equal(inside.flatten(), coarse.flatten())


def test_what_is_not_finite_stops_training(tmp_path) -> None:
    model = prior()
    with torch.no_grad():
        model.transformer.head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="train/loss is not finite at step 0"):
        fit = trainer(tmp_path, num_sanity_val_steps=0)
        fit.fit(model, images(4, 4), images(4, 4))


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_a_tokenizer_is_known_by_the_weights_that_choose_its_codes(kind: str) -> None:
    tokenizer = prior(kind).first_stage_model
    marks = [tokenizer.fingerprint()]
    for part in (tokenizer.decoder, tokenizer.post_quant_conv):
        next(part.parameters()).data.add_(1)
        assert tokenizer.fingerprint() == marks[0]
    for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize):
        next(part.parameters()).data.add_(1)
        marks.append(tokenizer.fingerprint())
    assert len(set(marks)) == 4


def test_tables_of_entropy_leave_token_caches_valid() -> None:
    """Nor does it matter whether there are any, so caches from before there were stay valid."""
    tokenizer = prior("residual").first_stage_model
    mark = tokenizer.fingerprint()
    tokenizer.quantize.entropy.count(torch.zeros(10, 3, dtype=torch.int64))
    assert tokenizer.fingerprint() == mark
    del tokenizer.quantize.entropy
    assert tokenizer.fingerprint() == mark


class Toy(Residual):
    """A transform with a plain attribute of its own."""

    def __init__(self, max_loops: int) -> None:
        super().__init__(max_loops)
        self.taste = 0.2


@pytest.mark.parametrize(
    ("transform", "name", "value"),
    [
        ({}, "beam", 4),
        (TRANSFORMS["attract"], "step", 0.8),
        (
            {
                "transform_config": {
                    "target": f"{__name__}.Toy",
                    "params": {"max_loops": 3},
                }
            },
            "taste",
            0.8,
        ),
    ],
    ids=["beam", "step", "toy"],
)
def test_a_cache_is_refused_after_a_plain_attribute_of_a_transform_changed(
    transform: dict, name: str, value: float
) -> None:
    def tokenizer() -> dict:
        config = tokenizer_config("residual")
        config["params"]["quantizer_config"]["params"] |= transform
        return config

    torch.manual_seed(0)
    model = prior(first_stage_config=tokenizer())
    sequence = model.first_stage_model.quantize.sequence
    batch = {
        "fingerprint": [model.fingerprint],
        "tokens": sequence.encode(model.empty_codes(1, (8, 8)))[0],
        "grid": torch.tensor([[8, 8]]),
        "pixels": torch.tensor([256]),
    }
    assert model.tokenize_batch(batch).codes.shape == (1, 8, 8, 3)
    setattr(model.first_stage_model.quantize.transform, name, value)
    del model.fingerprint  # computed once
    with pytest.raises(ValueError, match="another tokenizer"):
        model.tokenize_batch(batch)


def test_a_threshold_is_the_same_however_it_is_written() -> None:
    marks = set()
    for threshold in (1, 1.0):
        config = tokenizer_config("residual")
        config["params"]["quantizer_config"]["params"]["threshold"] = threshold
        torch.manual_seed(0)
        marks.add(prior(first_stage_config=config).fingerprint)
    assert len(marks) == 1


def test_what_the_data_do_not_hold_is_named() -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 3}}
    batch = {**next(iter(images(4, 4))), "human_label": ["cat"] * 4}
    for key, message in (
        ("depth", "'depth', .* is missing in the batch, which has image, class_label, human_label"),
        ("human_label", "'human_label', .* is a list, not a tensor"),
        ("class_label", "labels from 0 to 3 are not all among the n_classes 3"),
    ):
        model = prior(cond_stage_config=labels, cond_stage_key=key)
        with pytest.raises(ValueError, match=message):
            model.tokenize_batch(batch)
    with pytest.raises(ValueError, match="pkeep is a probability, at most 1, got 90"):
        prior(pkeep=90)


def test_some_codes_are_replaced_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, inputs = prior("plain"), [], torch.randint(16, (40, 64))
    predict, condition = model.transformer.predict, torch.zeros(40, 1, dtype=torch.int64)
    inputs[:20, 50:] = -1

    def watch(condition: Tensor, tokens: Tensor, *where: Any) -> Tensor:
        seen.append(tokens)
        return predict(condition, tokens, *where)

    monkeypatch.setattr(model.transformer, "predict", watch)
    for pkeep, training in ((0.75, True), (0.0, True), (0.75, False), (1.0, True)):
        model.pkeep = pkeep
        model.train(training).predict(inputs, condition, (8, 8))
    some, every, *unchanged = seen
    assert all(torch.equal(tokens, inputs) for tokens in unchanged)
    for tokens, replaced in ((some, 0.25), (every, 1.0)):
        assert torch.equal(tokens < 0, inputs < 0)
        changed = tokens != inputs
        # One in 16 is replaced by itself.
        share = float(changed.sum() / (inputs >= 0).sum())
        assert share == pytest.approx(replaced * 15 / 16, abs=0.04)
        assert tokens[changed].unique().tolist() == list(range(16))


def test_small_chances_are_those_stated_in_any_default_precision() -> None:
    given = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    given = {"cond_stage_config": given, "cond_stage_key": "class_label"}
    model = prior(gpt={"vocab_size": 18}, condition_dropout=0.001, pkeep=0.999, **given).train()
    zeros = torch.zeros(50000, 1, dtype=torch.int64)
    torch.set_default_dtype(torch.bfloat16)  # as a training in bf16-true does
    try:
        changed = [int((new != zeros).sum()) for new in (model._corrupt(zeros), model._hide(zeros))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(20 < count < 90 for count in changed)


def test_only_pictures_of_conditions_are_scaled() -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    scaled = {"downsample_cond_size": 8}
    picture = prior("plain", cond_stage_config="__is_first_stage__", **scaled)
    assert picture.encode_to_c(torch.rand(2, 3, 16, 16))[1].shape == (2, 16)
    classes = prior(cond_stage_config=labels, cond_stage_key="class_label", **scaled)
    assert classes.encode_to_c(torch.tensor([3, 4]))[1].tolist() == [[3], [4]]
    for c in (torch.rand(2, 3, 16, 16), torch.zeros(2, 64, dtype=torch.int64)):  # cached tokens
        assert prior(**scaled).encode_to_c(c)[1].tolist() == [[0], [0]]


def test_hidden_conditions_make_guidance_possible(tmp_path) -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    given = {"cond_stage_config": labels, "cond_stage_key": "class_label"}
    model = prior(gpt={"vocab_size": 18}, condition_dropout=0.5, **given)
    condition = torch.arange(10).repeat(100)[:, None]
    hidden = model.train()._hide(condition)
    share = (hidden == 17).float().mean()
    assert 0.4 < share < 0.6 and torch.equal(hidden[hidden != 17], condition[hidden != 17])
    assert torch.equal(model.eval()._hide(condition), condition)
    with pytest.raises(ValueError, match="conditions have the token 17"):
        model.hidden_condition(torch.tensor([[17]]))
    with pytest.raises(ValueError, match="writes 17 tokens, and condition_dropout needs one more"):
        prior(condition_dropout=0.5, **given)
    with pytest.raises(ValueError, match=r"condition_dropout must be in \[0, 1\)"):
        prior(condition_dropout=0.5)


@every_tokenizer
@pytest.mark.parametrize("levels", [1, 2])
def test_training_lowers_the_loss_and_leaves_the_tokenizer(
    kind: str, levels: int, tmp_path
) -> None:
    model = prior(kind, pkeep=0.9, levels=levels)
    frozen = {k: v.clone() for k, v in model.first_stage_model.state_dict().items()}
    model.learning_rate = 3e-3
    fit = trainer(tmp_path, max_epochs=8)
    (before,) = fit.validate(model, images(4, 4), verbose=False)
    fit.fit(model.train(), images(8, 4), images(4, 4))
    for name, value in model.first_stage_model.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    assert not model.first_stage_model.training
    assert fit.callback_metrics["val/loss"] < before["val/loss"] - 0.05
    bits = fit.callback_metrics["val/bits_per_token"]
    torch.testing.assert_close(bits, fit.callback_metrics["val/loss"] / math.log(2))


@every_tokenizer
@pytest.mark.parametrize("levels", [1, 2])
def test_every_sample_and_completion_decodes(kind: str, levels: int) -> None:
    model = prior(kind, levels=levels).eval()
    pictures = model.log_images(next(iter(images(3, 3))))
    names = {"inputs", "reconstructions", "samples_half", "samples_nopix", "samples_det"}
    assert set(pictures) == names
    assert all(picture.shape == (3, 3, 16, 16) for picture in pictures.values())


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_no_images_give_no_codes_tokens_and_nats(levels: int) -> None:
    model, none = prior(levels=levels).eval(), torch.zeros(0, 1, dtype=torch.int64)
    assert model.sample_codes(none).shape == (0, 8, 8, 3)
    assert model.sample(none[:, :0], none, grid=(8, 8)).shape == (0, 0)
    logits, tokens = model(*[torch.zeros(0, 3, 16, 16)] * 2)
    assert logits.shape == (0, 0, 17) and tokens.shape == (0, 0)
    seen = model.tokenize_batch({"image": torch.zeros(0, 16, 16, 3)})
    assert [part.shape for part in model.measure_nats(seen)] == [(0,), (0,)]


def test_completion_keeps_the_known_half() -> None:
    model, x = prior().eval(), torch.rand(2, 3, 16, 16)
    quant, tokens = model.encode_to_z(x)
    _, condition = model.encode_to_c(x)
    half = tokens.masked_fill(model.sequence.states(tokens).site >= 32, -1)
    done = model.sample(half, condition, sample=True, grid=(8, 8))
    codes = model.sequence.decode(done, (8, 8))
    assert torch.equal(codes[:, :4], model.sequence.decode(tokens, (8, 8))[:, :4])


def test_a_class_is_its_condition(tmp_path) -> None:
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    model = prior(cond_stage_config=labels, cond_stage_key="class_label")
    model.learning_rate = 1e-3
    trainer(tmp_path, max_epochs=2).fit(model, images(8, 4), images(4, 4))
    model.eval()
    drawn = [
        model.sample(torch.zeros(1, 0).long(), torch.tensor([[label]]), grid=(8, 8))
        for label in (1, 7)
    ]
    assert all(model.sequence.decode(tokens, (8, 8)).shape == (1, 8, 8, 3) for tokens in drawn)
    x = next(iter(images(4, 4)))["image"].permute(0, 3, 1, 2)
    one, other = (model(x, torch.full((4,), label))[0] for label in (1, 7))
    assert not torch.allclose(one, other)


def test_only_matrices_of_linear_layers_decay() -> None:
    model = prior()
    decay, rest = model.configure_optimizers().param_groups
    assert decay["weight_decay"] == 0.01 and rest["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decay["params"])
    total = sum(p.numel() for p in decay["params"] + rest["params"])
    assert total == sum(p.numel() for p in model.transformer.parameters())
    assert model.transformer.tok_emb.weight.data_ptr() in {p.data_ptr() for p in rest["params"]}


def test_a_schedule_scales_the_learning_rate(tmp_path) -> None:
    schedule = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {
            "warm_up_steps": 4,
            "lr_min": 0.1,
            "lr_max": 1.0,
            "lr_start": 0.0,
            "max_decay_steps": 20,
        },
    }
    model = prior(scheduler_config=schedule)
    model.learning_rate = 1e-3
    fit = trainer(tmp_path)
    fit.fit(model, images(4, 2), images(2))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 4)
