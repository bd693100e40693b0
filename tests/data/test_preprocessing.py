"""Decoding, and the laws of views: aligned pictures, coordinates of what is shown."""

import io
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from reliability.pictures import save_png
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from taming.data.crops import RandomSquare, SquareCrop, Stretch
from taming.data.preprocessing import (
    INTERPOLATIONS,
    View,
    check_interpolation,
    decode_depth,
    decode_image,
    decode_mask,
    error_context,
    one_hot,
    read_pair,
    refuse_failed,
    resize,
    shift_classes,
    skipping,
    to_unit_range,
)
from taming.util import DataError


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


def test_images_with_maps_are_not_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, mask = str(tmp_path / "a.jpg"), str(tmp_path / "a.png")
    Image.new("RGB", (6, 2)).save(image, exif=exif)
    Image.new("L", (6, 2)).save(mask)
    assert [picture.shape for picture in read_pair(image, mask, decode_mask)] == [
        (3, 2, 6),
        (1, 2, 6),
    ]


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_hold_class_numbers(mode):
    numbers = np.array([[0, 7], [255, 1]], np.uint8)
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    assert image.mode == mode
    np.testing.assert_array_equal(decode_mask(encoded(image))[0], numbers)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "F"])
def test_masks_of_colours_or_floats_are_refused(mode):
    with pytest.raises(ValueError, match="class number .*(colours|floats)"):
        decode_mask(encoded(Image.new(mode, (2, 2)), "TIFF"))


def test_masks_hold_the_numbers_that_the_file_stores():
    numbers = np.array([[0, 1, 2, 3]])
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert decode_mask(encoded(bits, kind))[0].tolist() == [[0, 1]]
    for depth in (2, 4):
        png = io.BytesIO(save_png(numbers[..., None], depth, 0))
        assert decode_mask(png)[0].tolist() == numbers.tolist()
    for highest in (3, 7, 300):
        values = numbers.astype(np.uint8 if highest < 256 else ">u2").tobytes()
        assert decode_mask(io.BytesIO(b"P5 4 1 %d\n" % highest + values))[0].tolist() == [
            [0, 1, 2, 3]
        ]
        assert decode_mask(io.BytesIO(b"P2 4 1 %d\n0 1 2 3" % highest))[0].tolist() == [
            [0, 1, 2, 3]
        ]


@pytest.mark.parametrize(("dtype", "kinds"), [("uint16", "PNG TIFF PPM"), ("int32", "TIFF")])
def test_masks_of_more_classes_than_256(dtype, kinds):
    numbers = np.array([[0, 255, 256, 65535]], dtype)
    for kind in kinds.split():
        mask = decode_mask(encoded(Image.fromarray(numbers), kind))
        assert mask.dtype == torch.int32 and mask[0].tolist() == numbers.tolist()
    assert shift_classes(mask)[0].tolist() == [[1, 256, 257, 0]]
    view = View((2, 4), 0, 0, 2, 4, flip=True)
    classes = one_hot(view.apply(mask[..., :3], "nearest"), 300).argmax(-1)
    assert classes[0].tolist() == [256, 255, 0, 0]


def test_negative_classes_are_refused():
    mask = decode_mask(encoded(Image.fromarray(np.array([[0, -1]], np.int32)), "TIFF"))
    with pytest.raises(ValueError, match="class -1"):
        one_hot(mask, 3)


def test_unlabelled_becomes_the_first_class():
    assert shift_classes(torch.tensor([[[0, 254, 255]]], dtype=torch.uint8)).tolist() == [
        [[1, 255, 0]]
    ]


def test_depth_that_is_not_finite_is_refused():
    depth = np.array([[1, np.nan]], "<f4")
    with pytest.raises(ValueError, match="not finite"):
        decode_depth(encoded(Image.fromarray(depth[..., None].view(np.uint8))))


def test_one_damaged_file_of_several_does_not_stop_the_others(caplog):
    failed: list[str] = []
    for name in ("a", "b", "c"):
        with skipping(failed), error_context(f"image {name}"):
            if name != "b":
                raise ValueError(f"{name}: broken")
    assert failed == ["image a: broken", "image c: broken"]
    assert [str(error) for record in caplog.records for error in record.args] == failed
    with pytest.raises(ValueError, match="2 of 3 files failed; the first: image a: broken"):
        refuse_failed(failed, 3)
    refuse_failed([], 3)
    with pytest.raises(ValueError, match="^other$"), skipping(failed):
        raise ValueError("other")


def test_depth_is_read_from_bytes_and_rescaled():
    depth = np.array([[3.0, 5.0, 7.0]], "<f4")
    image = Image.fromarray(depth[..., None].view(np.uint8))
    torch.testing.assert_close(decode_depth(encoded(image)), torch.tensor([[[-1.0, 0.0, 1.0]]]))
    flat = Image.fromarray(np.full((2, 2, 1), 3, "<f4").view(np.uint8))
    assert (decode_depth(encoded(flat)) == -1).all()
    with pytest.raises(ValueError, match="RGBA, .*L"):
        decode_depth(encoded(Image.new("L", (2, 2))))


