"""The programs that the page of recipes shows, on runs of two steps."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curves import main, read
from PIL import Image
from support.runs import TinyRuns, call, fails, read_pixels

from scripts.group_by_code import purity
from scripts.quantize_colours import quantize
from taming.modules.util import Labelator
from taming.run.folder import model_from_run

GAP = 2  # pixels around every picture of a grid
LEVELS = ("top", "bottom")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a program writes by default is not left in the repository."""
    monkeypatch.chdir(tmp_path)


# --- colours -------------------------------------------------------------------------------------


def test_few_colours_are_found_and_kept() -> None:
    palette = torch.tensor([[-1.0, 0, 1], [0.5, 0.5, -1], [1, -1, 0.2]])
    image = palette[torch.randint(3, (9, 7))].permute(2, 0, 1)
    image[:, 0, :3] = palette.T  # each occurs
    torch.testing.assert_close(quantize(image, 63).decode(), image)


def test_colours_are_means_of_their_pixels_and_nearer_than_any_other() -> None:
    image = torch.rand(3, 12, 10) * 2 - 1
    palette, codes = quantize(image, 5, iterations=100)
    pixels = image.flatten(1).T
    assert torch.equal(torch.cdist(pixels, palette).argmin(dim=1), codes.flatten())
    for colour in codes.unique():
        mean = pixels[codes.flatten() == colour].mean(dim=0)
        torch.testing.assert_close(palette[colour], mean)


def test_quantized_versions_are_shown_beside_the_image(tmp_path: Path) -> None:
    call("quantize_colours", "-k", 2, 3, "--size", 20, "-o", tmp_path / "new/colours.png")
    shown = read_pixels(tmp_path / "new/colours.png")
    assert shown.shape == (20 + 2 * GAP, 3 * (30 + GAP) + GAP, 3)
    for number, colours in ((1, 2), (2, 3)):
        left = GAP + number * (30 + GAP)
        part = shown[GAP:-GAP, left : left + 30].reshape(-1, 3)
        assert len(np.unique(part, axis=0)) == colours


def test_impossible_colours_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    for colours in (0, 7):
        message = fails(capsys, "quantize_colours", "a.png", "-k", colours)
        assert re.search(rf"1\.\.6, .*{colours}", message)
    (tmp_path / "b.png").write_text("no image")
    assert "b.png" in fails(capsys, "quantize_colours", "b.png")


# --- one code per image --------------------------------------------------------------------------


