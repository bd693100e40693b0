"""Lists of picture files: equality with the original, labels, damaged files."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from taming.data.base import ConcatDatasetWithIndex, ImagePaths, NumpyPaths


@pytest.fixture
def files(tmp_path):
    """Three images of 12x10 pixels in different greys."""
    paths = [tmp_path / f"{grey}.png" for grey in (10, 20, 30)]
    for path in paths:
        Image.new("RGB", (12, 10), (int(path.stem),) * 3).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def truncated(tmp_path):
    """A JPEG that ends in the middle."""
    path = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:700])
    return str(path)


def grey_of(item):
    return round((item["image"][0, 0, 0] + 1) * 127.5)


def test_images_equal_the_originals(shared):
    safetensors = pytest.importorskip("safetensors.torch")
    golden = safetensors.load_file(shared / "upstream" / "golden" / "data.safetensors")
    golden = {key: value for key, value in golden.items() if key.startswith("ImagePaths/")}
    paths = [shared / "data" / key.split("/", 1)[1].rsplit("/", 1)[0] for key in golden]
    items = ImagePaths(paths, size=64)
    assert len(items) == 3
    for item, expected in zip(items, golden.values(), strict=True):
        difference = (torch.from_numpy(item["image"]) - expected).abs() * 255
        assert difference.max() <= 2 + 1e-3
        assert difference.mean() <= 0.5


def test_items_hold_image_path_and_labels(files):
    labels = {"class_label": [5, 6, 7]}
    items = ImagePaths(files, size=8, labels=labels)
    assert [item["class_label"] for item in items] == [5, 6, 7]
    assert [item["file_path_"] for item in items] == files
    assert [grey_of(item) for item in items] == [10, 20, 30]
    assert all(item["image"].shape == (8, 8, 3) for item in items)
    assert all(item["image"].dtype == np.float32 for item in items)
    assert labels == {"class_label": [5, 6, 7]}


def test_labels_must_fit(files):
    with pytest.raises(ValueError, match="'class_label' .*2 values .*3 files"):
        ImagePaths(files, labels={"class_label": [5, 6]})


def test_numpy_paths_hold_the_same_as_images(files, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (1, 3, 10, 12), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    Image.fromarray(array[0].transpose(1, 2, 0)).save(tmp_path / "a.png")
    from_array = NumpyPaths([tmp_path / "a.npy"], size=8)[0]["image"]
    np.testing.assert_array_equal(from_array, ImagePaths([tmp_path / "a.png"], 8)[0]["image"])


def test_numpy_paths_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"a.npy: expected uint8 \(1, 3, H, W\)"):
        NumpyPaths([tmp_path / "a.npy"])[0]


def test_concatenation_returns_the_index_of_an_items_set(files):
    both = ConcatDatasetWithIndex([ImagePaths(files[:1]), ImagePaths(files[1:])])
    assert [(grey_of(item), number) for item, number in both] == [(10, 0), (20, 1), (30, 1)]
    assert both[-3][1] == 0


def test_a_truncated_jpeg_is_named(files, truncated):
    items = ImagePaths([*files, truncated])
    with pytest.raises(ValueError, match="broken.jpg: cannot be decoded.*truncated"):
        items[3]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone.png: cannot be decoded.*does not exist"):
        ImagePaths([tmp_path / "gone.png"])[0]


def test_skipped_files_are_counted_logged_once_and_replaced_by_the_next(files, truncated, caplog):
    items = ImagePaths([files[0], truncated, files[1]], on_error="skip")
    with caplog.at_level(logging.WARNING, logger="taming.data.base"):
        assert [grey_of(item) for item in [*items, *items]] == [10, 20, 20] * 2
    assert items.skipped == {1}
    assert len(caplog.records) == 1
    assert "broken.jpg" in caplog.text


def test_a_skipped_file_at_the_end_is_replaced_by_the_first(files, truncated):
    assert grey_of(ImagePaths([files[0], truncated], on_error="skip")[-1]) == 10


def test_an_error_if_nothing_can_be_read(truncated):
    with pytest.raises(ValueError, match="all 2 pictures were skipped"):
        ImagePaths([truncated, truncated], on_error="skip")[0]


def test_images_smaller_than_the_crop_are_named_unless_they_may_be_enlarged(files):
    with pytest.raises(ValueError, match="10.png: 12x10 .*16x16"):
        ImagePaths(files, size=16, allow_upscale=False)[0]
    assert ImagePaths(files, size=16)[0]["image"].shape == (16, 16, 3)


def test_the_error_names_the_file_across_loader_processes(truncated):
    with pytest.raises(ValueError, match="broken.jpg"):
        next(iter(DataLoader(ImagePaths([truncated]), num_workers=1)))


def test_an_unknown_way_to_handle_errors_is_refused(files):
    with pytest.raises(ValueError, match="got 'ignore'"):
        ImagePaths(files, on_error="ignore")