@pytest.mark.parametrize(
    ("size", "fits"),
    [((600, 400), True), ((300, 200), True), ((257, 171), True), ((1199, 801), True)]
    + [((400, 600), False), ((600, 420), False), ((200, 200), False)],
)
def test_a_map_has_the_shape_of_its_image(tmp_path, size, fits):
    image, mask = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    Image.new("RGB", (600, 400)).save(image)
    Image.new("L", size).save(mask)
    with nullcontext() if fits else pytest.raises(DataError) as raised:
        read_pair(image, mask, decode_mask)
    for named in () if fits else (image, "600 x 400", mask, f"{size[0]} x {size[1]}"):
        assert named in str(raised.value)


def test_errors_name_which_of_two_files_is_wrong(tmp_path):
    image, mask = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    Image.new("RGB", (2, 2)).save(image)
    with pytest.raises(ValueError, match="map .*b.png: cannot be decoded.*does not exist"):
        read_pair(image, mask, decode_mask)
    with pytest.raises(ValueError, match="image .*b.png: cannot be decoded"):
        read_pair(mask, image, decode_mask)
    with pytest.raises(ValueError, match="^this: that$"), error_context("this"):
        raise ValueError("that")


def test_one_hot_inverts_by_argmax_and_refuses_classes_beyond():
    mask = torch.tensor([[[0, 3], [2, 2]]], dtype=torch.uint8)
    indicators = one_hot(mask, 4)
    assert indicators.dtype == np.float32
    assert (indicators.sum(-1) == 1).all()
    np.testing.assert_array_equal(indicators.argmax(-1), mask[0])
    with pytest.raises(ValueError, match="class 3, .*3 labels"):
        one_hot(mask, 3)


def test_unit_range_spans_minus_one_to_one():
    image = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, [[[-1.0], [1.0]]])


def test_one_view_keeps_image_and_mask_aligned():
    classes = torch.zeros(1, 24, 36, dtype=torch.uint8)
    classes[:, :, 18:] = 200
    view = SquareCrop(12, True, True).view(24, 36)
    mask = view.apply(classes, "nearest")
    assert set(mask.unique().tolist()) <= {0, 200}
    torch.testing.assert_close(mask, view.apply(classes))


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_interpolation_keeps_plain_colour_and_size(name):
    picture = torch.full((3, 9, 14), 77, dtype=torch.uint8)
    shown = View((6, 10), 1, 2, 4, 5).apply(picture, name)
    assert (shown.shape, shown.dtype) == ((3, 4, 5), torch.uint8)
    assert (shown == 77).all()


@pytest.mark.parametrize("size", [(5, 8), (9, 14), (20, 14)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_rescaling_is_torchvisions(name, size):
    floats = torch.rand(9, 14, 3).permute(2, 0, 1)  # as decoded pictures lie in memory
    mode = InterpolationMode(name)
    for antialias in (True, False):
        wanted = F.resize(floats, list(size), mode, antialias=antialias)
        assert torch.equal(resize(floats, size, name, antialias), wanted)
    levels = (floats * 255).to(torch.uint8)
    wanted = F.resize(levels, list(size), mode, antialias=True).int()
    # Without AVX2, torchvision rescales floats.
    torch.testing.assert_close(resize(levels, size, name, True).int(), wanted, rtol=0, atol=1)


def test_bicubic_does_not_wrap_round_at_black_and_white():
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    picture[..., 4:] = 255
    columns = View((16, 16), 0, 0, 16, 16).apply(picture, "bicubic")[0, 0]
    assert columns[:6].max() < 30
    assert columns[-6:].min() > 225


def test_unknown_interpolations_are_refused():
    with pytest.raises(ValueError, match="one of nearest, .*; got 'cubic'"):
        check_interpolation("cubic")


@pytest.mark.parametrize("crop", [SquareCrop(16, random_crop=True), RandomSquare(16), Stretch(16)])
def test_a_view_has_the_box_that_it_shows(crop):
    rows, columns = torch.meshgrid(
        (torch.arange(60) + 0.5) / 60, (torch.arange(45) + 0.5) / 45, indexing="ij"
    )
    for _ in range(10):
        view = crop.view(60, 45)
        left, top, width, height = view.bbox
        shown = view.apply(torch.stack([columns, rows]))[:, 1:-1, 1:-1]
        places = (torch.arange(1, 15) + 0.5) / 16
        torch.testing.assert_close(shown[0, 0], left + width * places, atol=1e-5, rtol=0)
        torch.testing.assert_close(shown[1, :, 0], top + height * places, atol=1e-5, rtol=0)
