"""The tokenizer equals the original, and training keeps its promises."""

import csv
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.models import DDCONFIG, GAN, LOOPY, PLAIN, images, trainer
from support.original import load_golden

from taming.models.vqgan import GumbelVQ, VQModel
from taming.modules.losses.lpips import LPIPS
from taming.util import NonFiniteError


def model(lossconfig=GAN, quantizer_config=LOOPY, **kwargs) -> VQModel:
    return VQModel(DDCONFIG, lossconfig, 16, 4, quantizer_config=quantizer_config, **kwargs)


def test_equals_the_original(shared) -> None:
    golden = load_golden(shared, "vqmodel")
    original, io = golden.build(), golden.io
    with torch.no_grad():
        quant, loss, (_, _, indices) = original.encode(io["x"])
        rec, diff = original(io["x"])
    assert torch.equal(indices, io["indices"])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(original.encode_to_prequant(io["x"]), io["h"], **close)
    torch.testing.assert_close(quant, io["quant"], **close)
    torch.testing.assert_close(rec, io["rec"], **close)
    torch.testing.assert_close(loss, io["loss"], rtol=1e-5, atol=0)
    assert torch.equal(loss, diff)
    assert set(original.state_dict()) == set(golden.parameters)


def test_only_a_fresh_training_fetches_the_weights_of_lpips(monkeypatch, tmp_path) -> None:
    fetched = []
    for name in ("load_heads", "load_vgg16"):
        monkeypatch.setattr(LPIPS, name, lambda *args, name=name: fetched.append(name))
    perceptual = {**GAN, "params": {**GAN["params"], "perceptual_weight": 1.0}}
    begun = model(perceptual)
    assert not fetched
    training = trainer(tmp_path, max_steps=1)
    training.fit(begun, images(2), images(2))
    assert fetched == ["load_heads", "load_vgg16"]
    training.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(tmp_path, max_epochs=2)
    last = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    resumed.fit(model(perceptual), images(2), images(2), **last)
    assert resumed.global_step == 2
    assert fetched == ["load_heads", "load_vgg16"]


@pytest.mark.reported(17)
@pytest.mark.parametrize("kwargs", [{}, {"sane_index_shape": True}, {"quantizer_config": LOOPY}])
def test_codes_of_any_shape_decode(kwargs: dict) -> None:
    tokenizer = model(**{"quantizer_config": None, **kwargs}).eval()
    with torch.no_grad():
        quant, _, (_, _, indices) = tokenizer.encode(torch.rand(2, 3, 16, 16))
        flat = indices.reshape(2 * 64, -1)
        for codes in (indices, flat, flat.squeeze(1)):
            again = tokenizer.decode_code(codes, (2, 8, 8, 4))
            torch.testing.assert_close(again, tokenizer.decode(quant), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"codes of shape \(128, .*need the shape"):
            tokenizer.decode_code(flat)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch.compile itself
def test_compiled_networks_compute_the_same(monkeypatch) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    plain = model()
    compiled = model(compile=True)
    compiled.load_state_dict(plain.state_dict())
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    x = torch.rand(2, 3, 16, 16)
    rebuilt = [each(x)[0] for each in (plain, compiled)]
    assert len(graphs) == 2  # one graph for each network: nothing breaks it
    torch.testing.assert_close(*rebuilt, atol=1e-4, rtol=0)
    gradients = [
        torch.autograd.grad(out.square().mean(), each.encoder.conv_in.weight)[0]
        for out, each in zip(rebuilt, (plain, compiled), strict=True)
    ]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.reported(7)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lossconfig", [GAN, PLAIN], ids=["gan", "plain"])
@pytest.mark.parametrize("quantizer", [None, LOOPY], ids=["plain-vq", "loopy"])
def test_global_step_counts_generator_steps(tmp_path, lossconfig, quantizer, precision) -> None:
    tokenizer, fit = model(lossconfig, quantizer), trainer(tmp_path, precision=precision)
    before = {name: value.clone() for name, value in tokenizer.named_parameters()}
    fit.fit(tokenizer, images(10), images(2))
    assert fit.global_step == tokenizer.global_step == 5
    unchanged = {n for n, value in tokenizer.named_parameters() if torch.equal(value, before[n])}
    # Within the hinge's margin, the last bias gets gradients +1 and -1, which cancel.
    assert unchanged <= {"loss.discriminator.main.5.bias"}
    assert math.isfinite(fit.callback_metrics["val/rec_loss"])
    assert fit.callback_metrics["val/usage"] > 0


