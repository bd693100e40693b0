"""The original's scripts: its flags and output folders, on runs as it left them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from support.data import PER_SYNSET, SYNSETS, write_imagenet
from support.models import GAN
from support.original import save_checkpoint, save_run, with_masks
from support.runs import TinyRuns, call, fails, read_pixels

from taming.data.utils import custom_collate
from taming.util import instantiate_from_config

CLASSES = 5
SIZE = 32  # pixels of an image, of 2 x 2 sites
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": SIZE,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [2],
    "dropout": 0.0,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a script writes by default is not left in the repository."""
    monkeypatch.chdir(tmp_path)


def tokenizer(loss: dict[str, Any]) -> dict[str, Any]:
    params = {"ddconfig": DDCONFIG, "lossconfig": loss, "n_embed": 16, "embed_dim": 8}
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def class_conditional(unconditional: bool = False) -> dict[str, Any]:
    """The published class-conditional transformer's configuration, scaled down."""
    first_stage = tokenizer({"target": "taming.modules.losses.DummyLoss"})
    first_stage["params"]["ckpt_path"] = "logs/2020-long-gone/checkpoints/last.ckpt"
    gpt = {"vocab_size": 16, "block_size": 6, "n_layer": 2, "n_head": 2, "n_embd": 8}
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": CLASSES}}
    params = {
        "cond_stage_key": "class_label",
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": first_stage,
        "cond_stage_config": "__is_unconditional__" if unconditional else labels,
    }
    return {
        "base_learning_rate": 4.5e-6,
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": params,
    }


