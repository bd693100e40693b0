"""Encoder and Decoder: numbers and state-dict keys of the original, and what they refuse."""

import inspect
import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.original import load_golden
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    ResnetBlock,
    Upsample,
)

TINY = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
    "double_z": False,
}
F16 = {
    **TINY,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "resolution": 256,
    "z_channels": 256,
}
F8 = {**F16, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}


def part(weights, name):
    return {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}


def conv(weights, name):
    return lambda x: F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def test_numbers_of_the_original(shared):
    config, weights, io = load_golden(shared, "vqmodel")
    ddconfig = config["params"]["ddconfig"]
    encoder, decoder = Encoder(**ddconfig), Decoder(**ddconfig)
    encoder.load_state_dict(part(weights, "encoder"))
    decoder.load_state_dict(part(weights, "decoder"))
    with torch.no_grad():
        h = conv(weights, "quant_conv")(encoder(io["x"]))
        rec = decoder(conv(weights, "post_quant_conv")(io["quant"]))
    torch.testing.assert_close(h, io["h"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rec, io["rec"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ddconfig, name",
    [
        (F16, "custom_vqgan.yaml"),
        ({**F16, "in_channels": 1, "out_ch": 1}, "imagenetdepth_vqgan.yaml"),
        ({**F16, "in_channels": 182, "out_ch": 182}, "sflckr_cond_stage.yaml"),
        (F8, "gumbel_f8 (published checkpoint)"),
    ],
)
def test_state_dict_keys_shapes_and_order_of_the_original(shared, ddconfig, name):
    keys = json.loads((shared / "upstream/state_dict_keys.json").read_text())[name]
    with torch.device("meta"):
        modules = nn.ModuleDict({"encoder": Encoder(**ddconfig), "decoder": Decoder(**ddconfig)})
    found = [(key, list(value.shape)) for key, value in modules.state_dict().items()]
    expected = [
        (k, shape) for k, (shape, _) in keys.items() if k.startswith(("encoder", "decoder"))
    ]
    assert found == expected


def test_attention_is_softmax_of_scaled_products():
    block, x = AttnBlock(32), torch.randn(2, 32, 3, 5)
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2) for layer in (block.q, block.k, block.v))
    weights = torch.einsum("bci,bcj->bij", q, k).mul(32**-0.5).softmax(dim=2)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).unflatten(2, (3, 5)))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_resampling_without_convolutions_inverts_itself():
    x = torch.randn(1, 2, 4, 6)
    assert torch.equal(Downsample(2, with_conv=False)(Upsample(2, with_conv=False)(x)), x)
    encoder = Encoder(**TINY, resamp_with_conv=False)
    assert not [key for key in encoder.state_dict() if "sample" in key]
    assert encoder(torch.randn(1, 3, 16, 16)).shape == (1, 4, 8, 8)


def test_learned_downsampling_pads_right_and_below():
    down, x = Downsample(1), torch.randn(1, 1, 4, 4)
    expected = (x[0, 0, :3, :3] * down.conv.weight[0, 0]).sum() + down.conv.bias[0]
    torch.testing.assert_close(down(x)[0, 0, 0, 0], expected)
    assert down(x).shape == (1, 1, 2, 2)


def test_dropout_acts_in_training_only():
    block, x = ResnetBlock(32, 64, dropout=0.5), torch.randn(1, 32, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_double_z_doubles_the_latent_only():
    config = {**TINY, "double_z": True}
    assert Encoder(**config)(torch.randn(1, 3, 16, 16)).shape == (1, 8, 8, 8)
    assert Decoder(**config)(torch.randn(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    parameters = inspect.signature(Encoder).parameters
    assert parameters["double_z"].default is True
    assert parameters == inspect.signature(Decoder).parameters


def test_give_pre_end_stops_before_the_last_layers():
    decoder, z = Decoder(**TINY), torch.randn(1, 4, 8, 8)
    image = decoder(z)
    decoder.give_pre_end = True
    torch.testing.assert_close(decoder.conv_out(F.silu(decoder.norm_out(decoder(z)))), image)


def test_other_sizes_than_the_resolution_pass():
    z = Encoder(**TINY)(torch.randn(1, 3, 10, 6))
    assert Decoder(**TINY)(z).shape == (1, 3, 10, 6)


@pytest.mark.parametrize("tile", [None, 32])
def test_sizes_that_do_not_halve_are_refused(tile):
    encoder = Encoder(**TINY)
    encoder.tile = tile
    for height, width in ((15, 16), (0, 16), (16, 0)):
        message = f"{height} x {width} pixels.*positive multiples of 2"
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            encoder(torch.randn(1, 3, height, width))


@pytest.mark.parametrize("cls", [Encoder, Decoder])
def test_misspelt_key_is_named(cls):
    with pytest.raises(TypeError, match="num_resblocks"):
        cls(**TINY, num_resblocks=2)


@pytest.mark.parametrize("change", [{"ch": 48}, {"ch_mult": []}, {"ch_mult": [1, 0]}])
def test_widths_out_of_range_are_refused(change):
    for cls in (Encoder, Decoder):
        with pytest.raises(ValueError, match="multiples of num_groups=32"):
            cls(**{**TINY, **change})


def test_attention_that_no_level_has_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        Encoder(**TINY)
        assert not caplog.records
        Encoder(**{**TINY, "resolution": 32, "attn_resolutions": [8, 16]})
    assert [record.getMessage() for record in caplog.records] == [
        "attn_resolutions [8] add no attention: the levels have the resolutions [32, 16]"
    ]


def test_gradient_checkpointing_keeps_gradients_and_halves_the_activations() -> None:
    sizes: dict[str, Any] = {"double_z": False, "z_channels": 4, "resolution": 32, "ch": 8}
    sizes |= {"in_channels": 3, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 2}
    sizes |= {"attn_resolutions": [16], "num_groups": 4, "dropout": 0.3}
    x = torch.randn(2, 3, 32, 32)
    gradients, sizes_kept = [], []
    for recomputed in (False, True):
        torch.manual_seed(0)
        networks = nn.Sequential(
            Encoder(**sizes, gradient_checkpointing=recomputed),
            Decoder(**sizes, gradient_checkpointing=recomputed),
        )
        tensors = []  # what is kept for the way back: all that is saved, and inputs of blocks
        for block in networks.modules():
            if isinstance(block, ResnetBlock | AttnBlock):
                block.register_forward_pre_hook(
                    lambda _, inputs, kept=tensors: kept.append(inputs[0])
                )

        def keep(tensor: Tensor, kept: list[Tensor] = tensors) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = (networks(x) - x).square().mean()
        storages = [t.untyped_storage() for t in tensors if not isinstance(t, nn.Parameter)]
        sizes_kept.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        loss.backward()
        gradients.append([parameter.grad for parameter in networks.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert sizes_kept[1] < sizes_kept[0] / 2


def test_one_site_of_one_image_is_mapped_as_beside_others() -> None:
    encoder = Encoder(**TINY).eval()  # one channel in each group of a norm
    x = torch.randn(2, 3, 2, 2)
    assert encoder(x).shape[2:] == (1, 1)
    torch.testing.assert_close(encoder(x[:1]), encoder(x)[:1])