def test_images_are_grouped_by_their_code(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    run, out = tiny_runs.of("vqvae_single_code.yaml"), tmp_path / "groups.png"
    call("group_by_code", "-r", run, "-n", 12, "--rows", 2, "--columns", 12, "-o", out)
    shown = read_pixels(out)
    assert shown.shape[1] == 13 * (32 + GAP) + GAP
    first = shown[GAP : GAP + 32, GAP + 32 + GAP : GAP + 2 * (32 + GAP) - GAP]
    data = [
        np.asarray(Image.open(tiny_runs.data / "images" / f"{i}.png").resize((32, 32)))
        for i in range(12)
    ]
    assert any((first == image).all() for image in data)


def test_purity_is_the_share_of_the_commonest_class() -> None:
    codes, classes = torch.tensor([0, 0, 0, 2, 2, 5]), torch.tensor([1, 1, 3, 4, 0, 2])
    assert purity(codes, classes) == pytest.approx((2 + 1 + 1) / 6)


def test_only_tokenizers_of_one_code_group(
    tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, message in (
        ("vqvae_cifar10.yaml", "16 codes"),
        ("pixelcnn_cifar10.yaml", "PixelCNNPrior, .*tokenizer"),
        ("vqvae2_cifar10.yaml", "several scales"),
    ):
        assert re.search(message, fails(capsys, "group_by_code", "-r", tiny_runs.of(name)))


# --- VQ-VAE-2 ------------------------------------------------------------------------------------


def test_every_level_is_evaluated(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    call("evaluate", "-r", tiny_runs.of("vqvae2_cifar10.yaml"), "-o", output)
    numbers = json.loads(output.read_text())["rates"]["own"]
    codes = numbers["codes"]
    assert (codes["top_codes_per_image"], codes["bottom_codes_per_image"]) == (4, 16)
    assert sum(numbers["histograms"]["bottom_codes"]) == 16 * 12


def test_every_level_is_counted_in_a_reconstruction(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_runs.of("vqvae2_cifar10.yaml")
    image, out = tmp_path / "image.png", tmp_path / "out"
    Image.effect_noise((21, 18), 50).convert("RGB").save(image)
    call("reconstruct", "-r", model, image, "-o", out)
    assert {path.name for path in out.iterdir()} == {
        *("image.png", "image_compare.png", "reconstructions.json")
    }
    assert read_pixels(out / "image.png").shape == (18, 21, 3)
    shown = read_pixels(out / "image_compare.png")  # the top level's picture too
    assert shown.shape == (22, 3 * 23 + 2, 3)
    (values,) = json.loads((out / "reconstructions.json").read_text()).values()
    assert values["sites"] == values["codes"] == values["tokens"] == 9 + 36
    assert values["bits"] == pytest.approx(45 * math.log2(8))
    error = fails(capsys, "reconstruct", "-r", model, image, "-o", out, "--max_codes", 9)
    assert re.search("Hierarchy has a fixed rate.*max_codes", error)


def test_images_are_drawn_level_by_level(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    runs = [tiny_runs.of(f"vqvae2_{level}_prior.yaml") for level in LEVELS]
    drawn = {}
    for folder, seed, batch in (("first", 5, 2), ("again", 5, 3), ("other", 6, 2)):
        out = tmp_path / folder
        call("sample_hierarchy", "-r", *runs, "-n", 3, "--batch_size", batch, "-s", seed, "-o", out)
        names = sorted(path.name for path in out.iterdir())
        assert names == ["000000.png", "000001.png", "000002.png", "grid.png"]
        drawn[folder] = np.stack([read_pixels(out / name) for name in names[:3]]).astype(int)
        assert drawn[folder].shape == (3, 16, 16, 3)
    # Other batches, other last digits; but the same codes.
    np.testing.assert_allclose(drawn["first"], drawn["again"], atol=1)
    assert not np.array_equal(drawn["first"], drawn["other"])


def test_images_of_classes_are_drawn_level_by_level(
    tiny_runs: TinyRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    top, bottom = (model_from_run(tiny_runs.of(f"vqvae2_{level}_prior.yaml")) for level in LEVELS)
    models: dict[str, Any] = {"top": top, "bottom": bottom}
    monkeypatch.setattr("taming.run.folder.model_from_run", lambda run, **_: models[run])
    monkeypatch.setattr("taming.run.cli.existing_run", str)
    error = fails(capsys, "sample_hierarchy", "-r", "top", "bottom", "--classes", "1")
    assert "this prior is unconditional" in error
    top.be_unconditional, top.cond_stage_model = False, Labelator(5)
    assert "give --classes" in fails(capsys, "sample_hierarchy", "-r", "top", "bottom")
    call("sample_hierarchy", "-r", "top", "bottom", "-n", 2, "--classes", "4,1", "-o", tmp_path)
    names = [f"{number:06}_class{label}.png" for number, label in enumerate((4, 4, 1, 1))]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "grid.png"]


def test_runs_that_are_no_priors_of_all_levels_are_refused(
    tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    top, bottom = (tiny_runs.of(f"vqvae2_{level}_prior.yaml") for level in LEVELS)
    for runs, message in (
        ((bottom, top), "from the top down"),
        ((top,), r"1 prior.*\['top'\]"),
        ((tiny_runs.of("vqvae2_cifar10.yaml"),), "VQVAE2, .*prior"),
    ):
        assert re.search(message, fails(capsys, "sample_hierarchy", "-r", *runs))


# --- curves --------------------------------------------------------------------------------------


def test_curves_go_on_where_a_run_was_resumed(tmp_path: Path) -> None:
    run = tmp_path / "2026-01-01T00-00-00_name"
    for start, text in (
        ("a", "step,val/psnr,x\n0,,1\n4,20.5,\n9,21.5,\n"),
        ("b", "step,val/psnr\n14,22\n"),
    ):
        (run / "csv" / start).mkdir(parents=True)
        (run / "csv" / start / "metrics.csv").write_text(text)
    assert read(run, "val/psnr") == ([4, 9, 14], [20.5, 21.5, 22.0])
    with pytest.raises(ValueError, match="2026-01-01T00-00-00_name .*'val/psn'"):
        read(run, "val/psn")


def test_a_figure_of_runs(tiny_runs: TinyRuns, tmp_path: Path, monkeypatch) -> None:
    runs = [tiny_runs.of(name) for name in ("vqvae_cifar10.yaml", "vqvae_mnist.yaml")]
    monkeypatch.setattr("sys.argv", ["curves", "val/psnr", *map(str, runs), "-o", "new/a.png"])
    main()
    assert read_pixels(tmp_path / "new/a.png").shape == (270, 450, 4)
