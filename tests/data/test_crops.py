"""Laws of crops: the right size, inside the picture, repeatable, reaching everything."""

import pytest
import torch

from taming.data.crops import RandomSquare, SquareCrop, Stretch

CROPS = [
    SquareCrop(8),
    SquareCrop(12, random_crop=True, random_flip=True, random_scale=(1, 2.5), crop_size=8),
    SquareCrop(None, random_crop=True, crop_size=8),
    RandomSquare(8, random_flip=True),
    Stretch(8, random_flip=True),
]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (8, 8), (5, 40)])
def test_views_have_the_crops_size_and_lie_inside(crop, shape):
    for _ in range(20):
        view = crop.view(*shape)
        assert 0 <= view.top <= view.scaled[0] - 8
        assert 0 <= view.left <= view.scaled[1] - 8
        assert view.apply(torch.zeros(3, *shape, dtype=torch.uint8)).shape == (3, 8, 8)


@pytest.mark.parametrize("crop", CROPS)
def test_same_seed_same_views(crop):
    torch.manual_seed(5)
    first = [crop.view(30, 40) for _ in range(10)]
    torch.manual_seed(5)
    assert first == [crop.view(30, 40) for _ in range(10)]


def test_without_size_the_square_is_cut_at_the_pictures_own_resolution():
    crop = SquareCrop(None, crop_size=8)
    assert crop.view(20, 31) == ((20, 31), 6, 11, 8, 8, False)
    assert crop.view(4, 6).scaled == (8, 12)


def test_the_square_may_be_smaller_than_the_rescaled_picture():
    assert SquareCrop(16, crop_size=8).view(32, 64) == ((16, 32), 4, 12, 8, 8, False)
    with pytest.raises(ValueError, match="crop_size 16 .*size 8"):
        SquareCrop(8, crop_size=16)


def test_random_squares_have_every_side_from_the_size_to_the_short_side():
    crop = RandomSquare(10)
    short_sides = {round(10 * 10 / min(crop.view(10, 30).scaled)) for _ in range(50)}
    assert short_sides == {10}
    sides = {crop.sample_side(14) for _ in range(200)}
    assert sides == {10, 11, 12, 13, 14}
    assert crop.sample_side(6) == 6


def test_stretching_shows_everything():
    view = Stretch(8).view(20, 31)
    assert view.bbox == (0, 0, 1, 1)
    assert view.scaled == (8, 8)


def test_the_short_side_is_drawn_from_the_whole_range_but_never_above_the_pictures_own():
    free = {min(SquareCrop(8, random_scale=(1, 4)).view(16, 30).scaled) for _ in range(300)}
    capped = SquareCrop(8, random_scale=(1, 4), allow_upscale=False)
    own = {min(capped.view(16, 30).scaled) for _ in range(300)}
    assert free == set(range(8, 33))
    assert own == set(range(8, 17))


def test_without_randomness_the_middle_is_cut():
    view = SquareCrop(4).view(4, 9)
    assert view == ((4, 9), 0, 2, 4, 4, False)


def test_random_crops_and_flips_reach_everything():
    views = [SquareCrop(4, random_crop=True, random_flip=True).view(4, 6) for _ in range(100)]
    assert {(view.left, view.flip) for view in views} == {
        (left, flip) for left in range(3) for flip in (False, True)
    }


def test_size_none_leaves_pictures_whole():
    picture = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
    torch.testing.assert_close(SquareCrop(None).view(7, 9).apply(picture), picture)


def test_a_picture_smaller_than_the_crop_is_refused_or_enlarged():
    with pytest.raises(ValueError, match="10x6 .*8x8.*upscale"):
        SquareCrop(8, allow_upscale=False).view(6, 10)
    assert SquareCrop(8).view(6, 10).scaled == (8, 13)


@pytest.mark.parametrize("scale", [(0.5, 1), (2, 1), (1,)])
def test_invalid_scales_are_refused(scale):
    with pytest.raises(ValueError, match="random_scale must be"):
        SquareCrop(8, random_scale=scale)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="got -8"):
        SquareCrop(-8)
