"""Annotated objects of COCO and Open Images: the excerpts, miniatures, filters, numbering."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import write_coco_objects, write_image

from taming.data.annotated_objects_coco import AnnotatedObjectsCoco
from taming.data.annotated_objects_dataset import build_crop
from taming.data.annotated_objects_open_images import AnnotatedObjectsOpenImages
from taming.data.datamodule import DataModuleFromConfig
from taming.data.helper_types import Annotation
from taming.data.open_images_helper import (
    open_images_unify_categories_for_coco,
    top_300_classes_plus_coco_compatibility,
)

SCENE = {
    "split": "validation",
    "keys": ["image", "objects_bbox", "file_name", "annotations"],
    "no_tokens": 8192,
    "target_image_size": 32,
    "min_object_area": 0.00001,
    "min_objects_per_image": 2,
    "max_objects_per_image": 30,
    "crop_method": "center",
    "random_flip": False,
    "use_group_parameter": True,
    "encode_crop": True,
}
HELPER = "taming.data.open_images_helper"
OPEN_IMAGES = {
    "category_allow_list_target": f"{HELPER}.top_300_classes_plus_coco_compatibility",
    "category_mapping_target": f"{HELPER}.open_images_unify_categories_for_coco",
}


@pytest.fixture
def coco(tmp_path):
    """Builds data sets of a miniature of COCO."""
    write_coco_objects(tmp_path)

    def build(**options):
        options = {"min_objects_per_image": 1, "no_tokens": 64, **options}
        return AnnotatedObjectsCoco(data_path=str(tmp_path), **{**SCENE, **options})

    return build


BOXES = """ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,\
IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
a1,xclick,/m/dog,1,0.0,0.5,0.25,0.75,1,0,0,1,0
a1,xclick,/m/pup,1,0.5,1.0,0.0,1.0,0,0,1,0,0
a1,activemil,/m/01s55n,1,0.0,1.0,0.0,1.0,-1,-1,-1,-1,-1
a1,xclick,/m/cat,1,0.0,1.0,0.0,1.0,0,0,0,0,0
"""
allowed = [("Dog", 9), ("Puppy", 8), ("Suitcase", 7), ("Unicorn", 6)]
mapping = {"/m/pup": "/m/dog"}


@pytest.fixture
def open_images(tmp_path):
    """Builds data sets of a miniature of Open Images."""
    write_image(tmp_path / "test" / f"{'a1':0>16}.jpg")
    (tmp_path / "test-annotations-bbox.csv").write_text(BOXES)
    names = "/m/dog,Dog\n/m/pup,Puppy\n/m/01s55n,Suitcase\n/m/cat,Cat\n"
    (tmp_path / "class-descriptions-boxable.csv").write_text(names)
    targets = {
        "category_allow_list_target": f"{__name__}.allowed",
        "category_mapping_target": f"{__name__}.mapping",
    }

    def build(**options):
        options = {**SCENE, "split": "test", "no_tokens": 64, **targets, **options}
        return AnnotatedObjectsOpenImages(data_path=str(tmp_path), **options)

    return build


def flags(items, index=0):
    """The flags of the objects in an item's sequence, by category number."""
    builder = items.conditional_builders["objects_bbox"]
    objects, _ = builder.inverse_build(items[index]["objects_bbox"])
    described = [builder.representation_to_annotation(token) for token, _ in objects]
    return {a.category_no: (a.is_group_of, a.is_occluded, a.is_depiction) for a in described}


def test_coco_excerpt(shared):
    folder = shared / "data" / "taming" / "coco_annotations_100"
    items = AnnotatedObjectsCoco(data_path=str(folder), **SCENE)
    assert items.no_classes == 80 + 91
    assert 50 < len(items) <= 100
    item = items[0]
    assert set(item) == set(SCENE["keys"])
    assert (item["image"].shape, item["image"].dtype) == ((32, 32, 3), torch.float32)
    assert -1 <= item["image"].min() < 0 < item["image"].max() <= 1
    assert item["objects_bbox"].shape == (92,)
    assert (folder / "val2017" / item["file_name"]).is_file()
    assert 2 <= len(item["annotations"]) <= 30


