"""The bundled photographs: disjoint splits, repeatable crops of the right shape and range."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from taming.data.photos import PhotosTrain, PhotosValidation, cover


def test_no_photograph_is_in_both_splits():
    train = {item["file_path_"] for item in PhotosTrain(size=16, length=30)}
    validation = {item["file_path_"] for item in PhotosValidation(size=16)}
    assert len(train) == 7
    assert len(validation) == 2
    assert not train & validation


def test_the_stereo_pair_is_on_one_side():
    validation = {item["file_path_"] for item in PhotosValidation(size=16)}
    assert not any("motorcycle" in name for name in validation)


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("dataset", [PhotosTrain, PhotosValidation])
def test_items_have_the_right_shape_and_range(dataset, size):
    items = dataset(size=size, length=8)
    assert len(items) == len(list(items)) == 8
    for item in items:
        assert item["image"].shape == (size, size, 3)
        assert item["image"].dtype == np.float32
        assert -1 <= item["image"].min() < item["image"].max() <= 1


def test_same_seed_same_crops_and_another_seed_others():
    items = PhotosTrain(size=16, length=7)

    def crops(seed):
        torch.manual_seed(seed)
        return np.stack([item["image"] for item in items])

    np.testing.assert_array_equal(crops(1), crops(1))
    assert not np.array_equal(crops(1), crops(2))


def test_validation_crops_differ_from_each_other_and_never_change():
    items = PhotosValidation(size=16)
    first = np.stack([item["image"] for item in items])
    np.testing.assert_array_equal(first, np.stack([item["image"] for item in items]))
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(items)


def test_loader_processes_give_the_same_validation_set():
    here, there = (
        torch.cat([b["image"] for b in DataLoader(PhotosValidation(16), 4, num_workers=workers)])
        for workers in (0, 2)
    )
    torch.testing.assert_close(here, there, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (32, 32)])
@pytest.mark.parametrize("scale", [1.0, 2.0, 9.0])
def test_tiles_cover_the_whole_photograph(shape, scale):
    views = cover(*shape, 16, scale)
    covered = torch.zeros(views[0].scaled)
    for view in views:
        covered[view.top : view.top + 16, view.left : view.left + 16] += 1
    assert covered.min() >= 1
    assert min(views[0].scaled) == min(16 * scale, *shape)


def test_photographs_are_never_enlarged():
    with pytest.raises(ValueError, match="size .*427, .*rocket.jpg"):
        PhotosTrain(size=450)
    with pytest.raises(ValueError, match="size .*300, .*chelsea.png"):
        PhotosValidation(size=512)


def test_a_validation_set_longer_than_its_grid_is_refused():
    with pytest.raises(ValueError, match="length .*1000, .*18 crops .*128 pixels"):
        PhotosValidation(size=128, length=1000)


@pytest.mark.parametrize(
    "build", [lambda s: PhotosTrain(scale=s), lambda s: PhotosValidation(scales=s)]
)
def test_scales_below_one_are_refused(build):
    with pytest.raises(ValueError, match="scale"):
        build((0.5, 2.0))


def test_turned_colours_keep_the_brightness_of_grey_and_repeat_by_seed():
    def draw(hue):
        torch.manual_seed(4)
        return PhotosTrain(size=32, hue=hue)[0]["image"]

    turned = draw(0.5)
    assert np.array_equal(turned, draw(0.5))
    assert not np.array_equal(turned, draw(0.0))
    # A turn of the colour circle keeps the largest and the smallest channel of each pixel.
    np.testing.assert_allclose(turned.max(-1), draw(0.0).max(-1), atol=2 / 127.5)
    with pytest.raises(ValueError, match=r"hue .*\[0, 0.5\], .*0.7"):
        PhotosTrain(size=32, hue=0.7)
