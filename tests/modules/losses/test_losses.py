"""Losses of autoencoders: numbers of the original, schedules, precision and limits."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.original import load_golden
from torch import nn

import taming.modules.losses as losses
from taming.evaluation import networks
from taming.modules.losses import vqperceptual
from taming.modules.losses.base import AutoencoderLoss
from taming.modules.losses.reconstruction import ReconstructionLoss
from taming.modules.losses.segmentation import BCELoss, BCELossWithQuant
from taming.modules.losses.st_lpips import STLPIPS
from taming.modules.losses.vqperceptual import (
    DummyLoss,
    VQLPIPSWithDiscriminator,
    adaptive_weight,
    adopt_weight,
    hinge_d_loss,
    vanilla_d_loss,
)

GENERATOR, DISCRIMINATOR = 0, 1


def build(**params):
    defaults = {"disc_start": 0, "perceptual_weight": 0.0, "disc_ndf": 4, "disc_num_layers": 1}
    return VQLPIPSWithDiscriminator(**{**defaults, **params})


class Scene:
    """An image and the last layer of a decoder that reconstructs it."""

    def __init__(self, batch=2):
        self.images = torch.rand(batch, 3, 8, 8) * 2 - 1
        self.features = torch.randn(batch, 4, 8, 8)
        self.last_layer = nn.Parameter(torch.randn(3, 4, 3, 3) / 6)

    def reconstruct(self):
        return torch.tanh(F.conv2d(self.features, self.last_layer, padding=1))

    def generator(self, loss, step=0, **kwargs):
        arguments = {"last_layer": self.last_layer, **kwargs}
        return loss(
            torch.tensor(0.5), self.images, self.reconstruct(), GENERATOR, step, **arguments
        )

    def discriminator(self, loss, step=0, **kwargs):
        reconstructions = self.reconstruct()
        return loss(torch.tensor(0.5), self.images, reconstructions, DISCRIMINATOR, step, **kwargs)


@pytest.mark.reported(10)
@pytest.mark.parametrize("name", ["hinge", "vanilla_actnorm", "before_start"])
def test_numbers_of_the_original(shared, name):
    config, weights, io = load_golden(shared, f"vqlpips_{name}")
    loss = VQLPIPSWithDiscriminator(**config["params"]).eval()
    loss.load_state_dict(weights)
    last_layer = nn.Parameter(io["last_layer"])
    reconstructions = torch.tanh(F.conv2d(io["feat"], last_layer, padding=1))
    log = {}
    for index, key in enumerate(["generator_loss", "discriminator_loss"]):
        value, entries = loss(
            io["codebook_loss"],
            io["x"],
            reconstructions,
            index,
            config["global_step"],
            last_layer=last_layer,
        )
        torch.testing.assert_close(value, io[key], rtol=1e-5, atol=1e-6)
        log |= entries
    expected = {k.removeprefix("log/"): v for k, v in io.items() if k.startswith("log/")}
    torch.testing.assert_close(log, expected, rtol=1e-5, atol=1e-6)
    assert not any(value.requires_grad for value in log.values())


def test_state_dict_keys_and_shapes_of_the_original(shared):
    keys = json.loads((shared / "upstream/state_dict_keys.json").read_text())["custom_vqgan.yaml"]
    expected = [(k, v[0]) for k, v in keys.items() if k.startswith("loss.")]
    with torch.device("meta"):
        loss = VQLPIPSWithDiscriminator(disc_start=0, perceptual_pretrained=False)
    assert [(f"loss.{k}", list(v.shape)) for k, v in loss.state_dict().items()] == expected


def test_both_paths_of_dummy_loss_are_one_class():
    assert losses.DummyLoss is vqperceptual.DummyLoss
    scene = Scene()
    with pytest.raises(ValueError, match="lossconfig"):
        scene.generator(DummyLoss())


def test_every_loss_exposes_its_discriminator_or_none():
    for loss in (DummyLoss(), ReconstructionLoss(), BCELoss(), BCELossWithQuant()):
        assert isinstance(loss, AutoencoderLoss)
        assert loss.discriminator is None
        assert not list(loss.parameters())
        with pytest.raises(ValueError, match="DummyLoss|no discriminator"):
            Scene().discriminator(loss)
    loss = build()
    assert set(loss.parameters()) == set(loss.discriminator.parameters())


def test_lpips_is_not_built_at_weight_zero():
    assert not [key for key in build().state_dict() if key.startswith("perceptual_loss")]


def test_perceptual_term_is_the_weighted_mean_of_lpips():
    loss = build(perceptual_weight=0.5, perceptual_pretrained=False, disc_factor=0.0)
    images, reconstructions = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        value, log = loss(torch.tensor(0.0), images, reconstructions, GENERATOR, 0, split="val")
        p_loss = loss.perceptual_loss(images, reconstructions).mean()
    torch.testing.assert_close(log["val/p_loss"], p_loss)
    torch.testing.assert_close(value, (images - reconstructions).abs().mean() + 0.5 * p_loss)


def test_the_perceptual_distance_is_swapped_in_the_config():
    target = "taming.modules.losses.st_lpips.STLPIPS"
    loss = build(perceptual_weight=0.5, perceptual_config={"target": target})
    assert type(loss.perceptual_loss) is STLPIPS
    loss.fetch_weights()
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    with torch.no_grad():
        expected = networks.shift_tolerant(torch.device("cpu"))
        levels = torch.randint(256, (2, 2, 3, 32, 32), dtype=torch.uint8)
        distance = expected.compare(*map(expected.see, levels))
        x, y = levels.float() / 127.5 - 1
        torch.testing.assert_close(loss.perceptual_loss(x, y).flatten(), distance)
    loss.perceptual_loss(images, images.detach().flip(3)).sum().backward()
    assert images.grad.abs().sum() > 0 and images.grad.isfinite().all()

    again = build(perceptual_weight=0.5, perceptual_config={"target": target})
    again.load_state_dict(loss.state_dict())
    assert not again.perceptual_loss.needs_weights  # a resumed run does not read the package


def test_weights_of_the_terms():
    scene, loss = Scene(), build(pixelloss_weight=3.0, codebook_weight=2.0, disc_factor=0.0)
    value, _ = scene.generator(loss)
    expected = 3 * (scene.images - scene.reconstruct()).abs().mean() + 2 * 0.5
    torch.testing.assert_close(value, expected)


def test_adversary_pulls_as_hard_as_the_reconstruction():
    scene, loss = Scene(), build(disc_weight=0.8, max_d_weight=1e9)
    value, log = scene.generator(loss)
    (total,) = torch.autograd.grad(value, scene.last_layer)
    rec_loss = (scene.images - scene.reconstruct()).abs().mean()
    (rec,) = torch.autograd.grad(rec_loss, scene.last_layer)
    g_loss = -loss.discriminator(scene.reconstruct()).mean()
    (g,) = torch.autograd.grad(g_loss, scene.last_layer)
    expected = 0.8 * rec.norm() / (g.norm() + 1e-4)
    torch.testing.assert_close(log["train/d_weight"], expected)
    torch.testing.assert_close(total, rec + expected * g, rtol=1e-5, atol=1e-6)


@pytest.mark.reported(11)
def test_adaptive_weight_is_capped_and_finite_at_zero_and_overflowing_gradients():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))

    def weight(nll, g):
        return adaptive_weight((nll * layer).sum(), (g * layer).sum(), layer, 100.0).item()

    assert weight(1.0, 1.0) == pytest.approx(1.0, rel=1e-3)
    assert weight(1.0, 0.0) == 100.0
    assert weight(0.0, 0.0) == 0.0
    assert weight(float("inf"), 1.0) == 0.0
    assert weight(1.0, float("inf")) == 0.0
    assert weight(float("nan"), 1.0) == 0.0


def test_adaptive_weight_is_the_same_where_half_precision_sees_no_gradient():
    layer, x = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([0.02, 0.03])

    def weight(dtype):
        product = layer.to(dtype) * x.to(dtype)
        return adaptive_weight((1e-6 * product.float()).sum(), product.float().sum(), layer, 1.0)

    torch.testing.assert_close(weight(torch.half), weight(torch.float32), rtol=0.02, atol=0)


def test_adaptive_weight_is_that_of_the_batch_of_all_ranks(monkeypatch):
    scene, loss = Scene(batch=4), build(disc_weight=0.8).eval()
    expected = scene.generator(loss)[1]["train/d_weight"]
    images, features = scene.images, scene.features
    gradients = []
    for half in (slice(0, 2), slice(2, 4)):
        scene.images, scene.features = images[half], features[half]
        monkeypatch.setattr(vqperceptual, "sum_over_ranks", lambda t: gradients.append(t) or t)
        scene.generator(loss)
    total = {t.shape: t + other for t, other in zip(gradients[:2], gradients[2:], strict=True)}
    monkeypatch.setattr(vqperceptual, "sum_over_ranks", lambda t: total[t.shape])
    torch.testing.assert_close(scene.generator(loss)[1]["train/d_weight"], expected)


@pytest.mark.reported(12)
def test_perfect_reconstruction_has_finite_gradients():
    scene = Scene()
    scene.images = scene.reconstruct().detach()
    value, log = scene.generator(build(disc_loss="vanilla"))
    value.backward()
    assert log["train/d_weight"] == 0
    assert torch.isfinite(scene.last_layer.grad).all()


@pytest.mark.reported(11)
def test_discriminator_starts_at_once_and_generator_follows_the_ramp():
    scene, loss = Scene(), build(disc_start=10, disc_ramp_steps=4, disc_factor=0.5)
    factors = [scene.generator(loss, step)[1]["train/disc_factor"].item() for step in range(9, 17)]
    assert factors == [0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    active = [scene.discriminator(loss, step)[0].item() > 0 for step in (9, 10, 11)]
    assert active == [False, True, True]


def test_before_the_start_the_adversary_does_not_pull():
    scene, loss = Scene(), build(disc_start=1)
    value, _ = scene.generator(loss)
    rec_loss = (scene.images - scene.reconstruct()).abs().mean()
    torch.testing.assert_close(
        torch.autograd.grad(value, scene.last_layer),
        torch.autograd.grad(rec_loss, scene.last_layer),
    )


def test_discriminator_learns_without_touching_the_decoder():
    scene, loss = Scene(), build()
    value, _ = scene.discriminator(loss)
    value.backward()
    assert scene.last_layer.grad is None
    assert all(parameter.grad is not None for parameter in loss.discriminator.parameters())


@pytest.mark.reported(13)
def test_losses_are_float32_under_autocast_and_agree_with_float32():
    scene, loss = Scene(), build().eval()
    exact, exact_log = scene.generator(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scene.reconstruct().dtype == torch.bfloat16
        value, log = scene.generator(loss)
        d_value, _ = scene.discriminator(loss)
    assert value.dtype == d_value.dtype == torch.float32
    (value + d_value).backward()
    assert torch.isfinite(scene.last_layer.grad).all()
    torch.testing.assert_close(
        log["train/d_weight"], exact_log["train/d_weight"], rtol=0.05, atol=0
    )
    torch.testing.assert_close(value, exact, rtol=0.05, atol=0.02)


def test_no_adaptive_weight_without_gradients():
    scene, loss = Scene(), build()
    with torch.no_grad():
        _, log = scene.generator(loss, last_layer=None, split="val")
    assert log["val/d_weight"] == 0
    scene.last_layer.requires_grad_(False)
    assert scene.generator(loss)[1]["train/d_weight"] == 0


def test_training_without_the_last_layer_is_refused():
    with pytest.raises(ValueError, match="last_layer"):
        Scene().generator(build(), last_layer=None)


def test_condition_must_be_what_the_discriminator_was_built_for():
    scene, cond = Scene(), torch.randn(2, 1, 8, 8)
    conditional = build(disc_conditional=True, disc_in_channels=4)
    for optimizer in (scene.generator, scene.discriminator):
        assert torch.isfinite(optimizer(conditional, cond=cond)[0])
        with pytest.raises(ValueError, match="condition is missing"):
            optimizer(conditional)
        with pytest.raises(ValueError, match="condition is given"):
            optimizer(build(), cond=cond)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"disc_loss": "wasserstein"}, "wasserstein"),
        ({"disc_start": -1}, "disc_start"),
        ({"disc_ramp_steps": -1}, "disc_ramp_steps"),
        ({"perceptual_weight": -1.0}, "perceptual_weight"),
    ],
)
def test_parameters_out_of_range_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build(**params)


def test_unknown_optimizer_is_refused():
    scene = Scene()
    with pytest.raises(ValueError, match="optimizer_idx .*0 or 1, .*2"):
        build()(torch.tensor(0.0), scene.images, scene.reconstruct(), 2, 0)


def test_adopt_weight_switches_at_the_threshold():
    assert [adopt_weight(2.0, step, threshold=3, value=1.0) for step in (2, 3)] == [1.0, 2.0]


def test_discriminator_losses_at_chance_and_at_their_best():
    zero, sure = torch.zeros(4), torch.full((4,), 50.0)
    assert hinge_d_loss(zero, zero) == 1
    assert hinge_d_loss(sure, -sure) == 0
    entropy = F.binary_cross_entropy_with_logits(zero, torch.ones(4))
    torch.testing.assert_close(vanilla_d_loss(zero, zero), entropy)
    assert vanilla_d_loss(sure, -sure) < 1e-6


@pytest.mark.parametrize("distance, power", [("l1", 1), ("l2", 2)])
def test_reconstruction_loss_is_the_mean_distance(distance, power):
    scene, loss = Scene(), ReconstructionLoss(distance, codebook_weight=2.0)
    value, log = scene.generator(loss, split="val")
    rec_loss = (scene.images - scene.reconstruct()).abs().pow(power).mean()
    torch.testing.assert_close(value, rec_loss + 2 * 0.5)
    assert set(log) == {f"val/{k}" for k in ("total_loss", "quant_loss", "nll_loss", "rec_loss")}
    torch.testing.assert_close(log["val/rec_loss"], rec_loss.detach())


def test_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="l3"):
        ReconstructionLoss("l3")


def test_segmentation_numbers_of_the_original(shared):
    config, _, io = load_golden(shared, "vqsegmentation")
    quant_loss, x, rec = io["quant_loss"], io["x"], io["rec"]
    loss = BCELossWithQuant(**config["params"]["lossconfig"]["params"])
    value, log = loss(quant_loss, x, rec, GENERATOR, 0, split="val")
    torch.testing.assert_close(value, io["total_loss"])
    torch.testing.assert_close(log["val/bce_loss"], io["bce"])
    torch.testing.assert_close(log["val/quant_loss"], io["quant_loss"])
    plain, plain_log = BCELoss()(quant_loss, x, rec, GENERATOR, 0)
    torch.testing.assert_close(plain, io["bce"])
    assert set(plain_log) == {"train/total_loss", "train/bce_loss"}
