"""Folders of pictures: each file once, nothing left out without a word; texts in one buffer."""

import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reliability.folders import growth

from taming.data.ade20k import ADE20kTrain
from taming.data.annotated_objects_coco import AnnotatedObjectsCoco
from taming.data.base import ImagePaths, NumpyPaths
from taming.data.coco import CocoImagesAndCaptionsTrain
from taming.data.crops import SquareCrop
from taming.data.custom import CustomTrain, ImageFolder, find_files
from taming.data.faceshq import FacesHQTrain
from taming.data.hub import ArrayRows, LabelledImages, ParquetImages
from taming.data.imagenet import ImageNetTrain
from taming.data.paths import Texts, find_images
from taming.data.photos import PhotosTrain, PhotosValidation
from taming.data.sflckr import SegmentationBase
from taming.decoding import picture_extensions


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode())


def test_texts_are_like_a_list():
    given = ["a", "", "zwölf", "x/y.png", os.fsdecode(b"caf\xe9.png")]
    texts = Texts(iter(given))
    assert list(texts) == given == texts and texts != given[1:] and texts != "a"
    assert [texts[i] for i in range(-5, 5)] == given * 2
    assert texts[1:4] == given[1:4] and texts[np.int64(3)] == "x/y.png"
    assert list(pickle.loads(pickle.dumps(texts))) == given
    assert list(Texts([])) == []
    with pytest.raises(IndexError):
        texts[5]


def test_loader_processes_share_the_memory_of_texts():
    names = [
        f"some/folder/of/photos/picture_of_something_{number:07}.png" for number in range(120_000)
    ]
    # In MiB. Counting references copies the pages of a list; what else grows is the same for both.
    assert growth(Texts(names), workers=1) + 5 < growth(names, workers=1)


def test_every_decoded_format_is_found(tmp_path):
    for ending in picture_extensions():
        touch(tmp_path / f"x{ending.upper()}")
    assert len(find_images(tmp_path)) == len(picture_extensions()) >= 20
    assert {".avif", ".jfif", ".jp2", ".pgm", ".pfm"} <= set(picture_extensions())
    assert not {".eps", ".wmf", ".pdf", ".fits"} & set(picture_extensions())


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    touch(*(tmp_path / name for name in ("a.png", "b.heic", "sub/c.heic", "notes.txt", "README")))
    os.mkfifo(tmp_path / "pipe.png")
    with caplog.at_level(logging.WARNING, logger="taming.data.paths"):
        assert find_images(tmp_path) == ["a.png"]
    (record,) = caplog.records
    for part in ("2 .heic", "1 .txt", "1 without an ending", "1 pipes and devices", str(tmp_path)):
        assert part in record.getMessage()
    caplog.clear()
    assert find_images(tmp_path, [".heic"]) == ["b.heic", "sub/c.heic"]  # the others are not meant
    assert not caplog.records


def test_endings_may_be_given_without_their_dot(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "b_png", tmp_path / "c_x.png")
    assert find_images(tmp_path, ["PNG"]) == ["a.png", "c_x.png"]
    assert find_images(tmp_path, ["_x.png"]) == ["c_x.png"]


def test_a_link_that_leads_back_up_ends_the_walk(tmp_path):
    touch(*(tmp_path / "root" / name for name in ("a.png", "sub/b.png", "sub/deep/c.png")))
    (tmp_path / "root/sub/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/sub/deep/self").symlink_to(".")
    (tmp_path / "root/loop.png").symlink_to("loop.png")
    assert find_images(tmp_path / "root") == ["a.png", "loop.png", "sub/b.png", "sub/deep/c.png"]