def test_max_steps_are_generator_steps(tmp_path) -> None:
    fit = trainer(tmp_path, max_steps=3, max_epochs=-1)
    fit.fit(model(), images(20), images(2))
    assert fit.global_step == 3 and fit.fit_loop.total_batch_idx == 2


def test_accumulated_batches_equal_one_large_batch(tmp_path) -> None:
    state = model(PLAIN, None).state_dict()
    weights = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        tokenizer = model(PLAIN, None)
        tokenizer.load_state_dict(state)
        tokenizer.learning_rate = 1e-2
        tokenizer.accumulate_grad_batches = accumulate
        fit = trainer(tmp_path)
        fit.fit(tokenizer, images(8, batch_size), images(2))
        assert fit.global_step == 2
        weights.append(tokenizer.encoder.conv_in.weight)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_accumulation_under_loss_scaling_is_refused_for_a_gan(tmp_path, monkeypatch) -> None:
    fit = trainer(tmp_path)
    monkeypatch.setattr(pl.Trainer, "precision", "16-mixed")
    for loss, accumulate, refused in ((GAN, 2, True), (GAN, 1, False), (PLAIN, 2, False)):
        tokenizer = model(loss, None)
        tokenizer.trainer, tokenizer.accumulate_grad_batches = fit, accumulate
        expected = pytest.raises(ValueError, match="bf16-mixed.*accumulation")
        with expected if refused else nullcontext():
            tokenizer.configure_optimizers()


@pytest.mark.parametrize("loss", [PLAIN, GAN], ids=["plain", "gan"])
def test_validation_does_not_disturb_accumulation(tmp_path, loss) -> None:
    state = model(loss, None).state_dict()
    weights = []
    for interval in (1.0, 3):
        tokenizer = model(loss, None)
        tokenizer.load_state_dict(state)
        tokenizer.learning_rate, tokenizer.accumulate_grad_batches = 1e-2, 4
        trainer(tmp_path, val_check_interval=interval).fit(tokenizer, images(16), images(2))
        weights.append(tokenizer.state_dict())
    for name, value in weights[0].items():
        if not name.startswith(("train_", "val_")):  # what was counted since
            torch.testing.assert_close(value, weights[1][name], msg=name)


