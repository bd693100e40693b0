"""Variants of VQModel: each differs in the part that its name gives, and trains."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from support.models import DDCONFIG, GAN, LOOPY, PLAIN, images, trainer
from support.original import load_golden
from torch.utils.data import DataLoader

from taming.models.vqgan import EMAVQ, GumbelVQ, VQModel, VQNoDiscModel, VQSegmentationModel

SCHEDULE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "warm_up_steps": 0,
        "lr_min": 0.1,
        "lr_max": 0.9,
        "lr_start": 0.9,
        "max_decay_steps": 10,
    },
}
BCE = {"target": "taming.modules.losses.segmentation.BCELossWithQuant"}
LABELS = {**DDCONFIG, "in_channels": 5, "out_ch": 5}


def gumbel(**kwargs) -> GumbelVQ:
    return GumbelVQ(DDCONFIG, GAN, 16, 4, SCHEDULE, **kwargs)


def segmentation() -> VQSegmentationModel:
    return VQSegmentationModel(
        5, ddconfig=LABELS, lossconfig=BCE, n_embed=16, embed_dim=4, image_key="segmentation"
    )


def label_maps(amount: int) -> DataLoader:
    labels = torch.randint(5, (amount, 16, 16))
    return DataLoader([{"segmentation": F.one_hot(m, 5).float()} for m in labels], batch_size=2)


def test_segmentation_equals_the_original(shared) -> None:
    golden = load_golden(shared, "vqsegmentation")
    model, io = golden.build(), golden.io
    with torch.no_grad():
        rec, quant_loss = model(io["x"])
        total, logs = model.loss(quant_loss, io["x"], rec, 0, 0, split="val")
    torch.testing.assert_close(rec, io["rec"], rtol=1e-5, atol=1e-5)
    for value, name in (
        (quant_loss, "quant_loss"),
        (total, "total_loss"),
        (logs["val/bce_loss"], "bce"),
    ):
        torch.testing.assert_close(value, io[name], rtol=1e-5, atol=0)
    assert set(model.state_dict()) == set(golden.parameters)


def test_segmentation_shows_the_likeliest_label() -> None:
    model, batch = segmentation().eval(), next(iter(label_maps(2)))
    pictures = model.log_images(batch)
    assert {p.shape for p in pictures.values()} == {(2, 3, 16, 16)}
    rec, _ = model(model.get_input(batch, "segmentation"))
    likeliest = F.one_hot(rec.argmax(1), 5).permute(0, 3, 1, 2).float()
    both = model.to_rgb(torch.cat([model.get_input(batch, "segmentation"), likeliest]))
    shown = torch.cat([pictures["inputs"], pictures["reconstructions"]])
    torch.testing.assert_close(shown, both)


def test_psnr_of_label_maps_is_of_values_from_0_to_1(tmp_path) -> None:
    model, maps = segmentation(), label_maps(2)
    (logged,) = trainer(tmp_path).validate(model, maps, verbose=False)
    x = model.get_input(next(iter(maps)), "segmentation")
    with torch.no_grad():
        error = (model.as_input(model.eval()(x)[0]) - x).square().mean()
    assert logged["val/psnr"] == pytest.approx(float(-10 * error.log10()), rel=1e-4)


def test_segmentation_trains_and_logs_the_originals_values(tmp_path) -> None:
    fit = trainer(tmp_path)
    fit.fit(segmentation(), label_maps(4), label_maps(2))
    logged = {f"{s}/{v}" for s in ("train", "val") for v in ("total_loss", "bce_loss", "aeloss")}
    assert logged <= set(fit.callback_metrics) and fit.global_step == 2
    with pytest.raises(ValueError, match=r"n_labels .*7, .*ddconfig.out_ch 5"):
        VQSegmentationModel(7, LABELS, BCE, 16, 4)


def test_mistakes_about_keys_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="'segmentation', .*image_key, .*missing"):
        segmentation().validation_step({"image": torch.rand(2, 16, 16, 3)}, 0)
    with pytest.raises(ValueError, match="ddconfig lacks in_channels, out_ch"):
        VQModel({"double_z": False, "z_channels": 4}, PLAIN, 16, 4)
    with pytest.raises(ValueError, match="in_channels 3.* out_ch 1"):
        VQModel({**DDCONFIG, "out_ch": 1}, GAN, 16, 4)
    with pytest.raises(ValueError, match="GumbelQuantize .*has no"):
        gumbel(quantize_start=3)


def test_validation_returns_its_loss(tmp_path) -> None:
    returned = []

    class Keep(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *_) -> None:
            returned.append(outputs)

    for model in (gumbel(), VQModel(DDCONFIG, GAN, 16, 4)):
        (logged,) = trainer(tmp_path, callbacks=[Keep()]).validate(model, images(2), verbose=False)
        assert float(returned.pop()) == pytest.approx(logged["val/aeloss"])


@pytest.mark.reported(16)
def test_temperature_follows_the_step_and_survives_a_resume(tmp_path) -> None:
    model, fit = gumbel(), trainer(tmp_path)
    fit.fit(model, images(6), images(2))
    schedule = model.temperature_scheduler
    assert model.quantize.temperature == schedule(2) == fit.callback_metrics["temperature"]
    fit.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if "temperature" in key]
    resumed, fit = gumbel(), trainer(tmp_path, max_steps=4, max_epochs=-1)
    fit.fit(resumed, images(6), images(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.quantize.temperature == schedule(3) < schedule(2)


@pytest.mark.reported(17)
def test_gumbel_decodes_its_codes() -> None:
    model, x = gumbel().eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        quant, _, (_, _, indices) = model.encode(x)
        torch.testing.assert_close(model.decode_code(indices), model.decode(quant))
    assert indices.shape == (2, 8, 8)


def test_gumbel_projects_from_embed_dim_channels() -> None:
    """The original took z_channels, which works only where embed_dim is the same."""
    assert DDCONFIG["z_channels"] != 4
    assert gumbel().quantize.proj.in_channels == 4


@pytest.mark.reported(15)
def test_moving_averages_train_outside_the_optimizers(tmp_path) -> None:
    model, fit = EMAVQ(DDCONFIG, GAN, 16, 4, sane_index_shape=True), trainer(tmp_path)
    before = model.quantize.codebook.clone()
    model.learning_rate = 1e-3
    fit.fit(model, images(6), images(2))
    assert not torch.equal(model.quantize.codebook, before)
    optimized = {p.data_ptr() for g in fit.optimizers[0].param_groups for p in g["params"]}
    own = {p.data_ptr() for p in model.quantize.parameters()}
    assert optimized and not optimized & own
    assert model.encode(torch.rand(2, 3, 16, 16)).info.indices.shape == (2, 8, 8)


def test_moving_averages_start_from_a_checkpoint(tmp_path) -> None:
    model = EMAVQ(DDCONFIG, PLAIN, 16, 4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ema.ckpt")
    other = EMAVQ(DDCONFIG, PLAIN, 16, 4, ckpt_path=str(tmp_path / "ema.ckpt"))
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_without_a_discriminator_only_the_generator_trains(tmp_path) -> None:
    model, fit = VQNoDiscModel(DDCONFIG, PLAIN, 16, 4), trainer(tmp_path)
    fit.fit(model, images(4), images(2))
    assert len(fit.optimizers) == 1 and fit.global_step == 2
    with pytest.raises(ValueError, match="no discriminator, .*VQLPIPSWithDiscriminator"):
        VQNoDiscModel(DDCONFIG, GAN, 16, 4)


@pytest.mark.reported(14)
def test_beta_reaches_the_right_term() -> None:
    """The original had no way to set legacy=False, contrary to its documentation."""
    losses = {}
    for legacy in (True, False):
        model = VQModel(DDCONFIG, PLAIN, 16, 4, beta=0.5, legacy=legacy).eval()
        z = torch.randn(2, 4, 3, 3, requires_grad=True)
        model.quantize(z).loss.backward()
        losses[legacy] = z.grad.norm() / model.quantize.codebook.grad.norm()
    assert losses[True] > 1.5 * losses[False]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"quantizer_config": LOOPY, "remap": "used.npy"}, "remap: set it in quantizer_config"),
        ({"quantizer_config": LOOPY, "legacy": False}, "legacy: set it in quantizer_config"),
        ({"ddconfig": {**DDCONFIG, "double_z": True}}, "needs double_z: false"),
        (
            {"ddconfig": {k: v for k, v in DDCONFIG.items() if k != "double_z"}},
            "needs double_z: false",
        ),
    ],
)
def test_arguments_that_would_be_lost_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQModel(
            **{"ddconfig": DDCONFIG, "lossconfig": PLAIN, "n_embed": 16, "embed_dim": 4} | kwargs
        )
