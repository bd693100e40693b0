"""The linear shortcut: cosines at the start, the model's error that of a linear code."""

import pytest
import torch
from support.models import vqmodel_config
from torch.nn import functional as F

from taming.modules.diffusionmodules.shortcut import LinearShortcut, cosine_bases, leading_patterns
from taming.util import instantiate_from_config


@pytest.mark.parametrize("length", [1, 2, 3, 8, 16])
def test_cosines_are_orthonormal_and_ordered(length):
    bases = cosine_bases(length)
    torch.testing.assert_close(bases @ bases.T, torch.eye(length, dtype=torch.float64))
    signs = bases[:, :-1] * bases[:, 1:] < 0
    assert signs.sum(dim=1).tolist() == list(range(length))  # u changes of sign


@pytest.mark.parametrize(("channels", "side"), [(1, 4), (3, 4), (3, 8), (4, 2)])
def test_all_patterns_together_are_a_basis(channels, side):
    numbers = channels * side * side
    patterns = leading_patterns(channels, side, numbers).flatten(1)
    torch.testing.assert_close(patterns @ patterns.T, torch.eye(numbers), atol=1e-5, rtol=0)


def test_fewer_patterns_are_the_first_of_more():
    assert torch.equal(leading_patterns(3, 8, 12), leading_patterns(3, 8, 64)[:12])


def test_with_every_pattern_nothing_is_lost():
    shortcut, x = LinearShortcut(3, 4, 48), torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(shortcut.decode(shortcut.encode(x)), x, atol=1e-5, rtol=0)


def test_an_error_of_the_latents_has_the_mean_square_of_its_error_in_pixels():
    shortcut, error = LinearShortcut(3, 8, 10), torch.randn(2, 10, 3, 3)
    pixels = shortcut.decode(error)
    torch.testing.assert_close(pixels.square().mean(), error.square().mean())
    torch.testing.assert_close(shortcut.encode(pixels), error, atol=1e-5, rtol=1e-4)


def test_more_channels_than_numbers_are_refused():
    with pytest.raises(ValueError, match="embed_dim must be at most 12"):
        LinearShortcut(3, 2, 13)


def test_a_new_model_is_the_linear_code_and_learns_in_all_of_its_parts():
    model = instantiate_from_config(vqmodel_config(linear_shortcut=True, quantize_start=10))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    linear = model.shortcut.decode(model.shortcut.encode(x))
    assert torch.equal(model.decode(model.encode_to_prequant(x)), linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):  # the networks' own gradient is zero until their last layers have moved
        optimizer.zero_grad()
        F.mse_loss(model.decode(model.encode_to_prequant(x)), x).backward()
        optimizer.step()
    parts = (model.encoder, model.decoder, model.quant_conv, model.post_quant_conv, model.shortcut)
    assert all(p.grad is not None and p.grad.any() for part in parts for p in part.parameters())


def test_the_optimizer_has_the_shortcut_and_other_models_have_none():
    model = instantiate_from_config(vqmodel_config(linear_shortcut=True))
    optimizers = torch.utils._pytree.tree_leaves(model.configure_optimizers())
    (optimizer,) = [o for o in optimizers if isinstance(o, torch.optim.Optimizer)]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.shortcut.parameters()} <= held
    assert not [
        name
        for name in instantiate_from_config(vqmodel_config()).state_dict()
        if "shortcut" in name
    ]


def test_only_the_way_to_the_latents_decides_codes():
    model = instantiate_from_config(vqmodel_config(linear_shortcut=True))
    before = model.fingerprint()
    with torch.no_grad():
        model.shortcut.latent_to_pixels.weight += 1
    assert model.fingerprint() == before
    with torch.no_grad():
        model.shortcut.pixels_to_latent.weight += 1
    assert model.fingerprint() != before


def test_beyond_the_border_a_picture_goes_on_mirrored() -> None:
    shortcut, x = LinearShortcut(3, 4, 20), torch.randn(2, 3, 12, 16)
    with torch.no_grad():
        shortcut.latent_to_pixels.weight.normal_()
    whole = torch.cat([x.flip(2), x, x.flip(2)], dim=2)
    whole = torch.cat([whole.flip(3), whole, whole.flip(3)], dim=3)
    inner = shortcut.decode(shortcut.encode(whole))[:, :, 12:24, 16:32]
    torch.testing.assert_close(shortcut.decode(shortcut.encode(x)), inner, atol=1e-4, rtol=1e-4)
