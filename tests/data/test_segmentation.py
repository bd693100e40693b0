"""Images with class maps: equality with the original, one-hot maps, alignment, missing files."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import write_ade20k, write_image, write_mask

from taming.data import ade20k, coco, sflckr
from taming.data.preprocessing import decode_mask
from taming.util import DataError

EXAMPLES = {"ade20k": ade20k.Examples, "coco": coco.Examples, "sflckr": sflckr.Examples}
LABELS = {"ade20k": 151, "coco": 183, "sflckr": 182}


@pytest.fixture
def pair(tmp_path):
    """Arguments for one image of 30x20 pixels, whose map is equal to its red channel."""
    write_mask(tmp_path / "masks" / "a.png", [0, 9, 255])
    mask = Image.open(tmp_path / "masks" / "a.png")
    (tmp_path / "images").mkdir()
    Image.merge("RGB", [mask] * 3).save(tmp_path / "images" / "a.bmp")
    (tmp_path / "list.txt").write_text("a.bmp\n")
    return {
        "data_csv": str(tmp_path / "list.txt"),
        "data_root": str(tmp_path / "images"),
        "segmentation_root": str(tmp_path / "masks"),
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_equal_the_originals(shared, name):
    safetensors = pytest.importorskip("safetensors.torch")
    golden = safetensors.load_file(shared / "upstream" / "golden" / "data.safetensors")
    items = EXAMPLES[name](size=64, root=str(shared / "data" / "taming"))
    for index in (0, 7):
        image = golden[f"{name}.Examples/{index}/image"]
        difference = (torch.from_numpy(items[index]["image"]) - image).abs() * 127.5
        assert difference.max() <= 2 + 1e-3
        assert difference.mean() <= 0.5
        segmentation = items[index]["segmentation"]
        assert (segmentation.shape, segmentation.dtype) == ((64, 64, LABELS[name]), np.float32)
        expected = golden[f"{name}.Examples/{index}/segmentation"].numpy()
        np.testing.assert_array_equal(segmentation.argmax(-1), expected)


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_examples_can_be_read(shared, name):
    items = EXAMPLES[name](size=16, root=str(shared / "data" / "taming"))
    assert len(items) == {"ade20k": 30, "coco": 35, "sflckr": 25}[name]
    assert items[len(items) - 1]["segmentation"].sum() == 16 * 16


@pytest.mark.parametrize("name", EXAMPLES)
def test_errors_for_missing_examples_name_their_source(tmp_path, name, monkeypatch):
    monkeypatch.setenv("TAMING_DATA", str(tmp_path))
    message = f"{name}_examples.txt does not exist: get the {name} examples from https://github"
    with pytest.raises(FileNotFoundError, match=message):
        EXAMPLES[name]()


@pytest.mark.parametrize("size", [None, 12])
@pytest.mark.parametrize("random_crop", [False, True])
def test_image_and_map_stay_aligned(pair, size, random_crop):
    items = sflckr.SegmentationBase(
        **pair, size=size, random_crop=random_crop, interpolation="nearest", n_labels=256
    )
    item = items[0]
    assert item["relative_file_path_"] == "a.bmp"
    assert item["segmentation_path_"].endswith("masks/a.png")
    red = np.round((item["image"][..., 0] + 1) * 127.5)
    np.testing.assert_array_equal(item["segmentation"].argmax(-1), red)
    assert item["image"].shape[:2] == ((size, size) if size else (20, 30))


def test_shifting_makes_unlabelled_the_first_class(pair):
    items = sflckr.SegmentationBase(**pair, n_labels=11, shift_segmentation=True)
    assert set(items[0]["segmentation"].argmax(-1).flat) == {1, 10, 0}
    with pytest.raises(ValueError, match=r"a.png: .*class 255, .* 11 labels"):
        sflckr.SegmentationBase(**pair, n_labels=11)[0]


@pytest.mark.parametrize("options", [{"size": 12}, {"size": 16, "crop_size": 12}])
@pytest.mark.parametrize("split", [ade20k.ADE20kTrain, ade20k.ADE20kValidation])
def test_ade20k_with_and_without_crop_size(tmp_path, split, options):
    write_ade20k(tmp_path)
    items = split(**options, root=str(tmp_path))
    assert len(items) == 1
    item = items[0]
    assert item["scene_category"] == "airport_terminal"
    assert item["image"].shape == (12, 12, 3)
    assert item["segmentation"].shape == (12, 12, 151)
    assert item["relative_segmentation_path_"].endswith("_00000001.png")


def test_ade20k_is_whole_without_size(tmp_path):
    write_ade20k(tmp_path)
    item = ade20k.ADE20kValidation(root=str(tmp_path))[0]
    expected = decode_mask(item["segmentation_path_"])[0]
    np.testing.assert_array_equal(item["segmentation"].argmax(-1), expected)


def test_ade20k_trains_on_crops_from_anywhere(tmp_path):
    write_ade20k(tmp_path)
    items = ade20k.ADE20kTrain(size=12, root=str(tmp_path))
    assert len({items[0]["image"].tobytes() for _ in range(10)}) > 1
    items = ade20k.ADE20kValidation(size=12, root=str(tmp_path))
    assert len({items[0]["image"].tobytes() for _ in range(10)}) == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "has no scene for training/ADE_train_00000001.jpg of .*ade20k_train.txt"),
        ("ADE_train_00000001", "has the line 'ADE_train_00000001'"),
        ("ADE_train_00000001 a b", "has the line 'ADE_train_00000001 a b'"),
    ],
)
def test_an_ade20k_image_without_a_scene_is_named(tmp_path, line, message):
    write_ade20k(tmp_path)
    scenes = tmp_path / "ade20k_root/sceneCategories.txt"
    others = [own for own in scenes.read_text().splitlines() if "train" not in own]
    scenes.write_text("\n".join([line, *others]))
    with pytest.raises(DataError, match=f"sceneCategories.txt {message}"):
        ade20k.ADE20kTrain(root=str(tmp_path))


def test_the_error_for_missing_ade20k_names_its_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="ADEChallengeData2016.zip from http://data.csail"):
        ade20k.ADE20kTrain(root=str(tmp_path))


def test_a_map_of_another_resolution_is_fitted_to_its_image(tmp_path, pair):
    write_image(tmp_path / "images" / "a.bmp", 40, 60)
    item = sflckr.SegmentationBase(**pair, n_labels=256)[0]
    expected = np.kron(decode_mask(item["segmentation_path_"])[0], np.ones((2, 2)))
    np.testing.assert_array_equal(item["segmentation"].argmax(-1), expected)
