"""Large pictures by tiles: what is exact, what is close, and what the sample of a picture is."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taming.models.vqgan import VQModel
from taming.modules import tiling
from taming.modules.diffusionmodules.blocks import group_norm
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.tiling import BLOCK, KEYS, Sample, Survey, draw_sample, in_tiles
from taming.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3}
SIZES |= {"out_ch": 3, "ch": 8, "num_groups": 4, "num_res_blocks": 1, "attn_resolutions": []}


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def picture(height: int, width: int) -> Tensor:
    """Make a picture (1, 3, H, W) of gradients, and noise that differs by place."""
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    smooth = torch.stack([rows * columns, rows.expand(-1, width), columns.expand(height, -1)])
    return (0.5 * smooth + 0.1 * noise * (2 + columns)).clamp(-1, 1)[None]


def networks(**sizes: Any) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return Encoder(**SIZES, **sizes).eval(), Decoder(**SIZES, **sizes).eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_a_picture_that_fits_into_a_tile_is_computed_as_without_tiles() -> None:
    encoder, decoder = networks(ch_mult=[1, 2])
    x = picture(128, 128).expand(2, -1, -1, -1)
    z = encoder(x)  # (2, 4, 64, 64): more than KEYS sites
    x_rec = decoder(z)
    encoder.tile = decoder.tile = 256
    assert torch.equal(encoder(x), z) and torch.equal(decoder(z), x_rec)
    encoder.tile = decoder.tile = 128  # one at a time
    torch.testing.assert_close(encoder(x), z)
    torch.testing.assert_close(decoder(z), x_rec)


@pytest.mark.parametrize("ch_mult", [[1, 2], [1, 1, 2]])
def test_tiles_are_the_whole_under_the_same_survey(
    ch_mult: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "SHARE", 0.5)
    monkeypatch.setattr(tiling, "MARGIN", 13)  # all that the convolutions see
    encoder, decoder = networks(ch_mult=ch_mult)
    unit = encoder.factor
    x, z = picture(64 * unit, 50 * unit), torch.randn(1, 4, 64, 50)
    for run, whole, before, after in ((encoder.run, x, unit, 1), (decoder.run, z, 1, unit)):
        sample = draw_sample(whole, before, most=1600)
        with Survey(sample).used():
            run(sample.blocks)
            wanted = run(whole)
        found = in_tiles(run, whole, 52, before, after)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_tiles_are_close_to_the_whole_and_have_no_seams() -> None:
    encoder, _ = networks(ch_mult=[1, 2])
    x = (picture(192, 192) - picture(192, 192).mean()) * 0.2
    x += torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    wanted = encoder(x)  # (1, 4, 96, 96)
    encoder.tile = 128
    errors = (encoder(x) - wanted).square().sum(dim=1)[0]  # (96, 96)
    assert relative(encoder(x), wanted) < 0.1
    border = torch.zeros(96, dtype=torch.bool)
    for start, _ in tiling.spans(96, 64)[1:]:
        border[[start - 1, start]] = True
    at_borders = (border[:, None] | border)[1:-1, 1:-1]
    errors = errors[1:-1, 1:-1]
    assert errors[at_borders].mean() < 1.5 * errors[~at_borders].mean()


def test_a_survey_of_a_whole_picture_holds_its_own_statistics() -> None:
    norm = group_norm(8, 4)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 8, 6, 5) * 3 + 2
    with Survey(Sample(x, torch.ones(1), (0.0, 0.0))).used():
        torch.testing.assert_close(norm(x), torch.nn.GroupNorm.forward(norm, x))


def test_a_sample_contains_the_only_detail_of_a_picture() -> None:
    x = torch.zeros(1, 3, 40 * BLOCK, 40 * BLOCK)
    x[:, :, 100:110, 50:60] = 1
    sample = draw_sample(x, unit=1, most=3000)
    assert sample.blocks.any() and len(sample.blocks) < 50
    torch.testing.assert_close(sample.weights.sum(), torch.tensor(1.0))
    inside = sample.blocks[:, :, 2:-2, 2:-2].flatten(1).mean(dim=1)
    assert float((inside * sample.weights).sum()) < 10 * float(x.mean())


def test_any_shape_and_batch() -> None:
    encoder, decoder = networks(ch_mult=[1, 2])
    encoder.tile = decoder.tile = 64
    for height, width in ((2, 2400), (1000, 6), (80, 100)):
        x = torch.cat([picture(height, width), -picture(height, width)])
        z = encoder(x)
        assert z.shape == (2, 4, height // 2, width // 2) and z.isfinite().all()
        torch.testing.assert_close(z[1:], encoder(x[1:]))
        assert decoder(z).shape == x.shape


def test_gradients_are_those_of_the_whole() -> None:
    encoder, _ = networks(ch_mult=[1, 1])
    x = picture(80, 80)
    wanted = encoder(x)
    encoder.tile = 32
    assert not torch.equal(encoder(x), wanted)
    with torch.enable_grad():
        assert torch.equal(encoder(x), wanted)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    target = "taming.modules.vqvae.quantize.LoopyVectorQuantizer"
    loopy = {"target": target, "params": {"max_loops": 3, "target_length": 2.0}}
    loss = {"target": "taming.modules.losses.DummyLoss"}
    sizes = {**SIZES, "ch_mult": [1, 2]}
    return Tokenizer(VQModel(sizes, loss, 16, 4, quantizer_config=loopy), tile=40)


def test_rates_hold_for_the_whole_of_a_tiled_picture(tokenizer: Tokenizer) -> None:
    array = ((picture(75, 90)[0].movedim(0, -1) + 1) * 127.5).numpy().astype(np.uint8)
    codes = tokenizer.encode(array)
    assert codes.indices.shape == (38, 45, 3) and KEYS < 38 * 45  # type: ignore[union-attr]
    assert tokenizer.decode(codes).size == (90, 75)
    few = tokenizer.encode(array, max_codes=2000)
    assert len(few) <= 2000
    assert torch.equal(few.levels[0][..., 0] < 0, torch.zeros(38, 45, dtype=torch.bool))
    assert 38 * 45 <= len(tokenizer.encode(array, target_psnr=1.0)) <= len(codes) * 3


def test_the_tile_can_be_set(tokenizer: Tokenizer) -> None:
    array = ((picture(80, 80)[0].movedim(0, -1) + 1) * 127.5).numpy().astype(np.uint8)
    before = tokenizer.tile
    tokenizer.tile = None
    assert tokenizer.tile is None and tokenizer.model.decoder.tile is None
    whole = tokenizer.encode(array)
    assert torch.equal(
        whole.levels[0], tokenizer.model.encode_to_codes(tokenizer.to_tensor(array)[None])[0]
    )
    with pytest.raises(ValueError, match=r"tile.*0"):
        tokenizer.tile = 0
    tokenizer.tile = before
