"""NLayerDiscriminator: the original's layers, its start, and what it refuses."""

import json

import pytest
import torch
from torch import nn

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init


def test_state_dict_keys_and_shapes_of_the_original(shared):
    keys = json.loads((shared / "upstream/state_dict_keys.json").read_text())["custom_vqgan.yaml"]
    prefix = "loss.discriminator."
    expected = [(k.removeprefix(prefix), v[0]) for k, v in keys.items() if k.startswith(prefix)]
    discriminator = NLayerDiscriminator()
    assert [(k, list(v.shape)) for k, v in discriminator.state_dict().items()] == expected


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_smallest_image_gives_one_logit(n_layers):
    discriminator = NLayerDiscriminator(ndf=4, n_layers=n_layers)
    size = discriminator.min_size
    assert discriminator(torch.randn(2, 3, size, size)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{size - 1} x 64 pixels.*at least {size}"):
        discriminator(torch.randn(2, 3, size - 1, 64))


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_told_the_option(channels):
    message = f"{channels} channels.* takes 3: set disc_in_channels: {channels}"
    with pytest.raises(ValueError, match=message):
        NLayerDiscriminator(ndf=4, n_layers=1)(torch.randn(2, channels, 8, 8))


def test_receptive_field_of_three_layers_is_70_pixels():
    discriminator = NLayerDiscriminator(ndf=4).eval()
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    logits = discriminator(x)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    seen = gradient.abs().sum(dim=(0, 1))
    assert [int((seen.sum(dim=i) > 0).sum()) for i in (0, 1)] == [70, 70]


def test_weights_start_from_narrow_normals():
    discriminator = NLayerDiscriminator(ndf=32).apply(weights_init)
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight - 1).abs().max() < 0.1
            assert not module.bias.any()
