"""`Tokenizer.compress` and `decompress`: every tokenizer, size and rate, and files of others."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from reliability.compressed import RIGHT, Kind, try_files
from support.codec import cut, fill_tables
from support.models import QUANTIZED, pictures, tokenizer_of, vqmodel_config

from taming.codec.container import decode_file, encode_file
from taming.codec.files import Codec, fit
from taming.codec.levels import Levels
from taming.codec.models import Raw
from taming.codec.ranges import TOTAL
from taming.modules.context import ContextNetwork
from taming.tokenizer import Codes, Tokenizer
from taming.util import instantiate_from_config

ONE_GRID = [name for name in QUANTIZED if "levels" not in name]
LOOPY = [name for name in ONE_GRID if name not in ("first", "plain", "averages", "gumbel")]


def with_tables(quantizer: str, learned: bool = True) -> Tokenizer:
    """A tokenizer whose quantizer keeps entropy tables."""
    model = tokenizer_of(quantizer)
    for level in model.levels.values() if learned else ():
        fill_tables(level)
    return Tokenizer(model)


def equal(codes: Any, others: Any) -> bool:
    """Compare codes of one level or of all."""
    found, wanted = Codes(codes, (1, 1)).levels, Codes(others, (1, 1)).levels
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def same(picture: Image.Image, other: Image.Image) -> bool:
    return picture.size == other.size and ImageChops.difference(picture, other).getbbox() is None


@pytest.mark.parametrize("quantizer", list(QUANTIZED))
def test_a_file_gives_what_the_codes_give(quantizer: str) -> None:
    tokenizer, picture = Tokenizer(tokenizer_of(quantizer)), pictures(1, 9, 14)[0]
    data = tokenizer.compress(picture)
    codes = tokenizer.encode(picture)
    found, size = Codec(tokenizer.model).unpack(data)
    assert equal(found, codes.indices) and size == (9, 14)
    assert same(tokenizer.decompress(data), tokenizer.decode(codes))
    assert data == tokenizer.compress(picture, entropy="raw")


@pytest.mark.parametrize("quantizer", [*LOOPY, "loopy-levels"])
def test_static_files_give_the_same_codes(quantizer: str) -> None:
    tokenizer, picture = with_tables(quantizer), pictures(1, 9, 14)[0]
    data = tokenizer.compress(picture)
    assert data == tokenizer.compress(picture, entropy="static")
    raw = tokenizer.compress(picture, entropy="raw")
    codec = Codec(tokenizer.model)
    assert equal(codec.unpack(data)[0], codec.unpack(raw)[0]) and data[5] == 1 and raw[5] == 0


def test_remapped_codes_are_files_of_the_codes_that_are_used(tmp_path: Any) -> None:
    np.save(tmp_path / "used.npy", np.array([3, 5, 11]))
    config = vqmodel_config(remap=str(tmp_path / "used.npy"))
    tokenizer = Tokenizer(instantiate_from_config(config))
    data = tokenizer.compress(pictures(1)[0])
    assert len(decode_file(data)[1][0]) == 64 * 2 // 8
    assert tokenizer.decompress(data).size == (16, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (7, 3), (31, 33)], ids=str)
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    config = copy.deepcopy(QUANTIZED["residual"])
    config["params"]["ddconfig"]["ch"] = 64  # a norm needs two values of a group, here of one site
    tokenizer = Tokenizer(instantiate_from_config(config))
    picture = Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3))
    decoded = tokenizer.decompress(tokenizer.compress(picture))
    assert decoded.size == picture.size
    assert same(decoded, tokenizer.decode(tokenizer.encode(picture)))


@pytest.mark.parametrize("quantizer", [name for name in LOOPY if name != "attract"])
def test_files_cut_after_a_segment_and_previews_show_fewer_turns(quantizer: str) -> None:
    tokenizer = with_tables(quantizer)
    picture = pictures(1, 12, 10)[0]
    data, codes = tokenizer.compress(picture), tokenizer.encode(picture)
    header, segments = decode_file(data)
    for turns in range(1, header.segments + 1):
        shorter = tokenizer.decode(Codes(cut(codes.indices, turns), codes.size))
        tail = len(encode_file(header, segments)) - len(encode_file(header, segments[:turns]))
        before = data[: len(data) - tail]
        assert same(tokenizer.decompress(data, turns=turns), shorter)
        assert same(tokenizer.decompress(before), shorter)
        if turns < header.segments:
            with pytest.raises(ValueError, match=f"in segment {turns + 1} of {header.segments}"):
                tokenizer.decompress(data[: len(before) + 3])
            assert same(tokenizer.decompress(data[: len(before) + 3], partial=True), shorter)
    assert same(tokenizer.decompress(data, turns=99), tokenizer.decode(codes))
    with pytest.raises(ValueError, match="turns must be at least 1, got 0"):
        tokenizer.decompress(data, turns=0)


def test_a_tokenizer_of_dummies_has_no_previews() -> None:
    tokenizer = with_tables("attract")
    data = tokenizer.compress(pictures(1)[0])
    header, segments = decode_file(data)
    assert header.segments > 1
    message = f"1 of {header.segments} turns decode to nothing"
    with pytest.raises(ValueError, match=message):
        tokenizer.decompress(data, turns=1)
    with pytest.raises(ValueError, match=message):
        tokenizer.decompress(encode_file(header, segments[:1]))
    assert tokenizer.decompress(data, turns=header.segments).size == (16, 16)


@pytest.mark.parametrize("quantizer", ["levels", "loopy-levels"])
def test_the_first_segments_of_several_grids_show_the_upper_levels(quantizer: str) -> None:
    tokenizer, picture = Tokenizer(tokenizer_of(quantizer)), pictures(1, 9, 14)[0]
    data, codes = tokenizer.compress(picture), tokenizer.encode(picture)
    header, segments = decode_file(data)
    turns = [int((level >= 0).sum(dim=-1).max()) for level in codes.levels]
    assert header.segments == sum(turns)
    ends = [(level, turn + 1) for level, most in enumerate(turns) for turn in range(most)]
    for count, (level, turn) in enumerate(ends, 1):
        upper = (*codes.levels[:level], cut(codes.levels[level], turn))
        shorter = tokenizer.decode(Codes(upper, codes.size))
        assert same(tokenizer.decompress(data, turns=count), shorter)
        assert same(tokenizer.decompress(encode_file(header, segments[:count])), shorter)


def test_segments_that_no_levels_wrote_are_refused() -> None:
    tokenizer = Tokenizer(tokenizer_of("levels"))
    data = tokenizer.compress(pictures(1)[0])
    _, (top, bottom) = decode_file(data)
    for segments, message in (
        ((b"\0" + top[1:], bottom), "the codes of the level top: 0 segments for 1 turns"),
        ((b"\2" + top[1:], bottom), "the codes of the level top: 2 segments for 1 turns"),
        ((b"\x80", bottom), "the codes of the level top: a number is damaged or cut off"),
        ((top, bottom[:-1]), "the codes of the level bottom: segment 1 is of no such picture"),
        ((top, b""), "the codes of the level bottom: a number is damaged or cut off"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.decompress(encode_file(decode_file(data)[0], segments))
    models = {name: Raw(2, 16, False) for name in ("top", "bottom")}
    levels, codes = Levels(models, (2, 1)), (torch.zeros(1, 1, 2), torch.zeros(2, 2, 2))
    segments = [*levels.encode([own.long() for own in codes])]
    with pytest.raises(ValueError, match="1 segments follow those of the last level"):
        levels.decode([*segments, b""], (1, 1))


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "entropy"), [("residual", "raw"), ("beam", "static"), ("attract", "static")]
)
def test_bits_are_a_bound_of_the_whole_file(quantizer: str, entropy: str) -> None:
    tokenizer, picture = with_tables(quantizer), pictures(1, 16, 16)[0]
    sites, turns = 8 * 8, tokenizer.model.quantize.sequence.max_loops
    rates = [{"rate": 2 ** (10 - step / 8)} for step in range(321)]
    if quantizer == "attract":  # its lengths change no distance
        rates = [{"max_codes": codes} for codes in range(sites, sites * turns + 1)]
    files = [tokenizer.compress(picture, entropy=entropy, **rate) for rate in rates]
    least, most = 8 * len(files[0]), 8 * len(files[-1])
    for bits in [least, *range(least + 1, most + 64, max((most - least) // 3, 1))]:
        data = tokenizer.compress(picture, bits=bits, entropy=entropy)
        assert 8 * len(data) <= bits
        assert data == tokenizer.compress(picture, bpp=bits / 16**2, entropy=entropy)
        assert data in files and (bits < most or len(data) == most // 8)
    with pytest.raises(ValueError, match=f"too few: the smallest file has {least} bits"):
        tokenizer.compress(picture, bits=least - 1, entropy=entropy)


@pytest.mark.parametrize("quantizer", ["plain", "levels"])
def test_a_fixed_rate_has_one_size_and_no_other_rate(quantizer: str) -> None:
    tokenizer, picture = Tokenizer(tokenizer_of(quantizer)), pictures(1)[0]
    bits = 8 * len(tokenizer.compress(picture))
    assert 8 * len(tokenizer.compress(picture, bits=bits)) == bits
    with pytest.raises(ValueError, match=f"smallest file has {bits} bits"):
        tokenizer.compress(picture, bits=bits - 1)
    with pytest.raises(ValueError, match="fixed rate"):
        tokenizer.compress(picture, max_codes=100)


@pytest.mark.parametrize("rate", [{"max_codes": 90}, {"threshold": 0.2}, {"target_psnr": 12.0}])
def test_the_rates_of_encode_are_those_of_files(rate: dict[str, Any]) -> None:
    tokenizer, picture = Tokenizer(tokenizer_of("residual")), pictures(1)[0]
    found, _ = Codec(tokenizer.model).unpack(tokenizer.compress(picture, **rate))
    assert torch.equal(found, tokenizer.encode(picture, **rate).indices)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"bits": 9, "bpp": 2}, "give one rate, got bits and bpp"),
        ({"bpp": 2, "max_codes": 70}, "give one rate, got bpp and max_codes"),
        ({"bits": 0}, "bits must be a positive number, got 0"),
        ({"bpp": float("nan")}, "bpp must be a positive number, got nan"),
        ({"entropy": "zip"}, "entropy must be one of raw, static, context, got 'zip'"),
        ({"entropy": "context"}, "no context model"),
        ({"max_codes": 3}, "needs at least 64 codes, got 3"),
    ],
)
def test_rates_that_cannot_be_kept_are_refused(rates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(tokenizer_of("residual")).compress(pictures(1)[0], **rates)


@pytest.mark.parametrize("bits", [0, 1, 7, 8, 9, 800, 801, 10_000])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    "estimate, most",
    [(1.0, 4), (0.7, 5), (9.0, 5), (0.0, 50)],
    ids=["right", "low", "high", "none"],
)
def test_fit_finds_the_largest_file_by_few_probes(
    bits: int, step: int, estimate: float, most: int
) -> None:
    probes: list[int] = []

    def file_of(setting: int) -> bytes:
        probes.append(setting)
        return bytes(setting // step)

    def expected(setting: torch.Tensor) -> float:
        return estimate * 8 * (int(setting) // step)

    data = fit(lambda codes: file_of(int(codes)), torch.tensor, range(1001), bits, expected)
    assert len(data) == min(bits // 8, 1000 // step) and len(probes) <= most


# --- entropy models ------------------------------------------------------------------------------


def test_the_best_entropy_model_that_there_is_is_the_default() -> None:
    picture, network = pictures(1)[0], ContextNetwork(16, 3, channels=8, hidden=16)
    learned, new = with_tables("residual"), with_tables("residual", learned=False)
    modes = [tokenizer.compress(picture)[5] for tokenizer in (new, learned)]
    context = Tokenizer(learned.model, context=network)
    data = context.compress(picture)
    assert [*modes, data[5]] == [0, 1, 2]
    assert same(context.decompress(data), learned.decompress(learned.compress(picture)))
    with pytest.raises(ValueError, match="no context model"):
        learned.decompress(data)
    config = copy.deepcopy(QUANTIZED["residual"])
    config["params"]["n_embed"] = TOTAL + 1  # more codes than tables can be of
    large = instantiate_from_config(config)
    large.quantize.entropy.count(torch.tensor([[3, -1, -1]]))
    assert Tokenizer(large).compress(picture)[5] == 0
    for quantizer in ("plain", "levels"):
        with pytest.raises(ValueError, match="keeps no entropy tables: use raw"):
            Tokenizer(tokenizer_of(quantizer)).compress(picture, entropy="static")
    with pytest.raises(ValueError, match="a context model is of one grid, not of top, bottom"):
        Tokenizer(tokenizer_of("levels"), context=network).compress(picture)


# --- files of others, and damaged ones -----------------------------------------------------------


@pytest.fixture
def tokenizer() -> Tokenizer:
    return with_tables("residual")


@pytest.fixture
def data(tokenizer: Tokenizer) -> bytes:
    return tokenizer.compress(pictures(1)[0])


def test_files_of_other_tokenizers_and_tables_are_refused(
    tokenizer: Tokenizer, data: bytes
) -> None:
    other = with_tables("linear")
    names = [bytes.fromhex(t.model.fingerprint())[:4].hex() for t in (tokenizer, other)]
    for other.name in ("this one", "logs/other"):
        message = f"the file is of the tokenizer {names[0]}, and {other.name} is {names[1]}"
        with pytest.raises(ValueError, match=message):
            other.decompress(data)
    tokenizer.model.quantize.entropy.codes = tokenizer.model.quantize.entropy.codes.flip(1)
    message = "the file is of the static model [0-9a-f]{8}, and that of this one is [0-9a-f]{8}"
    with pytest.raises(ValueError, match=message):
        tokenizer.decompress(data)


def changed(data: bytes, **changes: Any) -> bytes:
    """The file with another header, and right checksums."""
    header, segments = decode_file(data)
    return encode_file(header._replace(**changes), segments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": 9}, "unknown mode 9"),
        ({"size": (1 << 30, 1 << 30)}, "pixels exceed the limit"),
        ({"size": (2000, 2001)}, "its 2001 x 2000 pixels exceed the limit of 4000000"),
        ({"size": (17, 16)}, "segment [12] is of no such picture"),
        ({"size": (14, 16), "mode": 0, "entropy": bytes(4)}, "segment 1 is of no such picture"),
        ({"segments": 4}, "the file has 4 turns, the tokenizer 3"),
    ],
)
def test_headers_that_cannot_be_are_refused(
    tokenizer: Tokenizer, data: bytes, changes: dict[str, Any], message: str
) -> None:
    tokenizer.max_pixels = 4_000_000
    with pytest.raises(ValueError, match=message):
        tokenizer.decompress(changed(data, **changes))


def test_no_more_sites_than_a_grid_may_have(
    tokenizer: Tokenizer, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taming.codec.files.MOST_SITES", 1 << 20)
    tokenizer.max_pixels = 1 << 40
    with pytest.raises(ValueError, match="a grid of 1024x1025 sites has more than 1048576"):
        tokenizer.decompress(changed(data, size=(2048, 2049)))


def changes_of(data: bytes) -> list[Callable[[int], bytes]]:
    return [
        lambda place: data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :],
        lambda place: data[:place] + data[place + 1 :],
        lambda place: data[:place] + b"\x55" + data[place:],
        lambda place: data[:place],
    ]


def test_every_changed_byte_is_refused_or_gives_fewer_turns(
    tokenizer: Tokenizer, data: bytes
) -> None:
    shorter = {
        tokenizer.decompress(data, turns=turns).tobytes()
        for turns in range(1, decode_file(data)[0][4])
    }
    shown = 0
    for number, change in enumerate(changes_of(data)):
        for place in range(len(data)):
            try:
                picture = tokenizer.decompress(change(place))
            except ValueError:
                continue
            assert number == 3 and picture.tobytes() in shorter
            shown += 1
    assert shown == len(shorter) > 0


def test_what_is_no_file_is_refused(tokenizer: Tokenizer) -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    with pytest.raises(ValueError, match="not a compressed picture, but a PNG"):
        tokenizer.decompress(png.getvalue())
    with pytest.raises(ValueError, match="got str"):
        tokenizer.decompress("photo.loop")  # type: ignore[arg-type]


def test_mutated_files_are_refused_or_give_pictures() -> None:
    """`reliability.compressed` tries more of them, in a process of limited memory."""
    found = try_files([Kind(name) for name in ("residual", "attract", "levels")], 300, seed=0)
    assert set(found) == set(RIGHT) and found["refused"] > 150