@pytest.mark.parametrize("gumbel", [False, True])
def test_logs_count_generator_steps(tmp_path, gumbel) -> None:
    always = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler"}
    always["params"] = dict.fromkeys(("lr_min", "lr_max", "lr_start"), 0.9)
    always["params"] |= {"warm_up_steps": 0, "max_decay_steps": 10}
    tokenizer = GumbelVQ(DDCONFIG, PLAIN, 16, 4, always) if gumbel else model(PLAIN, None)
    tokenizer.accumulate_grad_batches = 4
    logger = CSVLogger(tmp_path, version="x")
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(tokenizer, images(16), images(2))
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(lines) if row["train/rec_loss"]]
    assert [int(row["step"]) for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("ema_decay", [0.9, None], ids=["ema", "gradient"])
def test_before_quantize_start_codes_affect_only_the_quantizer(tmp_path, ema_decay) -> None:
    torch.manual_seed(1)
    state = model(PLAIN).state_dict()

    def build(quantize_start: int, threshold: float) -> VQModel:
        params = {**LOOPY["params"], "threshold": threshold, "ema_decay": ema_decay}
        return model(PLAIN, LOOPY | {"params": params}, quantize_start=quantize_start)

    def trained(quantize_start: int, threshold: float) -> VQModel:
        tokenizer = build(quantize_start, threshold)
        tokenizer.load_state_dict(state, strict=False)
        tokenizer.learning_rate = 1e-3
        trainer(tmp_path).fit(tokenizer, images(6), images(2))
        return tokenizer

    def differ(a: VQModel, b: VQModel) -> set[str]:
        parts = ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize.embedding.weight")
        ours, theirs = a.state_dict(), b.state_dict()
        same = {p: all(ours[n].equal(theirs[n]) for n in ours if n.startswith(p)) for p in parts}
        return {part for part, equal in same.items() if not equal}

    # Thresholds change the codes, and with them whatever depends on codes.
    assert differ(trained(3, 0.1), trained(3, 9.0)) == {"quantize.embedding.weight"}
    assert "decoder" in differ(trained(2, 0.1), trained(2, 9.0))
    whole = trained(0, 0.1).eval()
    continuous = build(9, 0.1).eval()
    continuous.load_state_dict(whole.state_dict(), strict=False)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(continuous.reconstruct(x)[2], whole.reconstruct(x)[2])


def test_remaining_batches_are_stepped_at_the_end_of_an_epoch(tmp_path) -> None:
    tokenizer, fit = model(PLAIN, None), trainer(tmp_path)
    tokenizer.accumulate_grad_batches = 3
    fit.fit(tokenizer, images(8), images(2))
    assert fit.global_step == 2


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_both_optimizers_are_clipped(tmp_path, algorithm: str) -> None:
    seen = []

    def watch(optimizer, *_) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        total = torch.cat([torch.zeros(1), *(g.flatten() for g in grads if g is not None)])
        seen.append(float(total.norm() if algorithm == "norm" else total.abs().max()))

    class Watch(pl.Callback):
        def on_train_start(self, trainer, module) -> None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(watch)

    tokenizer = model()
    tokenizer.gradient_clip_val, tokenizer.gradient_clip_algorithm = 1e-3, algorithm
    trainer(tmp_path, callbacks=[Watch()]).fit(tokenizer, images(8), images(2))
    assert len(seen) == 8 and 0 < max(seen) <= 1.01e-3


def test_before_its_start_the_discriminator_runs_on_logged_steps_only(tmp_path) -> None:
    tokenizer = model()  # disc_start: 2
    calls, states = [], []
    tokenizer.loss.discriminator.register_forward_pre_hook(
        lambda *_: calls.append(tokenizer.global_step) if tokenizer.training else None
    )
    before = {k: v.clone() for k, v in tokenizer.loss.discriminator.named_parameters()}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            now = dict(module.loss.discriminator.named_parameters())
            states.append(all(torch.equal(before[name], now[name]) for name in now))

    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 3, "callbacks": [Watch()]}
    trainer(tmp_path, max_epochs=2, **options).fit(tokenizer, images(6), images(2))
    # A discriminator's step counts the generator's step before it. Steps 2 and 5 are logged.
    assert states == [True, False, False, False, False, False]
    assert calls == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6]
    (step,) = {int(s["step"]) for s in tokenizer.optimizer_list()[1].state.values()}
    assert step == 5


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path) -> None:
    torch.manual_seed(5)
    whole = model()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(tmp_path, max_epochs=3).fit(whole, images(6), images(2))

    first, second = model(), model()
    first.load_state_dict(start)
    stopped = trainer(tmp_path, max_epochs=2)
    stopped.fit(first, images(6), images(2))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(tmp_path, max_epochs=3)
    resumed.fit(second, images(6), images(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.global_step == 9
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.reported(13)
def test_non_finite_values_stop_training_and_name_their_module(tmp_path) -> None:
    tokenizer = model()
    with torch.no_grad():
        tokenizer.encoder.mid.block_1.conv1.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="encoder.mid.block_1.conv1"):
        trainer(tmp_path).fit(tokenizer, images(4), images(2))
    with pytest.raises(NonFiniteError, match="encoder.mid.block_1.conv1"):
        tokenizer.eval().log_images({"image": torch.rand(2, 16, 16, 3)})
    tokenizer = model()
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="train/.*not finite at step 0.*decoder.conv_out"):
        trainer(tmp_path).fit(tokenizer, images(4), images(2))


def test_pictures_show_inputs_reconstructions_and_lengths() -> None:
    pictures = model().eval().log_images({"image": torch.rand(2, 16, 16, 3)})
    assert {name: tuple(p.shape) for name, p in pictures.items()} == dict.fromkeys(
        ("inputs", "reconstructions", "lengths"), (2, 3, 16, 16)
    )
    assert pictures["lengths"].min() >= -1 and pictures["lengths"].max() <= 1


