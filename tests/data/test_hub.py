"""Parquet files and CIFAR-10: items, names, laziness, and errors without a network."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from taming.data.hub import CIFAR10, CIFAR10_CLASSES, ParquetImages
from taming.evaluation.images import of_files
from taming.util import DataError


def png(grey):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (grey,) * 3).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{grey}.png"}


@pytest.fixture
def parquet(tmp_path):
    """Four rows in two row groups, with the class names that Hugging Face writes."""
    labels = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": labels}}})}
    table = pa.table({"img": [png(grey) for grey in (0, 10, 20, 30)], "label": [2, 0, 1, 2]})
    pq.write_table(
        table.replace_schema_metadata(metadata), tmp_path / "a.parquet", row_group_size=3
    )
    return str(tmp_path / "a.parquet")


def grey_of(item):
    return round((item["image"][0, 0, 0] + 1) * 127.5)


def test_rows_become_items(parquet):
    items = ParquetImages(parquet)
    assert [grey_of(item) for item in items] == [0, 10, 20, 30]
    assert [item["class_label"] for item in items] == [2, 0, 1, 2]
    assert [item["human_label"] for item in items] == ["owl", "cat", "dog", "owl"]
    assert items[0]["image"].shape == (5, 6, 3)
    assert items[-1]["class_label"].dtype == np.int64
    assert ParquetImages(parquet, size=4)[0]["image"].shape == (4, 4, 3)


def test_labels_are_optional_and_so_are_their_names(parquet):
    assert list(ParquetImages(parquet, label_column=None)[0]) == ["image"]
    table = pq.read_table(parquet).replace_schema_metadata(None)
    pq.write_table(table, parquet)
    assert ParquetImages(parquet)[0]["human_label"] == "2"


def test_loader_processes_get_a_path_and_not_the_images(parquet):
    items = ParquetImages(parquet)
    assert len(items) == 4
    image = items.rows.table["img"][0]["bytes"].as_py()
    assert image not in pickle.dumps(items)
    assert grey_of(pickle.loads(pickle.dumps(items))[1]) == 10
    batches = [list(DataLoader(items, 2, num_workers=workers)) for workers in (0, 2)]
    for here, there in zip(*batches, strict=True):
        torch.testing.assert_close(here["image"], there["image"])
        assert here["class_label"].dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rows_have_the_channels_that_are_asked_for(parquet, channels):
    assert ParquetImages(parquet, channels=channels)[1]["image"].shape[2] == channels


def test_a_damaged_row_is_named(tmp_path):
    table = pa.table({"img": [png(0), {"bytes": b"junk", "path": ""}], "label": [0, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 1: cannot be decoded"):
        ParquetImages(str(tmp_path / "a.parquet"))[1]


def test_files_that_do_not_fit_are_refused(tmp_path, parquet):
    with pytest.raises(FileNotFoundError, match="gone.parquet does not exist"):
        ParquetImages(str(tmp_path / "gone.parquet"))
    with pytest.raises(ValueError, match=r"column 'image', .*img, label"):
        ParquetImages(parquet, image_column="image")
    with pytest.raises(ValueError, match="column 'label' .*structs"):
        ParquetImages(parquet, image_column="label")
    Path(parquet).write_text("no parquet")
    with pytest.raises(ValueError, match="a.parquet .*Parquet"):
        ParquetImages(parquet)


def test_cifar10_from_a_parquet_file(parquet):
    item = CIFAR10("test", path=parquet)[0]
    assert item["image"].shape == (32, 32, 3)
    assert item["human_label"] == CIFAR10_CLASSES[2] == "bird"


@pytest.mark.parametrize(("split", "length"), [("train", 50_000), ("test", 10_000)])
def test_cifar10_from_the_recorded_files(shared, split, length):
    items = CIFAR10(split, path=str(shared / "data" / "cifar10" / f"{split}.parquet"))
    names = items.rows.class_names()
    assert len(items) == length
    assert tuple(names) in ((), CIFAR10_CLASSES)
    assert items[length - 1]["image"].shape == (32, 32, 3)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The layout of the original archive with three training and two test images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    parts = {"data_batch_1": slice(0, 3), "test_batch": slice(3, 5)}
    for name, part in parts.items():
        batch = {"data": images[part].reshape(-1, 3072), "labels": [0, 1, 9][: len(images[part])]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(source, "test_list", [["test_batch", None]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})
    return str(tmp_path), images


def test_cifar10_from_the_original_archive(archive):
    root, images = archive
    items = [*CIFAR10("train", root=root), *CIFAR10("test", root=root, download=False)]
    assert [item["human_label"] for item in items] == [
        "airplane",
        "automobile",
        "truck",
        "airplane",
        "automobile",
    ]
    for item, image in zip(items, images, strict=True):
        np.testing.assert_allclose((item["image"] + 1) * 127.5, image.transpose(1, 2, 0), atol=1e-4)


def test_without_a_network_the_error_names_the_remedy(tmp_path, monkeypatch):
    unreachable = (tmp_path / "offline" / "cifar.tar.gz").as_uri()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", unreachable)
    with pytest.raises(ConnectionError, match="cifar-10-python.tar.gz from file:.* path"):
        CIFAR10("train", root=str(tmp_path / "root"))


def test_without_download_the_archive_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="CIFAR10 .*download: true"):
        CIFAR10("train", root=str(tmp_path), download=False)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="got 'validation'"):
        CIFAR10("validation")


def test_the_environment_sets_the_folder_of_downloads(monkeypatch):
    monkeypatch.setenv("TAMING_DATA", "/somewhere")
    with pytest.raises(FileNotFoundError, match="CIFAR10 .*/somewhere;"):
        CIFAR10(download=False)
    monkeypatch.delenv("TAMING_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    with pytest.raises(FileNotFoundError, match="CIFAR10 .*/cache/taming/data;"):
        CIFAR10(download=False)


@pytest.mark.parametrize(("label", "what"), [(-1, "has the label -1"), (3, "has the label 3")])
def test_a_label_that_is_no_class_is_named(parquet, label, what):
    table = pq.read_table(parquet).set_column(1, "label", pa.array([0, label, 1, 2]))
    pq.write_table(table, parquet)
    with pytest.raises(DataError, match=f"row 1 {what}, which is no class"):
        ParquetImages(parquet)[1]


def test_a_missing_label_is_named(parquet):
    table = pq.read_table(parquet).set_column(1, "label", pa.array([0, None, 1, 2]))
    pq.write_table(table, parquet)
    with pytest.raises(DataError, match="row 1: it has no label: .*label_column to null"):
        ParquetImages(parquet)[1]
    assert list(ParquetImages(parquet, label_column=None)[1]) == ["image"]
    assert len([*of_files(parquet, "image", 3, None, 2).batches()]) == 4  # needs no classes
