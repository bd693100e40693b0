"""Miniatures of data sets that cannot be had, written in the layout that docs/data.md describes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SYNSETS = {30: "n01", 31: "n02", 151: "n03", 300: "n04"}  # all of them of Restricted ImageNet
PER_SYNSET = 2


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_image(path: Path, height: int = 20, width: int = 30) -> None:
    """Noise whose every pixel differs from its neighbours."""
    rng = np.random.default_rng(len(path.name))
    _save(path, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_mask(path: Path, classes: list[int], height: int = 20, width: int = 30) -> None:
    """Vertical stripes of classes."""
    stripes = np.arange(width) * len(classes) // width
    _save(path, np.tile(np.array(classes, dtype=np.uint8)[stripes], (height, 1)))


def write_depth(path: Path, height: int = 20, width: int = 30) -> None:
    """Depth that grows from left to right, float32 in the bytes of RGBA."""
    depth = np.tile(np.linspace(3, 7, width, dtype="<f4"), (height, 1))
    _save(path, depth[..., None].view(np.uint8))


def write_parquet(file: Path, images: Iterable[Image.Image]) -> None:
    """Images in the columns of CIFAR-10 (``img``) and of MNIST (``image``), in ten classes."""
    rows = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    labels = [number % 10 for number in range(len(rows))]
    pq.write_table(pa.table({"img": rows, "image": rows, "label": labels}), file)


def write_imagenet(root: Path, depth: bool = True) -> None:
    """Both splits of ImageNet in four classes, with depth maps or without."""
    for split, short in (("train", "train"), ("validation", "val")):
        folder = root / f"ILSVRC2012_{split}"
        for synset in SYNSETS.values():
            for number in range(PER_SYNSET):
                write_image(folder / "data" / synset / f"{synset}_{number}.JPEG")
                if depth:
                    write_depth(root / "imagenet_depth" / short / synset / f"{synset}_{number}.png")
        names = "".join(f"{synset} thing {synset}, object\n" for synset in SYNSETS.values())
        (folder / "synset_human.txt").write_text(names)
        lines = [f"{n}: {SYNSETS.get(n, f'n9{n:03}')}\n" for n in range(400)]
        (folder / "index_synset.yaml").write_text("".join(lines))


def write_faces(root: Path, side: int = 16) -> None:
    """Two portraits of each set in each split."""
    for split in ("train", "validation"):
        celeba, ffhq = ([f"{split}{n}.{kind}" for n in (0, 1)] for kind in ("npy", "png"))
        (root / f"celebahq{split}.txt").write_text("\n".join(celeba))
        (root / f"ffhq{split}.txt").write_text("\n".join(ffhq))
        for name in celeba:
            pixels = np.random.default_rng(0).integers(0, 256, (1, 3, side, side), dtype=np.uint8)
            (root / "celebahq").mkdir(exist_ok=True)
            np.save(root / "celebahq" / name, pixels)
        for name in ffhq:
            write_image(root / "ffhq" / name, side, side)


def write_coco(root: Path, number: int = 3) -> None:
    """Images with two captions each, and maps of stuff (colours) and of stuff and things."""
    coco = root / "coco"
    for split in ("train2017", "val2017"):
        names = [f"{n:012}" for n in range(number)]
        for name in names:
            write_image(coco / split / f"{name}.jpg")
            write_image(coco / "annotations" / f"stuff_{split}_pixelmaps" / f"{name}.png")
            write_mask(root / "cocostuffthings" / split / f"{name}.png", [255, 0, 181])
        images = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate(names)]
        captions = [
            {"image_id": n, "caption": f"{word} {n}"} for n in range(number) for word in ("a", "b")
        ]
        content = {"images": images, "annotations": captions}
        (coco / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


def write_ade20k(root: Path) -> None:
    """One training and one validation scene."""
    folder = root / "ade20k_root"
    scenes = []
    for split, listed in (("training", "train"), ("validation", "test")):
        name = f"ADE_{split[:5]}_00000001"
        write_image(folder / "images" / split / f"{name}.jpg")
        write_mask(folder / "annotations" / split / f"{name}.png", [0, 7, 150])
        (root / f"ade20k_{listed}.txt").write_text(f"{split}/{name}.jpg\n")
        scenes.append(f"{name} airport_terminal\n")
    (folder / "sceneCategories.txt").write_text("".join(scenes))


def write_coco_objects(root: Path) -> None:
    """Two images of 30x20 pixels: in the first a crowd, a thing and some stuff, else one thing."""

    def box(number: int, image: int, category: int, bbox: list[int], crowd: int = 0) -> dict:
        ids = {"id": number, "image_id": image, "category_id": category}
        return {**ids, "bbox": bbox, "iscrowd": crowd}

    images = [{"id": n, "file_name": f"{n}.jpg", "height": 20, "width": 30} for n in (1, 2)]
    for split in ("train2017", "val2017"):
        for image in images:
            write_image(root / split / image["file_name"])
        things = {
            "images": images,
            "categories": [
                {"id": 2, "name": "cat", "supercategory": "animal"},
                {"id": 10, "name": "dog", "supercategory": "animal"},
            ],
            "annotations": [
                box(1, 1, 2, [0, 0, 15, 10], crowd=1),
                box(2, 1, 10, [15, 10, 15, 10]),
                box(3, 2, 10, [0, 0, 30, 20]),
            ],
        }
        stuff = {
            "images": images,
            "categories": [
                {"id": 100, "name": "sky", "supercategory": "outdoor"},
                {"id": 183, "name": "other", "supercategory": "other"},
            ],
            "annotations": [box(4, 1, 100, [0, 0, 30, 5]), box(5, 1, 183, [0, 0, 30, 20])],
        }
        (root / "annotations").mkdir(exist_ok=True)
        for kind, content in (("instances", things), ("stuff", stuff)):
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
