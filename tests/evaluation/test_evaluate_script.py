"""The program: its files, the data it takes, and its mistakes."""

import base64
import io
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.runs import TinyRuns, call, fails

from taming.data.base import ImagePaths
from taming.data.loader import Loader
from taming.evaluation.images import of_files
from taming.run.cli import one_line_errors
from taming.util import IncompleteError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_networks: None) -> None:
    """Whatever is written by default is not left in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer(tiny_runs: TinyRuns) -> Path:
    return tiny_runs.of("demo/loopy_vqgan.yaml")


class Sources(HTMLParser):
    """Collects the pictures of a page, and tags that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[Image.Image] = []
        self.captions: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"link", "script", "iframe", "object"}
        found = dict(attrs)
        assert "href" not in found
        if tag == "img":
            head, _, code = (found["src"] or "").partition(",")
            assert head == "data:image/png;base64"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(code))))
            self.captions.append(found["alt"] or "")


def test_numbers_table_and_page(
    tokenizer: Path, tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_runs.folder / "data/images"
    out = Path("out/numbers.json")
    where = ("--data", data, "--codes", "1,2.5", "--examples", 1, "-o", out)
    call("evaluate", "-r", tokenizer, *where)
    numbers, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(numbers["rates"]) == ["own", "1", "2.5"]
    assert len(numbers["images"]) == numbers["protocol"]["images"] == 12
    assert numbers["protocol"]["resolution"] == "48x40"
    for rate in numbers["rates"].values():
        assert f"{rate['quality']['PSNR']:.4g}" in printed
    assert "not measured: LPIPS: /nowhere/heads.pth does not exist" in printed
    page = Sources()
    page.feed(text := out.with_suffix(".html").read_text())
    assert [p.size for p in page.pictures[:3]] == [(5 * 50 + 2, 44)] * 3  # original to lengths
    own = numbers["rates"]["own"]["per_image"]["PSNR"]
    order = sorted(range(12), key=own.__getitem__)
    for place, caption in ((-1, page.captions[0]), (0, page.captions[2])):
        assert numbers["images"][order[place]] in caption
        assert f"{own[order[place]]:.2f} dB" in caption
    assert numbers["protocol"]["sha256"] in text and "Not measured" in text
    with pytest.raises(ValueError, match=r"numbers.json exists already: choose another folder"):
        call("evaluate", "-r", tokenizer, *where)
    out.unlink()
    out.with_suffix(".html").unlink()
    call("evaluate", "-r", tokenizer, *where, "--no_pretrained")
    alone = json.loads(out.read_text())
    pixels = {"PSNR", "SSIM", "MS-SSIM"}
    assert {*alone["missing"], *alone["rates"]["own"]["quality"]} == pixels


def test_the_same_pictures_by_folder_list_and_parquet(tokenizer: Path, tiny_runs: TinyRuns) -> None:
    data, found = tiny_runs.folder / "data", {}
    for name in ("images", "list.txt", "images.parquet"):
        call("evaluate", "-r", tokenizer, "--data", data / name, "-s", 32, "-o", f"{name}.json")
        found[name] = json.loads(Path(f"{name}.json").read_text())
    same = [found[name]["protocol"]["sha256"] for name in ("images", "list.txt")]
    assert same[0] == same[1] != found["images.parquet"]["protocol"]["sha256"]
    assert all(numbers["protocol"]["resolution"] == "32x32" for numbers in found.values())
    rates = [found[name]["rates"]["own"]["quality"]["PSNR"] for name in ("images", "list.txt")]
    assert rates[0] == pytest.approx(rates[1], abs=1e-3)


def test_a_data_set_of_the_hub_is_streamed(
    tokenizer: Path, tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    clone, images = tmp_path / "clone", sorted((tiny_runs.folder / "data/images").rglob("*.png"))
    (clone / "data").mkdir(parents=True)
    rows = {"image": [{"bytes": image.read_bytes(), "path": None} for image in images]}
    rows["label"] = [number % 3 for number in range(len(images))]
    pq.write_table(pa.table(rows), clone / "data/validation-00000-of-00001.parquet")
    load = datasets.load_dataset
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *rest, **options: load({"owner/name": str(clone)}[name], *rest, **options),
    )
    found = []
    for data in (("owner/name", "--split", "validation"), (tiny_runs.folder / "data/images",)):
        call("evaluate", "-r", tokenizer, "--data", *data, "-s", 32)
        (output,) = Path("results/evaluations").glob("*.json")
        found.append(json.loads(output.read_text()))
        shutil.rmtree("results")
    own, folder = (numbers["protocol"] for numbers in found)
    assert own.pop("source") == "owner/name of the hub, split validation"
    assert (own.pop("unreadable"), folder.pop("unreadable")) == ("named in the log", 0)
    assert folder.pop("source").endswith("images") and own == folder
    assert found[0]["rates"]["own"]["quality"] == pytest.approx(found[1]["rates"]["own"]["quality"])
    labelled = of_files("owner/name", "image", 3, None, 4, classes=3, split="validation")
    for _ in range(2):  # the look at the classes took none of them
        labels = [int(batch["class_label"]) for batch in labelled.batches()]
        assert labels == rows["label"]


def test_the_runs_own_validation_set(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("evaluate", "-r", tokenizer, "--examples", 0)
    output = Path(f"results/evaluations/{tokenizer.name}.json")
    about = json.loads(before := output.read_text())["protocol"]
    error = fails(capsys, "evaluate", "-r", tokenizer, "--data", "photos")
    assert "exists already: choose another" in error and output.read_text() == before
    assert about["source"] == f"validation set of {tokenizer}" and about["images"] == 4
    assert about["configuration"]["params"]["size"] == 16 and about["resolution"] == "16x16"


@pytest.mark.parametrize("size", [(), ("--size", 32)])
def test_a_picture_that_cannot_be_read_is_named_and_left_out(
    size: tuple[Any, ...],
    tokenizer: Path,
    tiny_runs: TinyRuns,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = sorted((tiny_runs.folder / "data/images").rglob("*.png"))[:4]
    for name, kept in (("whole", images[:2] + images[3:]), ("few", images)):
        (tmp_path / name).mkdir()
        for number, image in enumerate(kept):
            (tmp_path / name / image.name).write_bytes(
                image.read_bytes()[: 300 if (name, number) == ("few", 2) else None]
            )
    options = ("-r", tokenizer, *size)
    call("evaluate", *options, "--data", "whole", "-o", "whole.json")
    error = fails(capfd, "evaluate", *options, "--data", "few", "-o", "few.json", status=1)
    assert error.startswith(f"1 of 4 files failed; the first: image few/{images[2].name}: ")
    broken = f"few/{images[2].name}"
    warnings = [r.getMessage() for r in caplog.records if r.getMessage().startswith("skipped: ")]
    assert len(warnings) == 1 and broken in warnings[0] and "\n" not in warnings[0]
    whole, few = (json.loads(Path(f"{n}.json").read_text()) for n in ("whole", "few"))
    assert few["protocol"]["unreadable"] == 1 and broken in few["unreadable"][0]
    assert few["protocol"]["sha256"] == whole["protocol"]["sha256"]
    assert few["rates"]["own"]["quality"] == pytest.approx(whole["rates"]["own"]["quality"])
    error = fails(capfd, "evaluate", "-r", tokenizer, "--data", "few", "--on_error", "raise")
    assert error.startswith(f"image {broken}: ") and error.count("\n") == 1
    for image in (tmp_path / "few").iterdir():
        image.write_bytes(b"nothing")
    error = fails(capfd, "evaluate", "-r", tokenizer, "--data", "few", status=1)
    assert error.startswith("none of the 4 pictures can be read") and error.count("\n") == 1


def test_a_loader_processes_error_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    Path("broken.png").write_bytes(b"nothing")
    loader = Loader(ImagePaths(["broken.png"]), 1, num_workers=1)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        next(iter(loader))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: image broken.png: cannot be decoded")
    assert error.count("\n") == 1


def test_a_model_without_data_asks_for_some(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (("evaluate",), ("evaluate", "-r", "photos"), ("encode", "-r", "photos")):
        error = fails(capsys, *program, "-o", "out.json")
        assert "photos comes without pictures: give --data FOLDER" in error
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codes", "1,two"), "--codes takes numbers such as 1,1.5,2, got '1,two'"),
        (("--codes", "9"), "codes must be mean numbers of codes in [1, 5], got 9"),
        (("--data", "nowhere"), "there is no folder, list of images or Parquet file nowhere"),
        (("--data", "no/where.txt"), "there is no folder, list of images or Parquet file no/where"),
        (("--size", "8"), "size crops the files of a folder, list or Parquet file: give data"),
        (("--generated", "4"), "only a prior generates pictures, and this is a tokenizer"),
        (("-o", "numbers.txt"), "-o names the .json file to be written, got numbers.txt"),
        (("-o", "."), "-o names the .json file to be written"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    message: str,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in fails(capsys, "evaluate", "-r", tokenizer, *arguments)
    assert not list(Path().glob("**/*.json"))


def test_names_that_are_not_utf8_are_written_with_escapes(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for name in (b"caf\xe9.png", b"b.png"):
        Image.new("RGB", (24, 20)).save(tmp_path / "data" / os.fsdecode(name))
    (tmp_path / "data" / os.fsdecode(b"bad\xe9.png")).write_bytes(b"no picture")
    where = ("--data", "data", "--no_pretrained", "-o", "out.json")
    with pytest.raises(IncompleteError, match="1 of 3 files failed"):
        call("evaluate", "-r", tokenizer, *where)
    assert r"bad\udce9.png" in capsys.readouterr().out
    assert r"caf\udce9.png" in Path("out.html").read_text()
    assert any(
        "caf\udce9.png" in name for name in json.loads(Path("out.json").read_text())["images"]
    )
