"""ImageNet and its variants, from a miniature in the layout of its folder."""

import ast
from pathlib import Path

import numpy as np
import pytest
from support.data import write_imagenet

import taming.data
from taming.data import imagenet_base
from taming.data.imagenet import (
    DRINExamples,
    ImageNetEdgesTrain,
    ImageNetEdgesValidation,
    ImageNetScaleTrain,
    ImageNetScaleValidation,
    ImageNetTrain,
    ImageNetTrainWithDepth,
    ImageNetValidation,
    ImageNetValidationWithDepth,
    RINTrainWithDepth,
    RINValidationWithDepth,
    give_synsets_from_indices,
    str_to_indices,
)

SPLITS = {"train": ImageNetTrain, "validation": ImageNetValidation}


@pytest.fixture
def root(tmp_path, monkeypatch):
    write_imagenet(tmp_path)
    monkeypatch.setenv("TAMING_DATA", str(tmp_path))
    return tmp_path


def test_ranges_include_their_ends():
    assert str_to_indices("32-34, 256, 280-281") == [32, 33, 34, 256, 280, 281]
    assert str_to_indices("5,3-4,4") == [3, 4, 5]


@pytest.mark.parametrize("text", ["1,2,", "", "a", "1-", "-3", "1-2-3"])
def test_invalid_indices_are_refused(text):
    with pytest.raises(ValueError, match=f"got '{text}'"):
        str_to_indices(text)


def test_backward_ranges_are_refused():
    with pytest.raises(ValueError, match="4-2 .*'1, 4-2'"):
        str_to_indices("1, 4-2")


def test_a_synset_without_a_name_is_its_own(root):
    names = root / "ILSVRC2012_train/synset_human.txt"
    first, *others = names.read_text().splitlines()
    synset = first.split()[0]
    for lines in (others, [synset, *others]):
        names.write_text("\n".join(lines))
        items = ImageNetTrain({"size": 8})
        found = {item["synsets"]: item["human_label"] for item in items}
        assert found.pop(synset) == synset
        assert found and all(name.startswith("thing") for name in found.values())


@pytest.mark.parametrize("split", SPLITS)
def test_items(root, split):
    items = SPLITS[split]({"size": 8})
    assert len(items) == 8
    item = items[3]
    assert (item["image"].shape, item["image"].dtype) == ((8, 8, 3), np.float32)
    assert item["relpath"] == "n02/n02_1.JPEG"
    assert item["synsets"] == "n02"
    assert (item["class_label"], item["class_label"].dtype) == (1, np.int64)
    assert item["human_label"] == "thing n02, object"
    assert item["file_path_"] == f"{root}/ILSVRC2012_{split}/data/n02/n02_1.JPEG"
    assert SPLITS[split]()[0]["image"].shape == (20, 30, 3)


def test_only_training_images_are_cropped_at_random_by_default(root):
    def kinds(items):
        return len({items[0]["image"].tobytes() for _ in range(10)})

    assert kinds(ImageNetTrain({"size": 8})) > 1
    assert kinds(ImageNetTrain({"size": 8, "ImageNetTrain": {"random_crop": False}})) == 1
    assert kinds(ImageNetValidation({"size": 8})) == 1
    assert kinds(ImageNetValidation({"size": 8, "ImageNetValidation": {"random_crop": True}})) > 1


def test_sub_indices_choose_classes_and_renumber_them(root):
    items = ImageNetValidation({"sub_indices": "31-151"})
    assert {item["synsets"] for item in items} == {"n02", "n03"}
    assert {int(item["class_label"]) for item in items} == {0, 1}
    with pytest.raises(ValueError, match="sub_indices .* selects no class of the 8 images in"):
        ImageNetValidation({"sub_indices": "5"})
    with pytest.raises(ValueError, match="index_synset.yaml .*class 400.* 400 classes"):
        ImageNetValidation({"sub_indices": "400"})


def test_synsets_of_indices(root):
    path = root / "ILSVRC2012_train" / "index_synset.yaml"
    assert give_synsets_from_indices([30, 300], path) == ["n01", "n04"]


def test_a_file_list_is_used_and_the_originals_exception_left_out(root):
    folder = root / "ILSVRC2012_train"
    (folder / "filelist.txt").write_text("n02/n02_1.JPEG\nn06596364/n06596364_9591.JPEG\n")
    assert [item["relpath"] for item in ImageNetTrain()] == ["n02/n02_1.JPEG"]


def test_the_root_may_come_from_the_configuration_or_be_the_originals(root, monkeypatch):
    monkeypatch.delenv("TAMING_DATA")
    assert len(ImageNetTrain({"root": str(root)})) == 8
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    (root / "cache" / "autoencoders").mkdir(parents=True)
    (root / "cache" / "autoencoders" / "data").symlink_to(root)
    assert len(ImageNetValidation()) == 8