@pytest.mark.parametrize("split", ["train", "validation"])
def test_open_images_excerpt(shared, split):
    folder = shared / "data" / "taming" / "open_images_annotations_100"
    options = {**SCENE, **OPEN_IMAGES, "split": split, "crop_method": "random-2d"}
    items = AnnotatedObjectsOpenImages(data_path=str(folder), **options)
    mapped = len(open_images_unify_categories_for_coco)
    assert items.no_classes == len(top_300_classes_plus_coco_compatibility) - mapped
    assert items.get_textual_label_for_category_no(items.no_classes - 1) == "Suitcase"
    assert items.get_textual_label_for_category_id("/m/01g317") == "Person"
    assert len(items) > 20
    item = items[0]
    assert item["image"].shape == (32, 32, 3)
    assert all(isinstance(a, Annotation) for a in item["annotations"])
    assert (folder / split / item["file_name"]).is_file()


def test_allowed_categories_are_named_once():
    names = [name for name, _ in top_300_classes_plus_coco_compatibility]
    assert len(set(names)) == len(names)
    assert names == [name.strip() for name in names]


@pytest.mark.parametrize("target", ["objects_bbox", "objects_center_points"])
def test_batches_keep_annotations_as_lists(coco, target):
    data = DataModuleFromConfig(
        batch_size=2,
        num_workers=0,
        validation={
            "target": "taming.data.annotated_objects_coco.AnnotatedObjectsCoco",
            "params": {
                "data_path": str(coco().images.parent),
                **SCENE,
                "min_objects_per_image": 1,
                "keys": ["image", target, "annotations", "file_name"],
            },
        },
    )
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (2, 32, 32, 3)
    length = {"objects_bbox": 92, "objects_center_points": 62}[target]
    assert (batch[target].shape, batch[target].dtype) == ((2, length), torch.int64)
    assert [len(objects) for objects in batch["annotations"]] == [3, 1]
    assert batch["file_name"] == ["1.jpg", "2.jpg"]


def test_things_and_stuff_are_chosen_and_numbered_by_their_ids_as_text(coco):
    items = coco()
    assert items.category_ids == ["10", "100", "2"]
    names = [items.get_textual_label_for_category_no(n) for n in range(3)]
    assert names == ["dog", "sky", "cat"]
    assert [items.get_category_number(items.get_category_id(n)) for n in range(3)] == [0, 1, 2]
    assert coco(use_stuff=False).category_ids == ["10", "2"]
    assert coco(use_things=False).category_ids == ["100"]
    with pytest.raises(ValueError, match="use_things and use_stuff"):
        coco(use_things=False, use_stuff=False)


def test_boxes_are_shares_of_the_image(coco):
    boxes = {a.category_id: a.bbox for a in coco()[0]["annotations"]}
    assert boxes == {"2": (0, 0, 0.5, 0.5), "10": (0.5, 0.5, 0.5, 0.5), "100": (0, 0, 1, 0.25)}


def test_crowds_are_marked_only_where_the_original_is_not_followed(coco):
    crowd = coco().category_number["2"]
    assert {number: f[0] for number, f in flags(coco()).items()} == {0: False, 1: False, 2: False}
    marked = coco(legacy_group_bit=False)
    assert {n: f[0] for n, f in flags(marked).items()} == {0: False, 1: False, crowd: True}
    unused = coco(legacy_group_bit=False, use_group_parameter=False)
    assert not any(f[0] for f in flags(unused).values())


def test_items_are_repeatable_and_leave_the_annotations_as_they_are(coco):
    items = coco()
    before = [list(items.annotations[i]) for i in items.image_ids]
    for _ in range(5):
        assert items[0]["annotations"] == before[0]
    assert [items.annotations[i] for i in items.image_ids] == before


