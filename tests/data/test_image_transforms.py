"""Crops and flips of single pictures return what they did, for tensors and Pillow images."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
    convert_pil_to_tensor,
)

CROPS = [
    CenterCropReturnCoordinates(8),
    RandomCrop1dReturnCoordinates(8),
    Random2dCropReturnCoordinates(8),
]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 13)])
@pytest.mark.parametrize("pillow", [False, True])
def test_the_box_is_where_the_crop_lies(crop, shape, pillow):
    height, width = shape
    picture = torch.arange(height * width, dtype=torch.uint8).view(1, height, width)
    for _ in range(10):
        (left, top, w, h), shown = crop(F.to_pil_image(picture) if pillow else picture)
        shown = convert_pil_to_tensor(shown) if pillow else shown
        row, column = round(top * height), round(left * width)
        rows, columns = round(h * height), round(w * width)
        assert rows == columns >= 8
        assert torch.equal(shown, picture[:, row : row + rows, column : column + columns])


def test_random_squares_of_small_pictures_are_as_large_as_these():
    box, shown = Random2dCropReturnCoordinates(8)(torch.zeros(3, 5, 6))
    assert shown.shape == (3, 5, 5)
    assert box[3] == 1


@pytest.mark.parametrize("crop", CROPS[:2])
def test_pictures_smaller_than_the_crop_are_refused(crop):
    with pytest.raises(ValueError, match="7x9 .*8x8"):
        crop(torch.zeros(3, 9, 7))


def test_flips_tell_whether_they_happened():
    picture = torch.arange(3.0).view(1, 1, 3)
    seen = set()
    for _ in range(20):
        flipped, shown = RandomHorizontalFlipReturn()(picture)
        assert torch.equal(shown, picture.flip(-1) if flipped else picture)
        seen.add(flipped)
    assert seen == {False, True}
    assert RandomHorizontalFlipReturn(p=0)(picture)[0] is False
