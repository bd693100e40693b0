"""U-Nets and small decoders: keys of the original, shapes, and what each of them looks at."""

import pytest
import torch
import torch.nn.functional as F

from taming.modules.diffusionmodules.model import Model, SimpleDecoder, UpsampleDecoder, VUNet
from taming.modules.diffusionmodules.unet import get_timestep_embedding

TINY = {
    "ch": 32,
    "out_ch": 2,
    "ch_mult": [1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
}


def shapes(module: torch.nn.Module, *names: str) -> list[tuple[int, ...]]:
    return [tuple(module.state_dict()[f"{name}.weight"].shape) for name in names]


def test_model_has_the_originals_parameters() -> None:
    model = Model(**TINY)
    blocks = {key.rpartition(".")[0] for key in model.state_dict()}
    assert {"temb.dense.0", "temb.dense.1", "down.1.attn.1.q", "up.1.attn.2.q"} <= blocks
    assert not {key for key in blocks if key.startswith(("down.1.down", "up.0.up", "down.0.attn"))}
    # On the way up, each block takes what comes from below and one step of the way down.
    assert shapes(model, *(f"up.1.block.{i}.conv1" for i in range(3))) == [
        (64, 64 + 64, 3, 3),
        (64, 64 + 64, 3, 3),
        (64, 64 + 32, 3, 3),
    ]
    assert shapes(model, *(f"up.0.block.{i}.conv1" for i in range(3))) == [
        (32, 64 + 32, 3, 3),
        (32, 32 + 32, 3, 3),
        (32, 32 + 32, 3, 3),
    ]
    assert shapes(model, "temb.dense.0", "mid.block_1.temb_proj") == [(128, 32), (64, 128)]
    assert set(Model(**TINY, use_timestep=False).state_dict()) == {
        key for key in model.state_dict() if not key.startswith("temb.")
    }


def test_model_depends_on_image_and_step() -> None:
    model, x, t = Model(**TINY).eval(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    y = model(x, t)
    assert y.shape == (2, 2, 16, 16)
    torch.testing.assert_close(model(x[1:], t[1:]), y[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t.flip(0)), y)
    with pytest.raises(ValueError, match="t is missing"):
        model(x)
    with pytest.raises(ValueError, match="t is given"):
        Model(**TINY, use_timestep=False)(x, t)


def test_steps_are_embedded_as_waves() -> None:
    embedded = get_timestep_embedding(torch.tensor([0, 5]), 9)
    assert embedded[0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0]
    frequencies = 10000.0 ** -(torch.arange(4) / 3)
    torch.testing.assert_close(embedded[1, :4], torch.sin(5 * frequencies))


def test_vunet_depends_on_condition_and_latent() -> None:
    net = VUNet(**TINY, c_channels=5, z_channels=7).eval()
    c, z = torch.randn(2, 5, 16, 16), torch.randn(2, 7, 8, 8)
    assert shapes(net, "conv_in", "z_in", "mid.block_1.conv1") == [
        (32, 5, 3, 3),
        (64, 7, 1, 1),
        (64, 128, 3, 3),
    ]
    y = net(c, z)
    assert y.shape == (2, 2, 16, 16)
    assert not torch.allclose(net(c, z.flip(0)), y)
    assert not torch.allclose(net(c.flip(0), z), y)
    timed = VUNet(**TINY, c_channels=5, z_channels=7, use_timestep=True)
    assert timed(c, z, torch.tensor([1, 2])).shape == (2, 2, 16, 16)
    with pytest.raises(TypeError, match="num_resblocks"):
        VUNet(**TINY, c_channels=5, z_channels=7, num_resblocks=2)


def test_simple_decoder_doubles() -> None:
    decoder = SimpleDecoder(32, 3)
    names = [f"model.{i}.conv1" for i in (1, 2, 3)] + ["model.0", "model.4", "model.5.conv"]
    widths = [shape[:2] for shape in shapes(decoder, *names)]
    assert widths == [(64, 32), (128, 64), (64, 128), (32, 32), (32, 64), (32, 32)]
    assert decoder(torch.randn(1, 32, 4, 6)).shape == (1, 3, 8, 12)


def test_upsample_decoder_doubles_between_levels() -> None:
    decoder = UpsampleDecoder(32, 3, ch=32, num_res_blocks=1, resolution=16, ch_mult=(2, 1, 1))
    x = torch.randn(1, 32, 4, 4)
    assert decoder(x).shape == (1, 3, 16, 16)
    assert shapes(decoder, "res_blocks.0.0.conv1", "res_blocks.1.1.conv1") == [
        (64, 32, 3, 3),
        (32, 32, 3, 3),
    ]
    h = decoder.res_blocks[0](x)
    h = decoder.res_blocks[1](decoder.upsample_blocks[0](h))
    h = decoder.res_blocks[2](decoder.upsample_blocks[1](h))
    expected = decoder.conv_out(F.silu(decoder.norm_out(h)))
    torch.testing.assert_close(decoder(x), expected)
