"""scripts/compress.py and scripts/decompress.py, for a tokenizer of two steps of training."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.models import vqmodel_config
from support.runs import TinyRuns, call, fails, read_pixels

import taming
from scripts.compress import compress, quality_measure
from taming.codec.container import decode_file
from taming.demo.study import Study
from taming.pictures import psnr_of
from taming.util import instantiate_from_config


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a script writes by default is not left in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tiny_runs: TinyRuns) -> Path:
    return tiny_runs.of("demo/loopy_vqgan.yaml")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of pictures, two of one name, one damaged, one that is large enough for MS-SSIM."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (176, 180, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[:21, :30]).save(folder / "more/a.png")
    Image.fromarray(pixels[:16, :9]).save(folder / "c.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:500])
    return folder


def test_pictures_become_files_and_pictures_again(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, decoded = tmp_path / "files", tmp_path / "decoded"
    error = fails(capsys, "compress", photos, "-r", run, "-o", files, "--bpp", 3, status=1)
    assert "1 of 4 files failed" in error and "b.png" in error
    report = json.loads((files / "compressed.json").read_text())
    assert {Path(name).relative_to(photos).as_posix() for name in report} == {
        *("a.png", "c.png", "more/a.png")
    }
    assert {path.name for path in files.iterdir()} == {
        *("a.loop", "c.loop", "a_2.loop", "compressed.json")
    }
    (files / "broken.loop").write_bytes((files / "a.loop").read_bytes()[:-1])
    error = fails(capsys, "decompress", files, "-r", run, "-o", decoded, status=1)
    assert "1 of 4 files failed" in error and "broken.loop: the file is damaged" in error
    tokenizer = taming.load(run)
    back = json.loads((decoded / "decompressed.json").read_text())
    for name, numbers in report.items():
        data = (files / numbers["file"]).read_bytes()
        width, height = numbers["size"]
        assert numbers["bytes"] == len(data) and numbers["bpp"] == 8 * len(data) / (width * height)
        assert numbers["bpp"] <= 3 and numbers["seconds"] > 0
        pixels = np.asarray(tokenizer.decompress(data))
        assert (read_pixels((decoded / numbers["file"]).with_suffix(".png")) == pixels).all()
        error = (pixels.astype(float) - read_pixels(Path(name))) ** 2
        assert numbers["psnr"] == pytest.approx(10 * np.log10(255**2 / error.mean()), abs=1e-3)
        assert (numbers["ms_ssim"] is None) == (height < 176)
        theirs = back[str(files / numbers["file"])]
        assert theirs["bytes"] == len(data) and theirs["size"] == [width, height]


def test_without_torchmetrics_only_ms_ssim_is_missing(
    run: Path,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "taming.evaluation.measures", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    call("compress", photos / "a.png", "-r", run, "-o", tmp_path)
    (numbers,) = json.loads((tmp_path / "compressed.json").read_text()).values()
    assert numbers["ms_ssim"] is None and numbers["psnr"] > 0
    assert "MS-SSIM is not measured: torchmetrics is not installed: pip" in caplog.text


def test_previews_and_the_whole_turns_of_damaged_files(
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    call("compress", photos / "c.png", "-r", run, "-o", tmp_path, "--no_quality")
    (numbers,) = json.loads((tmp_path / "compressed.json").read_text()).values()
    assert "psnr" not in numbers
    call("decompress", tmp_path / "c.loop", "-r", run, "-o", tmp_path / "one", "--turns", 1)
    data = (tmp_path / "c.loop").read_bytes()
    tokenizer = taming.load(run)
    assert (read_pixels(tmp_path / "one/c.png") == tokenizer.decompress(data, turns=1)).all()
    (tmp_path / "c.loop").write_bytes(data[:-1])
    fails(capsys, "decompress", tmp_path / "c.loop", "-r", run, "-o", tmp_path / "cut", status=1)
    options = ("-r", run, "-o", tmp_path / "cut", "--partial")
    call("decompress", tmp_path / "c.loop", *options)
    expected = tokenizer.decompress(data[:-1], partial=True)
    assert (read_pixels(tmp_path / "cut/c.png") == expected).all()
    (numbers,) = json.loads((tmp_path / "cut/decompressed.json").read_text()).values()
    turns, of_turns = numbers["turns"], numbers["of_turns"]
    assert turns == of_turns - 1 == len(decode_file(data)[1]) - 1
    assert caplog.text.count("damaged or cut off") == 2  # one was refused
    assert f"c.png shows {turns} of {of_turns} turns: the rest of its file is" in caplog.text
    (numbers,) = json.loads((tmp_path / "one/decompressed.json").read_text()).values()
    assert (numbers["turns"], numbers["of_turns"]) == (1, of_turns)


def test_more_turns_than_there_are_show_all(
    run: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call("compress", photos / "c.png", "-r", run, "-o", "files", "--no_quality")
    call("decompress", "files", "-r", run, "-o", "all")
    assert "--turns" not in caplog.text
    call("decompress", "files", "-r", run, "-o", "more", "--turns", 99)
    assert Path("all/c.png").read_bytes() == Path("more/c.png").read_bytes()
    most = taming.load(run).model.quantize.sequence.max_loops
    assert f"--turns 99 shows all: a file has at most {most} turns" in caplog.text


def test_a_quality_that_is_out_of_reach_is_said(
    run: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = photos / "c.png", photos / "more/a.png"
    for program, report in (("compress", "compressed"), ("reconstruct", "reconstructions")):
        for target, reached in ((1, True), (90, False)):
            folder = Path(f"{program}{target}")
            call(program, *pictures, "-r", run, "-o", folder, "--target_psnr", target)
            rows = json.loads((folder / f"{report}.json").read_text()).values()
            assert [row["reached"] for row in rows] == [reached] * 2
    assert caplog.text.count("2 of 2 pictures do not reach 90 dB, even with all turns") == 2
    assert "reach 1 dB" not in caplog.text
    assert "2 of 2 pictures have no MS-SSIM: they are below 176 pixels" in caplog.text


def test_the_same_command_goes_on_and_no_other(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pictures = (photos / "c.png", photos / "more")
    same = ("compress", *pictures, pictures[0], "-r", run, "-o", "files", "--bpp", 3)
    call(*same)
    assert "2 of 2 files are done" in caplog.text
    whole = {path.name: path.read_bytes() for path in Path("files").iterdir()}
    Path("files/a.loop").unlink()
    call(*same)
    assert "1 of 2 files are done already" in caplog.text
    assert Path("files/a.loop").read_bytes() == whole["a.loop"]
    for other in (("--bpp", 4), ("--entropy", "raw", "--bpp", 3), ("--no_quality", "--bpp", 3)):
        assert "exists already" in fails(capsys, *same[:-2], *other)
    call("decompress", "files", "-r", run, "-o", "pictures")
    Path("pictures/c.png").unlink()
    call("decompress", "files", "-r", run, "-o", "pictures")
    assert caplog.text.count("1 of 2 files are done already") == 2
    error = fails(capsys, "decompress", "files", "-r", run, "-o", "pictures", "--turns", 1)
    assert "exists already" in error


def test_a_file_of_another_tokenizer_names_the_one_to_take(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("photos", run):
        call("compress", photos / "c.png", "-r", name, "-o", Path(name).name, "--no_quality")
    error = fails(capsys, "decompress", "photos/c.loop", "-r", run, "-o", "out", status=1)
    assert f"{run} is" in error and "it is that of photos: pass -r photos" in error
    error = fails(capsys, "decompress", f"{run.name}/c.loop", "-o", "out", status=1)
    assert "photos is" in error and "pass -r RUN of the tokenizer that wrote it" in error


def test_mistakes_are_named_before_any_work(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = photos / "c.png"
    assert "is a file" in fails(capsys, "compress", picture, "-r", run, "-o", picture)
    (tmp_path / "c.loop").write_bytes(b"mine")
    error = fails(capsys, "compress", picture, "-r", run, "-o", tmp_path)
    assert "c.loop exists already: choose another folder with -o" in error
    error = fails(capsys, "decompress", tmp_path / "c.loop", "-r", run, "-o", photos)
    assert "c.png exists already" in error
    error = fails(capsys, "decompress", "c.loop", "-r", run, "-o", "out", "--turns", 0)
    assert "--turns must be at least 1, got 0" in error
    assert "(.loop)" in fails(capsys, "decompress", photos, "-r", run, "-o", "out")
    error = fails(capsys, "compress", picture, "-r", run, "-o", "out", "--bits", 8, status=1)
    assert "the smallest file has" in error and "c.png" in error


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_pictures_of_any_channels_are_measured(channels: int, tmp_path: Path) -> None:
    tokenizer = taming.Tokenizer(instantiate_from_config(vqmodel_config(channels)))
    path, rng = tmp_path / "a.npy", np.random.default_rng(0)
    np.save(path, rng.integers(0, 256, (18, 20, channels), np.uint8))
    numbers = compress(tokenizer, quality_measure(), path, tmp_path / "a.loop")
    codes = tokenizer.encode(path)
    decoded = tokenizer.decode_image(codes)
    assert decoded.shape == (channels, 18, 20) and decoded.abs().max() <= 1
    assert numbers["psnr"] == psnr_of(tokenizer.to_tensor(path), decoded)
    view = Study(tokenizer, path).at({})
    assert view.numbers["psnr"] == numbers["psnr"] and view.picture == tokenizer.decode(codes)
