"""Decoding, and the laws of views: right size, aligned pictures, repeatable draws."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from taming.data.preprocessing import SquareCrop, decode_image, to_unit_range


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_image_becomes_rgb(mode):
    image = Image.new("RGB", (5, 4), "white").convert(mode)
    picture = decode_image(encoded(image, "TIFF"))
    assert picture.shape == (3, 4, 5)
    assert picture.dtype == torch.uint8
    assert (picture == 255).all()


def test_transparent_palette_decodes_without_a_warning():
    image = Image.new("P", (2, 2))
    picture = decode_image(encoded(image, transparency=b"\x00\x80"))
    assert picture.shape == (3, 2, 2)


def test_sixteen_bit_grey_keeps_its_brightness():
    picture = decode_image(encoded(Image.fromarray(np.full((2, 2), 257 * 100, np.uint16))))
    assert (picture == 100).all()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by 90 degrees.
    picture = decode_image(encoded(Image.new("RGB", (6, 2)), "JPEG", exif=exif))
    assert picture.shape == (3, 6, 2)


def test_unit_range_spans_minus_one_to_one():
    image = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, [[[-1.0], [1.0]]])


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (8, 8), (5, 40)])
@pytest.mark.parametrize("random", [False, True])
def test_views_have_the_crops_size_and_lie_inside(shape, random):
    crop = SquareCrop(8, random, random, (1.0, 2.5) if random else None)
    for _ in range(20):
        view = crop.draw(*shape)
        assert 0 <= view.top <= view.scaled[0] - 8
        assert 0 <= view.left <= view.scaled[1] - 8
        assert view.apply(torch.zeros(3, *shape, dtype=torch.uint8)).shape == (3, 8, 8)


def test_the_short_side_is_drawn_from_the_whole_range_but_never_above_the_pictures_own():
    free = {min(SquareCrop(8, random_scale=(1, 4)).draw(16, 30).scaled) for _ in range(300)}
    capped = SquareCrop(8, random_scale=(1, 4), allow_upscale=False)
    own = {min(capped.draw(16, 30).scaled) for _ in range(300)}
    assert free == set(range(8, 33))
    assert own == set(range(8, 17))


def test_without_randomness_the_middle_is_cut():
    view = SquareCrop(4).draw(4, 9)
    assert view == ((4, 9), 0, 2, 4, 4, False)


def test_random_crops_and_flips_reach_everything():
    views = [SquareCrop(4, random_crop=True, random_flip=True).draw(4, 6) for _ in range(100)]
    assert {(view.left, view.flip) for view in views} == {
        (left, flip) for left in range(3) for flip in (False, True)
    }


def test_same_seed_same_views():
    crop = SquareCrop(8, True, True, (1, 3))
    torch.manual_seed(5)
    first = [crop.draw(30, 40) for _ in range(10)]
    torch.manual_seed(5)
    assert first == [crop.draw(30, 40) for _ in range(10)]


def test_one_view_keeps_image_and_mask_aligned():
    classes = torch.zeros(1, 24, 36, dtype=torch.uint8)
    classes[:, :, 18:] = 200
    view = SquareCrop(12, True, True).draw(24, 36)
    mask = view.apply(classes, InterpolationMode.NEAREST)
    assert set(mask.unique().tolist()) <= {0, 200}
    torch.testing.assert_close(mask, view.apply(classes))


def test_size_none_leaves_pictures_whole():
    picture = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
    torch.testing.assert_close(SquareCrop(None).draw(7, 9).apply(picture), picture)


def test_a_picture_smaller_than_the_crop_is_refused_or_enlarged():
    with pytest.raises(ValueError, match="10x6 pixels are fewer than the crop of 8x8.*upscale"):
        SquareCrop(8, allow_upscale=False).draw(6, 10)
    assert SquareCrop(8).draw(6, 10).scaled == (8, 13)


@pytest.mark.parametrize("scale", [(0.5, 1), (2, 1), (1,)])
def test_senseless_scales_are_refused(scale):
    with pytest.raises(ValueError, match="random_scale must be"):
        SquareCrop(8, random_scale=scale)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="got -8"):
        SquareCrop(-8)