def test_no_file_is_taken_twice_or_lands_in_both_splits(tmp_path, caplog):
    root = tmp_path / "root"
    names = [f"photos/{number}.png" for number in range(20)]
    touch(*(root / name for name in names))
    (root / "all").symlink_to(root / "photos")
    (root / "a.png").symlink_to(root / "photos/7.png")
    os.link(root / "photos/9.png", root / "photos/9b.png")
    touch(tmp_path / "elsewhere/x.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c.png").symlink_to(tmp_path / "elsewhere/x.png")
    with caplog.at_level(logging.WARNING, logger="taming.data.paths"):
        assert set(find_images(root)) == {*names, "b/x.png"}
    assert "3 that link to others" in caplog.text
    splits = [
        ImageFolder(str(root), split=s, validation_fraction=0.4) for s in ("train", "validation")
    ]
    real = [os.path.realpath(path) for data in splits for path in data.labels["file_path_"]]
    assert len(real) == len(set(real)) == 21


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.png", tmp_path / "closed/b.png")
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read everything
    with pytest.raises(ValueError, match="closed cannot be read: Permission denied"):
        find_images(tmp_path)
    assert find_images(tmp_path, recursive=False) == ["a.png"]


def test_paths_are_sorted_folder_by_folder(tmp_path):
    touch(*(tmp_path / name for name in ("b/1.png", "b-a/2.png", "b.png", "a/z.png")))
    found = [str(path) for path in find_images(tmp_path)]
    assert found == [str(path) for path in sorted(map(Path, found))]


TEXTS = {
    "extensions": lambda: ImageFolder(".", extensions=".png"),
    "paths": lambda: ImagePaths("a.png"),
    "label 'x'": lambda: ImagePaths(["a.png"], labels={"x": "a"}),
    "find_files": lambda: find_files("a.png"),
    "keys": lambda: FacesHQTrain(8, keys="image"),
    "given_files": lambda: CocoImagesAndCaptionsTrain(8, given_files="000000000139.png"),
    "random_scale": lambda: SquareCrop(8, random_scale="12"),
    "scale": lambda: PhotosTrain(8, scale="12"),
    "scales": lambda: PhotosValidation(8, scales="12"),
    "class_names": lambda: LabelledImages(
        ArrayRows(np.zeros((1, 2, 2, 3), np.uint8), [0]), "cat", SquareCrop(2)
    ),
    "objects": lambda: AnnotatedObjectsCoco(
        *("data", "train"),
        **{"keys": "image", "target_image_size": 8, "min_object_area": 0, "random_flip": False},
        **{"min_objects_per_image": 1, "max_objects_per_image": 2, "crop_method": "none"},
        **{"no_tokens": 9, "use_group_parameter": False, "encode_crop": False},
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_where_a_list_is_meant_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "a.png", tmp_path / "train2017/x", tmp_path / "annotations/x")
    for part in ("instances", "stuff"):
        (tmp_path / f"annotations/{part}_train2017.json").write_text("{}")
    monkeypatch.setenv("TAMING_DATA", str(tmp_path))
    wanted = {"find_files": "paths", "objects": "keys"}.get(name, name)
    with pytest.raises(ValueError, match=f"{wanted} must be a list, got the text"):
        TEXTS[name]()


def test_home_stands_for_the_users_folder_in_every_path(tmp_path, monkeypatch, parquet):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TAMING_DATA", raising=False)
    (tmp_path / "photos").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "photos/a.png")
    (tmp_path / "list.txt").write_text("photos/a.png\n~/photos/a.png\n")
    (tmp_path / "names.txt").write_text("a.png\n")
    (tmp_path / "all.parquet").symlink_to(parquet)
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 8, 8), np.uint8))
    for data in (
        ImageFolder("~/photos"),
        CustomTrain(8, "~/list.txt"),
        ImagePaths(["~/photos/a.png"]),
        NumpyPaths(["~/a.npy"]),
        SegmentationBase("~/names.txt", "~/photos", "~/photos", n_labels=1),
        ParquetImages("~/all.parquet"),
    ):
        assert data[0]["image"].shape[2] == 3
    assert find_files(["~/photos", "~/photos/a.png"]) == [tmp_path / "photos/a.png"]
    for build in (lambda: ADE20kTrain(root="~/data"), lambda: ImageNetTrain({"root": "~/data"})):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "data")):
            build()
