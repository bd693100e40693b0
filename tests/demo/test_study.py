"""What the page shows of a picture is what the tokenizer itself gives, at any rate."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import every_quantizer, tokenizer_of

from taming.demo.study import MARK, OWN, RATES, Study, kinds_of
from taming.pictures import psnr_of
from taming.tokenizer import Tokenizer


def photo(height: int = 20, width: int = 26) -> Image.Image:
    noise = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def study_of(quantizer: str, side: int | None = None) -> Study:
    return Study(Tokenizer(tokenizer_of(quantizer)), photo(), side)


def rates(study: Study) -> list[tuple[str, float]]:
    """Values within, at the ends of and beyond each range."""
    found = []
    for kind, (least, most) in study.ranges.items():
        found += [(kind, v) for v in (least - 9, least, (least + most) / 2, most, most + 9)]
    return found


@every_quantizer
def test_the_own_rate_is_that_of_the_tokenizer(quantizer: str) -> None:
    study = study_of(quantizer)
    tokenizer, view = study.tokenizer, study.at(study.rate_of(OWN, 0))
    codes = tokenizer.encode(photo())
    assert all(map(torch.equal, codes.levels, view.codes.levels))
    assert codes.size == view.codes.size and codes.bits == view.codes.bits
    assert view.picture.tobytes() == tokenizer.decode(codes).tobytes()
    x = tokenizer.to_tensor(photo())
    assert view.numbers["psnr"] == psnr_of(x, tokenizer.to_tensor(view.picture))
    assert view.numbers["codes"] == len(codes)
    if len(codes.levels) == 1:
        assert view.numbers["bytes"] == len(tokenizer.compress(photo()))
    assert study.at({}) is view  # which a click does not compute again


@every_quantizer
def test_any_rate_is_kept_to(quantizer: str) -> None:
    study = study_of(quantizer)
    assert tuple(study.ranges) == kinds_of(study.tokenizer) and OWN in study.ranges
    sites, pixels = study.grid[0] * study.grid[1], 20 * 26
    for kind, value in rates(study):
        view = study.at(study.rate_of(kind, value))
        least, most = study.ranges[kind]
        value = min(max(value, least), most)
        assert view.picture.size == (26, 20)
        assert kind != "codes" or sites <= view.numbers["codes"] <= value * sites
        assert kind != "bits" or view.codes.bits <= value * pixels * (1 + 1e-6)
    for kind in {*RATES} - {*study.ranges}:
        with pytest.raises(ValueError, match=f"no rate by {kind}, only own"):
            study.rate_of(kind, 1)


@pytest.mark.parametrize("own", [None, 0.0005, 0.5])
@pytest.mark.parametrize("trained", [None, (0.0002, 0.02)])
def test_lambda_starts_at_the_tokenizers_own_within_those_of_the_training(
    own: float | None, trained: tuple[float, float] | None
) -> None:
    tokenizer = tokenizer_of("residual")
    tokenizer.quantize.rate, tokenizer.quantize.rate_range = own, trained
    study = Study(Tokenizer(tokenizer), photo())
    (least, most), start = study.ranges["lambda"], study.start_of("lambda")
    known = [math.log2(value) for value in (own, *(trained or ())) if value]
    for value in (start, *known):
        assert least < value < most
    if known:
        assert least >= min(known) - 3 and most <= max(known) + 3
    if own:
        codes = study.at(study.rate_of("lambda", start)).codes
        assert torch.equal(codes.indices, study.at(study.rate_of(OWN, 0)).codes.indices)
        assert 2**start == pytest.approx(own)


def test_the_slider_starts_where_the_first_study_does() -> None:
    pytest.importorskip("gradio")
    from taming.demo.page import slider_of

    studies = [study_of("attract"), study_of("residual"), study_of("beam")]
    studies[1].model.quantize.rate = 0.0005
    for kind in ("codes", "bits", "lambda"):
        slider = slider_of(studies, kind)
        first = next(study for study in studies if kind in study.ranges)
        assert slider.value == pytest.approx(first.start_of(kind), abs=slider.step / 2)
        assert slider.minimum < slider.value < slider.maximum
    assert not slider_of(studies, OWN).visible and not slider_of([], "lambda").visible


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_one_is_not_many(width: int) -> None:
    pytest.importorskip("gradio")
    from taming.demo.page import text_of

    study = Study(Tokenizer(tokenizer_of("plain")), photo(1, width))  # sites of 2 x 2 pixels
    text, sites = text_of(study, study.at({})), (width + 1) // 2
    assert f"{width} × 1 pixel{'s' * (width > 1)} ·" in text
    many = "s" * (sites > 1)
    assert f"{sites} × 1 site{many} · {sites} code{many}, 1.00 of a site" in text


@every_quantizer
def test_a_path_has_the_codes_of_its_site_and_the_distances_to_them(quantizer: str) -> None:
    study = study_of(quantizer)
    quantize = study.model.quantize
    for kind, value in rates(study):
        view = study.at(study.rate_of(kind, value))
        for site in ((0, 0), (study.grid[0] - 1, 1)):
            own = [int(c) for c in view.codes.levels[-1][site] if c >= 0]
            turns = study.path(view, site)
            written = [turn.code for turn in turns if turn.code]
            dummy = [*study.model.levels.values()][-1].n_e
            assert written == ["D" if code == dummy else str(code) for code in own]
            assert [turn.turn for turn in turns] == list(range(1, len(turns) + 1))
            if not quantize.variable_rate:
                continue
            z = study.z[0, :, site[0], site[1]]
            last = turns[len(own) - 1].distance
            if quantize.transform.dummies:  # each turn pulls the latent nearer
                first = math.dist(z, quantize.embedding.weight[own[-1]])
                pulled = first * (1 - quantize.transform.step) ** (len(own) - 1)
                assert last == pytest.approx(pulled, rel=1e-4)
            else:
                z_q = quantize.transform.compose(torch.tensor([own]), quantize.embedding.weight)
                assert last == pytest.approx(float((z - z_q[0]).norm()), rel=1e-4)


@pytest.mark.parametrize("quantizer", ["residual", "attract", "loopy-levels"])
def test_lengths_are_shown_where_they_vary(quantizer: str) -> None:
    study = study_of(quantizer)
    view = study.at({})
    assert view.lengths is not None and view.lengths.size == (26, 20)
    shown = np.asarray(view.lengths)[:: study.site, :: study.site]  # a pixel of each site
    lengths = view.codes.lengths.numpy()[: shown.shape[0], : shown.shape[1]]
    colours = {n: {tuple(c) for c in shown[lengths == n]} for n in np.unique(lengths)}
    assert len(colours) > 1 and all(len(own) == 1 for own in colours.values())
    assert len(set.union(*colours.values())) == len(colours)
    assert study_of("plain").at({}).lengths is None


def test_each_pixel_belongs_to_the_site_that_is_framed() -> None:
    study = study_of("residual")
    blank = Image.new("RGB", (26, 20))
    for x, y in ((0, 0), (25, 19), (7, 12), (-3, 5), (900, 1e9)):
        row, column = study.site_at(x, y)
        assert 0 <= row < study.grid[0] and 0 <= column < study.grid[1]
        if 0 <= x < 26 and 0 <= y < 20:
            assert row * study.site <= y < (row + 1) * study.site
            assert column * study.site <= x < (column + 1) * study.site
        marked = np.asarray(study.marked(blank, (row, column)))
        rows, columns = np.nonzero((marked == MARK).all(axis=2))
        assert len(rows) and marked[marked.any(axis=2)].shape[0] == len(rows)
        assert abs(rows - row * study.site).max() <= study.site + 2
        assert abs(columns - column * study.site).max() <= study.site + 2


def test_large_pictures_are_scaled_to_a_side() -> None:
    study = study_of("residual", side=13)
    assert study.size == (10, 13)
    assert study_of("residual", side=26).size == study_of("residual").size == (20, 26)


def test_files_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    tokenizer = Tokenizer(tokenizer_of("residual"), max_pixels=100)
    with pytest.raises(ValueError, match="26 x 20 pixels exceed the limit of 100"):
        Study(tokenizer, tmp_path / "photo.png")