def test_label_files_are_fetched_once(root, monkeypatch):
    fetched = []

    def download(url, path):
        fetched.append(url)
        path.write_text("".join(f"n0{n} thing\n" for n in (1, 2, 3, 4)))

    monkeypatch.setattr(imagenet_base, "download", download)
    (root / "ILSVRC2012_train" / "synset_human.txt").unlink()
    assert ImageNetTrain()[0]["human_label"] == "thing"
    ImageNetTrain()
    assert fetched == [imagenet_base.NAMES_URL]


def test_the_error_for_a_missing_folder_names_its_source(tmp_path):
    message = r"ILSVRC2012_train/data does not exist: get the images .* from https://image-net.org"
    with pytest.raises(FileNotFoundError, match=message):
        ImageNetTrain({"root": str(tmp_path)})


def test_unknown_keys_are_refused(root):
    with pytest.raises(ValueError, match=r"\{'sise'\}; .*'size'"):
        ImageNetTrain({"sise": 8})


@pytest.mark.parametrize("variant", [ImageNetTrainWithDepth, ImageNetValidationWithDepth])
@pytest.mark.parametrize("options", [{"size": 8}, {"crop_size": 12}, {"crop_size": 24}, {}])
def test_depth_is_cut_like_its_image(root, variant, options):
    item = variant(**options)[3]
    side = options.get("size") or options.get("crop_size")
    assert item["image"].shape[:2] == item["depth"].shape == ((side, side) if side else (20, 30))
    assert item["depth"].dtype == np.float32
    assert -1 <= item["depth"].min() <= item["depth"].max() <= 1
    assert item["human_label"] == "thing n02, object"


def test_depth_maps_may_lie_elsewhere(root, tmp_path):
    (tmp_path / "imagenet_depth").rename(tmp_path / "other")
    assert len(ImageNetTrainWithDepth(root=str(tmp_path / "other"))) == 8
    with pytest.raises(FileNotFoundError, match="depth maps .*scripts/extract"):
        ImageNetTrainWithDepth()


def test_mirrored_training_images_have_mirrored_depth(root):
    depths = [ImageNetTrainWithDepth(size=20)[0]["depth"] for _ in range(20)]
    assert {bool(depth[0, 0] < depth[0, -1]) for depth in depths} == {False, True}


@pytest.mark.parametrize("variant", [RINTrainWithDepth, RINValidationWithDepth])
def test_restricted_imagenet(root, variant):
    (root / "ILSVRC2012_train" / "data" / "n9029").mkdir()
    items = variant(size=8, config={"root": str(root)})
    assert len(items) == 8
    assert items[0]["depth"].shape == (8, 8)


def test_the_sub_indices_of_depth_include_their_ends(root):
    assert len(ImageNetTrainWithDepth(sub_indices="30-31")) == 4


def test_examples_with_depth(shared):
    items = DRINExamples(size=16, root=str(shared / "data" / "taming"))
    assert len(items) == 25
    for item in (items[0], items[24]):
        assert set(item) == {"image", "depth"}
        assert (item["image"].shape, item["depth"].shape) == ((16, 16, 3), (16, 16))
        assert item["depth"].std() > 0.05
    assert Path(items.depth_paths[0]).suffix == ".png"


@pytest.mark.parametrize("variant", [ImageNetScaleTrain, ImageNetScaleValidation])
@pytest.mark.parametrize("keep_mode", ["nearest", "bilinear", "bicubic"])
def test_the_coarser_version_has_less_detail_in_the_same_place(root, variant, keep_mode):
    items = variant(crop_size=12, up_factor=4, keep_mode=keep_mode)
    image, coarse = items[0]["image"], items[0]["lr"]
    assert image.shape == coarse.shape == (12, 12, 3)
    assert coarse.dtype == np.float32
    assert np.abs(np.diff(coarse, axis=0)).mean() < 0.5 * np.abs(np.diff(image, axis=0)).mean()


def test_scale_by_one_changes_nothing(root):
    item = ImageNetScaleValidation(size=12, up_factor=1)[0]
    np.testing.assert_allclose(item["lr"], item["image"], atol=1 / 127)


def test_images_may_be_divided_first_and_need_no_coarser_version(root):
    item = ImageNetScaleValidation(hr_factor=2)[0]
    assert item["image"].shape == (10, 15, 3)
    assert "lr" not in item
    with pytest.raises(ValueError, match=r"n01_0.JPEG: \(20, 30\) .* 21"):
        ImageNetScaleValidation(hr_factor=21)[0]


@pytest.mark.parametrize("variant", [ImageNetEdgesTrain, ImageNetEdgesValidation])
def test_edges(root, variant):
    item = variant(crop_size=16)[0]
    assert item["lr"].shape == item["image"].shape == (16, 16, 3)
    assert set(np.unique(item["lr"])) == {0, 1}
    assert (item["lr"][..., :1] == item["lr"]).all()


def test_scikit_image_is_imported_only_where_edges_are_found():
    for file in Path(taming.data.__path__[0]).rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "skimage" not in ast.unparse(node), file