def random_weights(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a model as the original would have saved them."""
    params = dict(model["params"])
    if "first_stage_config" in params:
        params["first_stage_config"] = tokenizer(
            params["first_stage_config"]["params"]["lossconfig"]
        )
    weights = instantiate_from_config({**model, "params": params}).state_dict()
    return with_masks(weights, block_size=6)


def of_the_original(shared: Path, name: str) -> dict[str, list[int]]:
    """Keys and shapes of a published checkpoint, as far as a transformer of two layers has them."""
    table = json.loads((shared / "upstream/state_dict_keys.json").read_text())[name]
    layer = re.compile(r"transformer\.blocks\.(\d+)\.")
    found = {key: layer.match(key) for key in table}
    return {key: table[key][0] for key, match in found.items() if not match or int(match[1]) < 2}


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A run of a class-conditional prior, as the original left it."""
    model = class_conditional()
    return save_run(tmp_path / "logs/old", {"model": model}, random_weights(model))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures are the same; another size of the batch may round otherwise."""
    return bool((np.abs(one.astype(int) - other) <= 1).all())


def test_a_published_class_conditional_prior_samples(classes: Path, shared: Path) -> None:
    checkpoint = classes / "checkpoints/last.ckpt"
    weights = random_weights(class_conditional())
    assert set(weights) == set(of_the_original(shared, "cin_transformer (published checkpoint)"))
    call("sample_fast", "-r", checkpoint, "-n", 3, "--batch_size", 2, "--classes", "4,0", "-k", 9)
    out = classes / "samples/top_k_9_temp_1.00_top_p_1.0/1234"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == [
        f"{label}/00000{number}.png" for label in (0, 4) for number in range(3)
    ]
    assert all(read_pixels(path).shape == (SIZE, SIZE, 3) for path in out.rglob("*.png"))


def test_an_image_depends_on_seed_class_and_number_alone(classes: Path) -> None:
    """On neither the batch nor how many images there are, of which classes."""
    images = {}
    for batch, amount, labels in ((2, 3, "4,0"), (3, 4, "0")):
        out = Path(f"out{batch}")
        options = ("-n", amount, "--batch_size", batch, "--classes", labels, "-o", out)
        call("sample_fast", "-r", classes, *options)
        images[batch] = {(p.parent.name, p.name): read_pixels(p) for p in out.rglob("*.png")}
    first, second, third = (("0", f"00000{number}.png") for number in range(3))
    assert images[2].keys() & images[3].keys() == {first, second, third}
    for name in (first, second, third):
        assert same(images[2][name], images[3][name])
    assert not same(images[2][first], images[2][second])
    assert not same(images[2][first], images[2]["4", first[1]])


def test_a_published_tokenizer_reconstructs(tmp_path: Path, shared: Path) -> None:
    """Its configuration has another name, and its file holds the loss's networks as well."""
    shapes = of_the_original(shared, "imagenet_vqgan.yaml")
    model = tokenizer({"target": "taming.modules.losses.DummyLoss"})
    weights = instantiate_from_config(model).state_dict()
    weights |= {k: torch.zeros(shape) for k, shape in shapes.items() if k.startswith("loss.")}
    assert set(weights) == set(shapes)
    model["params"]["lossconfig"] = {**GAN, "params": {"disc_start": 250001}}
    run = save_run(tmp_path / "logs/vqgan", {"model": model}, weights)
    next((run / "configs").iterdir()).rename(run / "configs/model.yaml")
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save("photo.png")
    call("reconstruct", "-r", run, "photo.png", "-o", "out")
    assert read_pixels(tmp_path / "out/photo.png").shape == (50, 70, 3)


def test_an_unconditional_prior_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = class_conditional(unconditional=True)
    run = save_run(tmp_path / "old", {"model": model}, random_weights(model))
    options = ("-n", 2, "--top_k", 250, "--top_p", 0.9, "-t", 0.5, "-o", tmp_path / "out")
    call("sample_fast", "-r", run, *options)
    out = tmp_path / "out/samples/top_k_250_temp_0.50_top_p_0.9/1234"
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png"]
    error = fails(capsys, "sample_fast", "-r", run, "--classes", "1,2")
    assert "--classes 1,2: this prior is unconditional" in error


def test_a_checkpoint_alone_needs_a_configuration(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = next((classes / "configs").iterdir()).rename(tmp_path / "config.yaml")
    alone = tmp_path / "downloads/old.ckpt"
    (tmp_path / "downloads").mkdir()
    (classes / "checkpoints/last.ckpt").rename(alone)
    options = ("-n", 1, "--classes", "1", "-o", tmp_path / "out")
    call("sample_fast", "-r", alone, "-b", config, *options)
    call("sample_fast", "-r", alone, "-c", config, *options)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
    assert "is not a run" in fails(capsys, "sample_fast", "-r", alone, *options)


def test_overrides_and_their_mistakes(classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-r", classes, "-n", 1, "--classes", "1")
    error = fails(capsys, "sample_fast", *options, "model.params.pkep=0.5")
    assert "command line: unknown key model.params.pkep" in error and "pkeep" in error
    error = fails(
        capsys, "sample_fast", *options, "model.params.first_stage_config.params.embed_dim=4"
    )
    assert "does not fit Net2NetTransformer" in error
    error = fails(capsys, "sample_fast", "-r", classes, "-n", 1)
    assert f"there is no class 999: the labels of this prior are 0 to {CLASSES - 1}" in error


@pytest.mark.parametrize(
    "lost", ["transformer.head.weight", "first_stage_model.decoder.conv_out.bias"]
)
def test_missing_weights_are_named(
    lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = class_conditional()
    weights = {key: value for key, value in random_weights(model).items() if key != lost}
    run = save_run(tmp_path / "old", {"model": model}, weights)
    error = fails(capsys, "sample_fast", "-r", run, "--classes", "1")
    assert f"lacks weights of Net2NetTransformer: {lost};" in error


def draw_examples(run: Path, shared: Path, out: str, **sizes: int) -> Path:
    """Draw images for two of the D-RIN examples; gives the folder of what was written.

    ``sizes`` are those of the pictures in each split.
    """
    target, root = "taming.data.imagenet.DRINExamples", shared / "data/taming"
    splits = ", ".join(
        f"{split}: {{target: {target}, params: {{size: {size}, root: {root}}}}}"
        for split, size in sizes.items()
    )
    data = f"data={{target: main.DataModuleFromConfig, params: {{batch_size: 1, {splits}}}}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taming.data.imagenet.DRINExamples.__len__", lambda self: 2)
        call("make_samples", "-r", run, "--outdir", out, "--ignore_base_data", data, "--top_k", 7)
    return Path(out) / "000002_7_1.0"


@pytest.mark.reported(25)
@pytest.mark.parametrize("size", [32, 80])
def test_samples_for_a_data_set(size: int, tiny_runs: TinyRuns, shared: Path) -> None:
    """At 80 pixels, the 2 x 2 sites of the prior slide over 5 x 5."""
    out = draw_examples(tiny_runs.of("drin_transformer.yaml"), shared, "out", train=size)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    kinds = ("originals", "reconstructions", "samples")
    assert names == {f"{kind}/00000{number}.png" for kind in kinds for number in range(2)}
    assert {read_pixels(out / name).shape for name in names} == {(size, size, 3)}


def test_samples_are_for_the_first_split_by_alphabet(tiny_runs: TinyRuns, shared: Path) -> None:
    run = tiny_runs.of("drin_transformer.yaml")
    out = draw_examples(run, shared, "out", train=48, test=32)
    assert read_pixels(out / "samples/000000.png").shape == (32, 32, 3)


def test_samples_for_a_data_set_do_not_depend_on_what_else_is_random(
    tiny_runs: TinyRuns, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collate(items: Sequence[Any], *name: str) -> Any:
        torch.rand(len(items))
        return custom_collate(items, *name)

    run = tiny_runs.of("drin_transformer.yaml")
    one = draw_examples(run, shared, "one", train=SIZE)
    monkeypatch.setattr("taming.data.utils.custom_collate", collate)
    other = draw_examples(run, shared, "other", train=SIZE)
    for number in range(2):
        name = f"samples/00000{number}.png"
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("resolution", "conditional", "shape"),
    [("32,32", "objects_bbox", (32, 32)), ("48,64", "objects_bbox", (48, 64))],
)
def test_samples_of_scenes(
    resolution: str,
    conditional: str,
    shape: tuple[int, int],
    tiny_runs: TinyRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_runs.of("coco_scene_images_transformer.yaml")
    monkeypatch.setattr(
        "taming.data.annotated_objects_dataset.AnnotatedObjectsDataset.__len__", lambda self: 3
    )
    call(
        "make_scene_samples",
        "-r",
        run,
        "--outdir",
        "out",
        "-R",
        resolution,
        "-C",
        conditional,
        "-N",
        2,
    )
    out = tmp_path / "out/000002_100_1.0"
    assert sorted(path.name for path in out.iterdir()) == [
        "0000_00.png",
        "0000_01.png",
        "0001_00.png",
    ]
    height, width = shape
    for path in out.iterdir():
        assert read_pixels(path).shape == (height + 4, 3 * (width + 2) + 2, 3)


def test_a_scene_depends_on_seed_layout_and_number_alone(
    tiny_runs: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On neither the samples drawn before nor how many there are of a layout."""
    run = tiny_runs.of("coco_scene_images_transformer.yaml")
    monkeypatch.setattr(
        "taming.data.annotated_objects_dataset.AnnotatedObjectsDataset.__len__", lambda self: 2
    )
    rows = {}
    for amount in (1, 2):
        call("make_scene_samples", "-r", run, "--outdir", str(amount), "-R", "32,32", "-N", amount)
        files = sorted(Path(str(amount)).rglob("*.png"))
        rows[amount] = [read_pixels(path)[2:-2, 2 : 2 + SIZE] for path in files]
    assert len(rows[1]) == 2
    assert all(same(one, other) for one, other in zip(rows[1], rows[2], strict=True))
    assert not same(rows[1][0], rows[1][1])


def test_mistakes_about_samples_for_a_data_set(
    tiny_runs: TinyRuns,
    classes: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TAMING_DATA", str(tiny_runs.data))
    run = tiny_runs.of("drin_transformer.yaml")
    where = ("--outdir", "out")
    error = fails(capsys, "make_samples", "-r", run, *where, "--split", "test")
    assert "--split test: the data has only train, validation" in error
    error = fails(capsys, "make_samples", "-r", run, *where, "--ignore_base_data")
    assert "there is no 'data' block" in error
    assert "there is no 'data' block" in fails(capsys, "make_samples", "-r", classes, *where)
    error = fails(capsys, "make_samples", "-r", tiny_runs.of("imagenet_vqgan.yaml"), *where)
    assert "holds a VQModel, not a transformer prior" in error


def test_mistakes_about_samples_of_scenes(
    tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DATA", str(tiny_runs.data))
    scenes = ("-r", tiny_runs.of("coco_scene_images_transformer.yaml"), "--outdir", "out")
    error = fails(capsys, "make_scene_samples", *scenes, "-C", "boxes")
    assert "--conditional boxes: the data has" in error and "objects_bbox" in error
    assert "height,width" in fails(capsys, "make_scene_samples", *scenes, "-R", "256")
    others = ("-r", tiny_runs.of("drin_transformer.yaml"), "--outdir", "out")
    error = fails(capsys, "make_scene_samples", *others)
    assert "data.params.validation, which is not a set of annotated objects" in error


@pytest.mark.parametrize("part", ["first_stage_model", "transformer", None])
def test_a_part_of_a_model(
    part: str | None, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = random_weights(class_conditional())
    checkpoint = classes / "checkpoints/last.ckpt"
    if part is None:  # a Labelator has no weights
        error = fails(capsys, "extract_submodel", checkpoint, "part.ckpt")
        assert "'cond_stage_model'" in error and "first_stage_model, transformer" in error
        return
    call("extract_submodel", checkpoint, "part.ckpt", part)
    found = torch.load("part.ckpt", weights_only=True)["state_dict"]
    assert set(found) == {k.removeprefix(f"{part}.") for k in whole if k.startswith(f"{part}.")}
    if part == "first_stage_model":
        model = tokenizer({"target": "taming.modules.losses.DummyLoss"})
        model["params"]["ckpt_path"] = "part.ckpt"
        instantiate_from_config(model)


HUB = """
import torch

dependencies = ["torch"]


class Network(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = torch.nn.Conv2d(3, channels, 1)


class Depth(Network):
    def forward(self, x):
        return self.body(x)[:, 0, ::2, ::2]


class Segmenter(Network):
    def forward(self, x):
        return self.body(x)[:, :, ::2, ::2]


class Transforms:
    @staticmethod
    def default_transform(image):
        return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


def MiDaS():
    return Depth(1)


def transforms():
    return Transforms


def deeplabv2_resnet101(n_classes):
    return Segmenter(n_classes)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A torch hub repository with the smallest networks of the right form."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUB)
    return folder


def save_turned(image: Image.Image, path: Path) -> None:
    """Save an image with a note to turn it, which maps that belong to it do not follow."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # by 90 degrees, clockwise
    image.save(path, exif=exif)


def test_depth_maps_are_what_the_data_set_reads(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taming.data.imagenet import ImageNetValidationWithDepth

    monkeypatch.setenv("TAMING_DATA", str(tmp_path / "data"))
    write_imagenet(tmp_path / "data", depth=False)
    synset = min(SYNSETS.values())
    turned = tmp_path / f"data/ILSVRC2012_validation/data/{synset}/{synset}_0.JPEG"
    save_turned(Image.effect_noise((24, 32), 50).convert("RGB"), turned)
    call("extract_depth", "--hub", hub, "--splits", "val")
    out = tmp_path / "data/imagenet_depth"
    made = {
        path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.png")
    }
    names = {f"{s}/{s}_{i}.png" for s in SYNSETS.values() for i in range(PER_SYNSET)}
    assert set(made) == {f"val/{name}" for name in names}
    examples = [ImageNetValidationWithDepth()[i] for i in range(len(made))]
    for example in examples:
        assert example["depth"].shape == example["image"].shape[:2]
        assert (example["depth"].min(), example["depth"].max()) == (-1, 1)
    assert sum(example["image"].shape == (32, 24, 3) for example in examples) == 1  # not turned
    call("extract_depth", "--hub", hub)
    again = {
        path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.png")
    }
    assert len(again) == 2 * len(made) and made.items() <= again.items()


def test_segmentations(hub: Path, shared: Path, tmp_path: Path, capsys: Any) -> None:
    root = shared / "data/taming"
    network = torch.nn.Conv2d(3, 182, 1)
    torch.save({f"body.{k}": v for k, v in network.state_dict().items()}, "weights.pth")
    options = ("--hub", hub, "--weights", "weights.pth")
    folder = tmp_path / "images/a"
    folder.mkdir(parents=True)
    Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(
        folder / "x.png"
    )
    with Image.open(folder / "x.png") as image:
        save_turned(image, folder / "turned.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    error = fails(capsys, "extract_segmentation", "out", "--images", "images", *options, status=1)
    assert "1 of 3 files failed" in error and "broken.jpg" in error
    made = sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*.png"))
    assert made == ["a/turned.png", "a/x.png"]
    classes = read_pixels(Path("out/a/x.png"))
    assert (classes == read_pixels(Path("out/a/turned.png"))).all()
    assert classes.shape == (30, 40) and classes.max() < 182
    image = torch.tensor(read_pixels(folder / "x.png")).permute(2, 0, 1)
    mean = torch.tensor([104.008, 116.669, 122.675])[:, None, None]
    with torch.no_grad():
        expected = network((image.flip(0) - mean)[None])[0].argmax(0)
    assert (classes[::29, ::39] == expected[::28, ::38].numpy()).all()  # corners stay in place
    with pytest.MonkeyPatch.context() as patch:
        lists = tmp_path / "lists"
        lists.mkdir()
        (lists / "sflckr_images").symlink_to(root / "sflckr_images")
        first = (root / "sflckr_examples.txt").read_text().splitlines()[0]
        (lists / "sflckr_examples.txt").write_text(first)
        patch.setenv("TAMING_DATA", str(lists))
        call("extract_segmentation", "out", "sflckr", *options)
    assert (tmp_path / "out" / first).with_suffix(".png").is_file()


def test_networks_that_are_not_there_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TAMING_DATA", str(tmp_path))
    monkeypatch.setattr("torch.hub.load", refuse)
    write_imagenet(tmp_path, depth=False)
    error = fails(capsys, "extract_depth")
    assert (
        "MiDaS of intel-isl/MiDaS is neither a local folder nor available from torch hub" in error
    )
    assert "--hub" in error
    (tmp_path / "images").mkdir()
    error = fails(capsys, "extract_segmentation", "out", "--images", "images")
    assert "in or below images" in error
    Image.new("RGB", (8, 8)).save("images/a.png")
    error = fails(capsys, "extract_segmentation", "out", "--images", "images")
    assert "downloads/deeplabv2" in error and "github.com/kazuto1011" in error
    error = fails(capsys, "extract_depth", "--hub", "images")
    assert "images has no hubconf.py" in error


def test_a_file_of_another_step_is_told_by_its_folder(classes: Path) -> None:
    weights = random_weights(class_conditional())
    save_checkpoint(classes / "checkpoints/epoch=1.ckpt", weights, step=7)
    call("sample_fast", "-r", classes / "checkpoints/epoch=1.ckpt", "-n", 1, "--classes", "1")
    assert (classes / "samples/top_k_250_temp_1.00_top_p_1.0/7/1/000000.png").is_file()
