"""Codes of a picture: their file, and what it refuses."""

import math
import pickle
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from taming.codes import Codes

SHAPES = st.tuples(*[st.integers(1, 4)] * 3)
LEVELS = SHAPES.flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(-1, 1 << 20)))
SINGLES = LEVELS.map(torch.from_numpy)
INDICES = SINGLES | st.lists(SINGLES, min_size=1, max_size=3).map(tuple)
CODES = st.builds(
    Codes,
    INDICES,
    st.tuples(st.integers(1, 1 << 40), st.integers(1, 1 << 40)),
    st.floats(0, 1e12) | st.just(math.nan),
)


def same(a: Codes, b: Codes) -> bool:
    kinds = isinstance(a.indices, tuple) == isinstance(b.indices, tuple)
    pairs = zip(a.levels, b.levels, strict=True)
    bits = a.bits == b.bits or math.isnan(a.bits) and math.isnan(b.bits)
    return kinds and bits and a.size == b.size and all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes") / "photo"
    Codes(torch.tensor([[[5, 300, -1], [2, -1, -1]]]), (7, 16), 12.5).save(path)
    return path


@settings(deadline=None, max_examples=50)
@given(codes=CODES)
def test_a_file_keeps_everything(file: Path, codes: Codes) -> None:
    path = file.with_name("drawn.npz")
    codes.save(path)
    loaded = Codes.load(path)
    assert same(loaded, codes) and all(level.dtype == torch.int64 for level in loaded.levels)


@settings(deadline=None, max_examples=50)
@given(one=CODES, other=CODES)
def test_codes_are_equal_if_indices_and_size_are(one: Codes, other: Codes) -> None:
    again = Codes(tuple(level.clone() for level in one.levels), one.size)
    assert one == again and one != Codes(again.indices, (one.size[0] + 1, one.size[1]))
    changed = torch.where(
        torch.arange(one.levels[0].numel()).reshape(one.levels[0].shape) == 0, 9, one.levels[0]
    )
    assert (Codes((changed, *one.levels[1:]), one.size) == one) == torch.equal(
        changed, one.levels[0]
    )
    assert (one == other) == (
        str(one) == str(other)
        and same(Codes(one.levels, one.size, 0), Codes(other.levels, other.size, 0))
    )
    assert one != one.indices


def test_numbers_of_codes() -> None:
    codes = Codes(torch.tensor([[[5, 3, -1], [2, -1, -1]]]), (7, 16), 14.0)
    assert len(codes) == 3 and codes.lengths.tolist() == [[2, 1]] and codes.bpp == 0.125
    assert math.isnan(Codes(codes.indices, codes.size).bpp)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(file: Path, data: st.DataObject) -> None:
    whole, path = file.read_bytes(), file.with_name("damaged")
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    ends = [whole[:place], whole[:place] + flipped + whole[place + 1 :]]
    path.write_bytes(data.draw(st.sampled_from(ends)))
    try:
        loaded = Codes.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert same(loaded, Codes.load(file))


ONE = np.zeros((1, 1, 1), np.int8)
ABOUT = {"size": np.array([4, 4]), "bits": np.float64(3)}


@pytest.mark.parametrize(
    "content",
    [
        {"indices": ONE},
        {**ABOUT},
        {**ABOUT, "indices": ONE, "more": ONE},
        {**ABOUT, "level1": ONE},
        {**ABOUT, "indices": ONE - 2},
        {**ABOUT, "indices": ONE[0]},
        {**ABOUT, "indices": ONE.astype(float)},
        {**ABOUT, "indices": ONE[:0]},
        {**ABOUT, "size": np.array([0, 4]), "indices": ONE},
        {**ABOUT, "size": np.array([4, 4, 4]), "indices": ONE},
        {**ABOUT, "indices": np.array([[[{}]]], dtype=object)},
    ],
    ids=lambda content: "-".join(content),
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "other.npz", **content)
    with pytest.raises(ValueError, match="other.npz is not a file of codes"):
        Codes.load(tmp_path / "other.npz")


def test_other_files_are_refused_by_name(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A1,A2")
    (tmp_path / "pickle").write_bytes(pickle.dumps(ONE))
    with ZipFile(file) as whole, ZipFile(tmp_path / "compressed", "w", ZIP_DEFLATED) as other:
        for name in whole.namelist():
            other.writestr(name, whole.read(name))
    for name in ("text", "pickle", "compressed"):
        with pytest.raises(ValueError, match=f"{name} is not a file of codes"):
            Codes.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        Codes.load(tmp_path / "nothing")
