"""Token caches: round trips across files, complete values, refusal of damaged caches."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
from reliability.files import count, failures, rewrite, save_earlier_cache
from support.caches import INFO, SIZE, write_cache
from torch.utils.data import DataLoader

from taming.data import token_files
from taming.data.helper_types import Annotation
from taming.data.loader import Loader
from taming.data.token_files import PLAN, name_of, save_file, seal
from taming.data.tokens import TokenCache
from taming.data.utils import custom_collate
from taming.scale.sources import labels_of
from taming.util import WriteError

LENGTHS = [8, 12, 6, 10, 11, 7, 9]


def sequences() -> torch.Tensor:
    tokens = torch.randint(0, 300, (len(LENGTHS), 12))
    return tokens.masked_fill(torch.arange(12) >= torch.tensor(LENGTHS)[:, None], -1)


def write(folder: Path, tokens: torch.Tensor, **changes: object) -> None:
    rows = range(len(tokens))
    labels = {"class_label": [10 * row for row in rows], "name": [f"{row}.png" for row in rows]}
    write_cache(folder, tokens, labels, INFO._replace(**changes))


@pytest.mark.parametrize("vocab_size", [300, 1 << 20])
def test_round_trip(vocab_size: int, tmp_path: Path) -> None:
    tokens = sequences() * (vocab_size // 300)
    tokens = tokens.clamp(min=-1)
    write(tmp_path / "new/cache", tokens, vocab_size=vocab_size)
    assert len(list((tmp_path / "new/cache").glob("*.arrow"))) == 3
    cache = pickle.loads(pickle.dumps(TokenCache(str(tmp_path / "new/cache"))))
    (batch,) = DataLoader(cache, batch_size=7, collate_fn=custom_collate)
    assert torch.equal(batch["tokens"], tokens)
    assert batch["class_label"].tolist() == list(range(0, 70, 10))
    assert batch["name"] == [f"{row}.png" for row in range(7)]
    assert batch["fingerprint"] == ["abc"] * 7
    assert batch["grid"].tolist() == [[2, 3]] * 7 and batch["pixels"].tolist() == [96] * 7
    assert torch.equal(torch.from_numpy(cache[-1]["tokens"]), tokens[-1])
    with pytest.raises(IndexError):
        cache[7]


def test_numbers_vectors_and_strings_of_items_are_kept(tmp_path: Path) -> None:
    items = [
        {
            "image": torch.rand(4, 4, 3),
            "depth": torch.rand(4, 4),
            "annotations": [Annotation(0.5, "1", (0, 0, 1, 1), 1, "dog")],
            "class_label": label,
            "objects_bbox": torch.randint(0, 8192, (15,)),
            "place": torch.rand(4),
            "seen": torch.rand(2) < 0.5,
            "name": f"{label}.png",
        }
        for label in range(len(LENGTHS))
    ]
    kept = [labels_of(item) for item in items]
    assert set(items[0]) - set(kept[0]) == {"image", "depth", "annotations"}
    labels = {key: [row[key] for row in kept] for key in kept[0]}
    write_cache(tmp_path / "cache", sequences(), labels)
    cache = TokenCache(str(tmp_path / "cache"))
    (batch,) = DataLoader(cache, batch_size=len(items), collate_fn=custom_collate)
    kept = custom_collate([{key: item[key] for key in labels} for item in items])
    for key, value in kept.items():
        same = torch.equal if isinstance(value, torch.Tensor) else list.__eq__
        assert same(batch[key], value), key


def test_what_was_interrupted_is_no_cache(tmp_path: Path) -> None:
    write(tmp_path / "cache", sequences())
    (tmp_path / "cache/checksums.json").rename(tmp_path / "sums")
    (tmp_path / "cache" / PLAN).touch()
    with pytest.raises(ValueError, match="cache is not finished: repeat the command"):
        TokenCache(str(tmp_path / "cache"))
    (tmp_path / "sums").rename(tmp_path / "cache/checksums.json")
    assert len(TokenCache(str(tmp_path / "cache"))) == len(LENGTHS)


def test_pictures_of_different_sizes_share_no_batch(tmp_path: Path) -> None:
    sizes, tokens = [(8, 12), (12, 8), (5, 9)], sequences()  # sites: 2 x 3, 3 x 2, 2 x 3
    write_cache(tmp_path / "cache", tokens, {}, sizes=sizes)
    cache = TokenCache(str(tmp_path / "cache"))
    for item, (height, width) in zip(cache, sizes * 3, strict=False):
        assert item["pixels"] == height * width
        assert item["grid"].tolist() == [-(-height // 4), -(-width // 4)]
    for shuffle in (False, True):
        shares = [Loader(cache, 2, seed=1, shuffle=shuffle, share=(rank, 2)) for rank in (0, 1)]
        read = [[batch["key"] for batch in share] for share in shares]
        assert [*map(len, read)] == [*map(len, shares)] == [3, 3]  # of 5 and of 2 pictures
        assert {key for share in read for batch in share for key in batch} == set("0123456")
        for share in shares:
            assert all(len(batch["grid"].unique(dim=0)) == 1 for batch in share)
    orders = [[b["key"] for b in Loader(cache, 2, seed=n, shuffle=True)] for n in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_a_file_of_unreadable_pictures_alone_is_skipped(tmp_path: Path) -> None:
    write(tmp_path / "cache", sequences())
    columns = {name: [] for name in ("tokens", "key", "height", "width")}
    save_file(tmp_path / "cache" / name_of(3), INFO, columns, [("a.png", "it is no picture")])
    seal(tmp_path / "cache")
    assert len(TokenCache(str(tmp_path / "cache"))) == len(LENGTHS)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere .*`taming encode`"):
        TokenCache("nowhere")
    tokens = sequences()
    write(tmp_path / "a", tokens)
    write(tmp_path / "b", tokens, fingerprint="def")
    (tmp_path / "b/00000.arrow").rename(tmp_path / "a/00009.arrow")
    with pytest.raises(ValueError, match="00009.arrow does not belong"):
        TokenCache(str(tmp_path / "a"))
    whole = (tmp_path / "b/00001.arrow").read_bytes()
    (tmp_path / "b/00001.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="00000.arrow is missing"):
        TokenCache(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    table = pa.table({"tokens": [[1]]})
    with pa.OSFile(str(tmp_path / "c/00000.arrow"), "wb") as sink:
        pa.ipc.new_file(sink, table.schema).close()
    with pytest.raises(ValueError, match="00000.arrow .* token cache"):
        TokenCache(str(tmp_path / "c"))


def test_no_damaged_file_is_taken_for_a_whole_one(tmp_path: Path) -> None:
    for name in ("token cache", "token cache, earlier version"):
        counts = count(name, n=40)
        assert counts["refused"] > 20 and not any(counts[result] for result in failures(name))


def test_the_last_and_a_middle_file_cannot_go_missing(tmp_path: Path) -> None:
    write(tmp_path / "whole", sequences())
    for number in range(3):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / f"{number}")
        (copy / f"{number:05}.arrow").unlink()
        with pytest.raises(ValueError, match=f"{copy}/{number:05}.arrow is missing.* copy"):
            TokenCache(str(copy))
    (tmp_path / "whole/checksums.json").unlink()
    with pytest.raises(ValueError, match="has lost its checksums.json"):
        TokenCache(str(tmp_path / "whole"))


def test_a_cache_without_checksums_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    save_earlier_cache(tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        assert TokenCache(str(tmp_path / "cache"))[20]["name"] == "20.png"
    assert "no checksums.json" in caplog.text
    (tmp_path / "cache/00001.arrow").unlink()
    with pytest.raises(ValueError, match="00001.arrow is missing"):
        TokenCache(str(tmp_path / "cache"))


def test_a_cache_of_one_grid_opens_as_the_earlier_version_read_it(tmp_path: Path) -> None:
    tokens, folder = sequences(), tmp_path / "cache"
    folder.mkdir()
    about = {"fingerprint": "abc", "grid": [2, 3], "pixels": 96, "vocab_size": 70_000}
    rows = pa.array([row[row >= 0].tolist() for row in tokens], pa.list_(pa.int32()))
    table = pa.table({"tokens": rows, "class_label": list(range(7))})
    rewrite(
        folder / name_of(0),
        table.replace_schema_metadata({b"taming.tokens": json.dumps(about)}),
    )
    seal(folder)
    cache = TokenCache(str(folder))
    (batch,) = Loader(cache, 7)
    assert torch.equal(batch["tokens"], tokens) and batch["class_label"].tolist() == [*range(7)]
    assert batch["grid"].tolist() == [[2, 3]] * 7 and batch["pixels"].tolist() == [96] * 7
    assert batch.keys() == {"tokens", "class_label", "grid", "pixels", "fingerprint"}


@pytest.mark.parametrize(
    "name, value",
    [
        *(("site", site) for site in (0, 2, 4.0, True, "4", None)),
        *(("grid", [2, 3]), ("vocab_size", 299), ("vocab_size", 0)),
        *(("fingerprint", None), ("other", 1)),
    ],
)
def test_properties_out_of_range_are_refused(tmp_path: Path, name: str, value: object) -> None:
    write(tmp_path / "cache", sequences().where(torch.arange(12) > 0, 299))
    (tmp_path / "cache/checksums.json").unlink()
    for file in (tmp_path / "cache").iterdir():
        table = pa.ipc.open_file(file.read_bytes()).read_all()
        about = json.loads(table.schema.metadata[b"taming.tokens"]) | {name: value}
        table = table.replace_schema_metadata({b"taming.tokens": json.dumps(about)})
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match="00000.arrow is damaged"):
        TokenCache(str(tmp_path / "cache"))


def test_loader_processes_do_not_check_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cache", sequences())
    cache = TokenCache(str(tmp_path / "cache"))
    monkeypatch.setattr("taming.data.token_files.crc32_of", Mock(side_effect=AssertionError))
    assert len(pickle.loads(pickle.dumps(cache))) == len(LENGTHS)


def test_what_is_no_row_of_a_cache_is_not_saved(tmp_path: Path) -> None:
    row = {"tokens": [[0] * 6], "key": ["a"], "height": [SIZE[0]], "width": [SIZE[1]]}
    for number in (-1, 300):
        with pytest.raises(ValueError, match=f"token {number} is outside 0..299"):
            save_file(tmp_path / name_of(0), INFO, row | {"tokens": [[number] * 6]})
    with pytest.raises(ValueError, match="label 'depth' has no value"):
        save_file(tmp_path / name_of(0), INFO, row | {"depth": [None]})
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no pictures"):
        seal(tmp_path)
    for number, depth in enumerate((1, 1.5)):
        save_file(tmp_path / name_of(number), INFO, row | {"depth": [depth]})
    with pytest.raises(ValueError, match="labels depth of .*00001.arrow .* other types"):
        seal(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(pa.RecordBatchFileWriter, "write_batch", full)
    with pytest.raises(WriteError, match=r"cache/00000.arrow cannot be saved.* space"):
        write(tmp_path / "cache", sequences())
    assert not any((tmp_path / "cache").iterdir())


def test_windows_flushes_what_can_be_written_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, flags: int) -> int:
        assert path.is_file() and flags == os.O_RDWR
        flushed.append(path.name)
        return os.open(path, flags)

    flushed: list[str] = []
    windows = SimpleNamespace(**{**vars(os), "name": "nt", "open": opened})
    monkeypatch.setattr(token_files, "os", windows)
    write(tmp_path / "cache", sequences())
    assert len(flushed) == 4 and len(TokenCache(str(tmp_path / "cache"))) == len(LENGTHS)