def test_more_channels_are_coloured_by_a_projection() -> None:
    labels = torch.rand(2, 5, 4, 4)
    picture = model(colorize_nlabels=5).to_rgb(labels)
    assert picture.shape == (2, 3, 4, 4) and picture.min() == -1 and picture.max() == 1
    assert model(colorize_nlabels=5).half().to_rgb(labels).isfinite().all()
    assert "colorize" not in model().state_dict()
    assert torch.equal(model().to_rgb(labels), labels[:, :3])


def test_alpha_is_shown_on_white() -> None:
    colours, opaque = torch.rand(2, 3, 4, 4) * 2 - 1, torch.ones(2, 1, 4, 4)
    for x in (colours, colours[:, :1]):
        shown = model().to_rgb(torch.cat([x, opaque], dim=1))
        torch.testing.assert_close(shown, x.expand(-1, 3, -1, -1))
        assert (model().to_rgb(torch.cat([x, -opaque], dim=1)) == 1).all()


def test_an_orthogonal_start_keeps_lengths_on_both_sides_of_the_latents() -> None:
    torch.manual_seed(3)
    default = model()
    torch.manual_seed(3)
    tokenizer = model(orthogonal_start=True)
    layers = ("quant_conv", "post_quant_conv", "encoder.conv_out", "decoder.conv_in")
    for name, value in tokenizer.named_parameters():
        changed = name.rpartition(".")[0] in layers
        assert changed != torch.equal(value, default.get_parameter(name)), name
    for name in layers:
        weight = tokenizer.get_submodule(name).weight.flatten(1)
        lengths = torch.linalg.svdvals(weight)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        assert not tokenizer.get_submodule(name).bias.any()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("LoopyVectorQuantizer", {"n_e": 16, "e_dim": 4}),
        ("VectorQuantizer2", {"n_e": 16, "e_dim": 4}),
        ("EMAVectorQuantizer", {"n_embed": 16, "embedding_dim": 4}),
        ("GumbelQuantize", {"n_embed": 16, "embedding_dim": 4, "num_hiddens": 4}),
    ],
)
def test_the_quantizer_takes_the_sizes_of_the_model(name: str, sizes: dict[str, int]) -> None:
    own = {"beta": 0.25} | ({"threshold": 0.5} if name.startswith("Loopy") else {})
    block = {"target": f"taming.modules.vqvae.quantize.{name}"}
    block["params"] = {} if name.startswith("Gumbel") else own
    for stated in ({}, sizes):
        quantizer = model(quantizer_config={**block, "params": block["params"] | stated}).quantize
        assert (quantizer.n_e, quantizer.e_dim) == (16, 4)
    for size, value in sizes.items():
        wrong = {**block, "params": {**block["params"], size: 99}}
        with pytest.raises(ValueError, match=rf"{size}.*\b99\b.*\b{value}\b"):
            model(quantizer_config=wrong)


@pytest.mark.parametrize("kwargs", [{}, {"sane_index_shape": True}, {"quantizer_config": LOOPY}])
def test_codes_have_one_shape_whatever_the_quantizer(kwargs: dict) -> None:
    tokenizer = model(**{"quantizer_config": None, **kwargs}).eval()
    assert (tokenizer.grid, tokenizer.factor) == ((8, 8), 2)
    x = torch.rand(2, 3, 16, 32)
    with torch.no_grad():
        codes, quant = tokenizer.encode_to_codes(x), tokenizer.encode(x).z_q
        assert codes.shape == (2, 8, 16, 3 if "quantizer_config" in kwargs else 1)
        assert torch.equal(tokenizer.decode_code(codes), tokenizer.decode(quant))


def test_only_a_tokenizer_of_one_code_per_site_is_a_condition() -> None:
    plain = model(quantizer_config=None)
    assert (plain.condition_vocab_size, plain.condition_length) == (16, 64)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        pictures = plain.eval().condition_pictures(x, plain.encode(x).z_q, (16, 16), {})
        torch.testing.assert_close(pictures, {"conditioning": x, "conditioning_rec": plain(x)[0]})
    with pytest.raises(ValueError, match="LoopyVectorQuantizer.*several codes"):
        _ = model().condition_length
