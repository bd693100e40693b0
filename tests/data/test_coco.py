"""COCO's images with captions and maps, from a miniature in its layout."""

import numpy as np
import pytest
from PIL import Image
from support.data import write_coco

from taming.data.coco import CocoImagesAndCaptionsTrain, CocoImagesAndCaptionsValidation

SPLITS = {"train2017": CocoImagesAndCaptionsTrain, "val2017": CocoImagesAndCaptionsValidation}
ONEHOT = {"onehot_segmentation": True, "use_stuffthing": True}


@pytest.fixture
def root(tmp_path):
    write_coco(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_items(root, split):
    items = SPLITS[split](12, root=root, **ONEHOT)
    assert len(items) == 3
    item = items[1]
    assert (item["image"].shape, item["image"].dtype) == ((12, 12, 3), np.float32)
    assert (item["segmentation"].shape, item["segmentation"].dtype) == ((12, 12, 183), np.float32)
    assert item["img_path"].endswith(f"coco/{split}/000000000001.jpg")
    assert item["seg_path"].endswith(f"cocostuffthings/{split}/000000000001.png")
    assert item["filename_"] == "000000000001.jpg"


def test_unlabelled_is_the_first_class(root):
    item = CocoImagesAndCaptionsValidation(20, root=root, force_no_crop=True, **ONEHOT)[0]
    assert set(item["segmentation"].argmax(-1).flat) == {0, 1, 182}


def test_every_caption_of_the_image_and_no_other_is_drawn(root):
    items = CocoImagesAndCaptionsTrain(12, root=root)
    assert {items[2]["caption"][0] for _ in range(30)} == {"a 2", "b 2"}
    assert len(items[2]["caption"]) == 1


@pytest.mark.parametrize("force_no_crop", [False, True])
def test_maps_keep_their_colours_when_rescaled(root, force_no_crop):
    items = CocoImagesAndCaptionsTrain(12, root=root, force_no_crop=force_no_crop)
    item = items[0]
    assert item["seg_path"].endswith("coco/annotations/stuff_train2017_pixelmaps/000000000000.png")
    known = {tuple(pixel) for row in np.asarray(Image.open(item["seg_path"])) for pixel in row}
    shown = np.round((item["segmentation"] + 1) * 127.5).astype(int).reshape(-1, 3)
    assert item["segmentation"].shape == (12, 12, 3)
    assert {tuple(pixel) for pixel in shown} <= known


def test_crops_may_be_smaller_than_the_rescaled_image(root):
    assert CocoImagesAndCaptionsTrain(16, crop_size=8, root=root)[0]["image"].shape == (8, 8, 3)


def test_given_files_choose_the_images(root):
    items = CocoImagesAndCaptionsValidation(12, root=root, given_files=["000000000002.png"])
    assert [item["filename_"] for item in items] == ["000000000002.jpg"]


def test_class_numbers_need_the_maps_that_hold_them(root):
    with pytest.raises(ValueError, match="onehot_segmentation .*use_stuffthing: true"):
        CocoImagesAndCaptionsTrain(12, root=root, onehot_segmentation=True)


def test_errors_for_missing_parts_name_their_source(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="images train2017 from https://cocodataset.org"):
        CocoImagesAndCaptionsTrain(12, root=str(tmp_path / "nowhere"))
    (tmp_path / "cocostuffthings").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"stuffthingmaps_trainval2017.zip"):
        CocoImagesAndCaptionsTrain(12, root=root, use_stuffthing=True)