def test_images_and_objects_are_filtered(coco):
    assert len(coco()) == 2
    assert len(coco(min_objects_per_image=2)) == 1
    assert len(coco(max_objects_per_image=2)) == 1
    assert [a.category_id for a in coco(min_object_area=0.25)[0]["annotations"]] == ["10"]
    with pytest.raises(ValueError, match="no image of 2 has 9 to 30 .* min_objects_per_image"):
        coco(min_objects_per_image=9)


@pytest.mark.parametrize("crop_method", ["none", "center", "random-1d", "random-2d"])
@pytest.mark.parametrize("random_flip", [False, True])
def test_the_sequence_describes_the_crop_that_is_shown(coco, crop_method, random_flip):
    """Find the crop of a picture whose left half is black and whose right half is white."""
    keys = ["image", "crop_bbox", "flipped", "objects_bbox"]
    items = coco(keys=keys, crop_method=crop_method, random_flip=random_flip, no_tokens=8192)
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 255
    Image.fromarray(pixels).save(items.images / "1.jpg", quality=100)
    builder = items.conditional_builders["objects_bbox"]
    for _ in range(5):
        item = items[0]
        left, _, width, _ = item["crop_bbox"]
        white = (left + width - 0.5) / width
        assert abs((item["image"].mean() + 1) / 2 - white) < 0.05
        assert bool(item["image"][:, 0].mean() > item["image"][:, -1].mean()) == item["flipped"]
        _, crop = builder.inverse_build(item["objects_bbox"])
        assert crop is not None
        shown = 1 - left - width if item["flipped"] else left
        assert abs(crop[0] - shown) < 1 / 89
        assert random_flip or not item["flipped"]


def test_unknown_crop_methods_are_refused():
    with pytest.raises(ValueError, match="crop_method must be none, .*, got 'random'"):
        build_crop("random", 8, False)


def test_without_keys_items_hold_everything(coco):
    item = coco(keys=[])[1]
    assert {"id", "original_size", "crop_bbox", "objects_center_points"} < set(item)
    assert item["original_size"] == (30, 20)


def test_without_image_nothing_is_cropped(coco):
    item = coco(keys=["objects_bbox"], crop_method="random-2d")[0]
    assert list(item) == ["objects_bbox"]


def test_unknown_keys_and_splits_are_refused(coco, open_images):
    with pytest.raises(ValueError, match="keys .*'bbox'; valid: .*objects_bbox"):
        coco(keys=["bbox"])
    with pytest.raises(ValueError, match="'flipped', .*'image'"):
        coco(keys=["flipped"])
    with pytest.raises(ValueError, match="split .*'train' or 'validation'"):
        coco(split="test")
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        open_images(split="val")


def test_open_images_maps_and_numbers_categories(open_images, caplog):
    items = open_images()
    assert items.category_ids == ["/m/dog", "/m/01s55n"]
    assert [a.category_no for a in items[0]["annotations"]] == [0, 0, 1]
    assert items[0]["annotations"][0].bbox == (0, 0.25, 0.5, 0.5)
    assert "1 allowed categories do not exist: ['Unicorn']" in caplog.text
    everything = open_images(category_allow_list_target=None, category_mapping_target=None)
    assert everything.category_ids == ["/m/cat", "/m/dog", "/m/pup", "/m/01s55n"]


def test_flags_of_open_images(open_images):
    items = open_images(use_additional_parameters=True, max_objects_per_image=3)
    described = flags(items)
    assert described[1] == (True, True, True)  # unknown counts as set
    one = open_images(use_additional_parameters=False)
    assert flags(one)[1] == (True, False, False)


def test_tokens_may_be_reserved_for_more_categories(open_images):
    assert open_images(no_object_classes=20).no_classes == 20


def test_errors_for_missing_parts_name_their_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMING_DATA", str(tmp_path))
    place = f"{tmp_path}/coco/val2017"
    with pytest.raises(FileNotFoundError, match=f"{place} does not exist: get .*cocodataset.org"):
        AnnotatedObjectsCoco(data_path="data/coco", **SCENE)
    with pytest.raises(FileNotFoundError, match="validation images from https://storage.google"):
        AnnotatedObjectsOpenImages(data_path="data/open_images", **SCENE)
