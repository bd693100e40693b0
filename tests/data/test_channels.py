"""Pictures of any number of channels are data sets, train from a folder, and come back."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support.models import vqmodel_config
from support.runs import TRAINER, read_pixels, run_main

import taming
from taming.data.base import ImagePaths, NumpyPaths
from taming.data.custom import CustomTest, CustomTrain, ImageFolder
from taming.tokenizer import Tokenizer


def write_pictures(folder: Path, channels: int, number: int = 8) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(channels)
    paths = []
    for i in range(number):
        pixels = rng.integers(0, 256, (20, 24, channels), dtype=np.uint8)
        paths.append(folder / f"{i}.{'png' if channels < 5 else 'tif'}")
        if channels < 5:
            Image.fromarray(pixels.squeeze()).save(paths[-1])
        else:
            tifffile.imwrite(paths[-1], pixels, photometric="minisblack", planarconfig="contig")
    return paths


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_items_have_the_channels_that_are_asked_for(tmp_path, channels):
    paths = write_pictures(tmp_path / "photos", channels)
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    sets = [
        ImageFolder(str(tmp_path / "photos"), 16, channels=channels),
        CustomTrain(16, str(tmp_path / "list.txt"), channels=channels, antialias=True),
        CustomTest(16, str(tmp_path / "list.txt"), channels=channels, antialias=True),
        ImagePaths(paths, 16, channels=channels, antialias=True),
    ]
    np.save(tmp_path / "0.npy", np.zeros((1, channels, 20, 24), np.uint8))
    arrays = NumpyPaths([tmp_path / "0.npy"], 16, channels=channels)
    for data in (*sets, arrays):
        image = data[0]["image"]
        assert image.shape == (16, 16, channels) and image.dtype == np.float32
        assert -1 <= image.min() <= image.max() <= 1
    assert all(np.array_equal(data[0]["image"], sets[0][0]["image"]) for data in sets)


def test_files_of_any_kind_serve_for_grey_and_colours(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        Image.new(mode, (8, 8), 1 if mode == "I;16" else "black").save(tmp_path / f"{mode[:4]}.png")
    for channels in (1, 2, 3, 4):
        data = ImageFolder(str(tmp_path), channels=channels)
        images = np.stack([item["image"] for item in data])
        colours = channels - (channels in (2, 4))
        assert images.shape == (7, 8, 8, channels)
        assert (images[..., :colours] == -1).all() and (images[..., colours:] == 1).all()


@pytest.mark.parametrize("channels", [0, -1])
def test_channels_are_counted_from_one(channels):
    with pytest.raises(ValueError, match=f"channels must be at least 1, got {channels}"):
        ImagePaths([], channels=channels)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_pictures_of_any_channels_train_from_a_folder_and_come_back(tmp_path, channels):
    path = write_pictures(tmp_path / "photos", channels)[0]
    model = {**vqmodel_config(channels), "base_learning_rate": 1e-4}
    images = {"root": "photos", "size": 16, "channels": channels, "validation_fraction": 0.4}
    target = "taming.data.custom.ImageFolder"
    splits = {
        split: {"target": target, "params": {**images, "split": split}}
        for split in ("train", "validation")
    }
    data = {"target": "main.DataModuleFromConfig", "params": splits}
    (tmp_path / "tiny.yaml").write_text(json.dumps({"model": model, "data": data}))
    run_main(tmp_path, "-b", "tiny.yaml", "-t", "-n", "x", "--max_steps", "2", *TRAINER)
    (run,) = (tmp_path / "logs").iterdir()
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    pictures = list((run / "images").rglob("*.png"))
    assert pictures and all(read_pixels(picture).shape[2] == 3 for picture in pictures)
    tokenizer = taming.load(run)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.channels == channels
    decoded = tokenizer.decode(tokenizer.encode(str(path)))
    assert decoded.size == (24, 20) and decoded.mode == {2: "LA", 4: "RGBA"}.get(channels, "RGB")
