"""Token caches: round trips across files, complete values, refusal of damaged caches."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest
import torch
from reliability.files import count, failures, save_earlier_cache
from torch.utils.data import DataLoader

from scripts.encode import columns_of
from taming.data.helper_types import Annotation
from taming.data.tokens import CacheInfo, TokenCache, TokenCacheWriter
from taming.data.utils import custom_collate
from taming.util import WriteError

INFO = CacheInfo("abc", [2, 3], 96)
LENGTHS = [8, 12, 6, 10, 11, 7, 9]


def sequences() -> torch.Tensor:
    tokens = torch.randint(0, 300, (len(LENGTHS), 12))
    return tokens.masked_fill(torch.arange(12) >= torch.tensor(LENGTHS)[:, None], -1)


def write(
    folder: Path, tokens: torch.Tensor, vocab_size: int = 300, info: CacheInfo = INFO
) -> None:
    writer = TokenCacheWriter(folder, info, vocab_size, images_per_file=3)
    for part in range(0, len(tokens), 2):
        rows = range(len(tokens))[part : part + 2]
        columns = {
            "class_label": [10 * row for row in rows],
            "name": [f"{row}.png" for row in rows],
        }
        writer.add(tokens[part : part + 2], columns)
    writer.close()


@pytest.mark.parametrize("vocab_size", [300, 1 << 20])
def test_round_trip(vocab_size: int, tmp_path: Path) -> None:
    tokens = sequences() * (vocab_size // 300)
    tokens = tokens.clamp(min=-1)
    write(tmp_path / "new/cache", tokens, vocab_size)
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
    columns = columns_of(custom_collate(items))
    assert set(items[0]) - set(columns) == {"image", "depth", "annotations"}
    writer = TokenCacheWriter(tmp_path / "cache", INFO, 300)
    writer.add(sequences(), columns)
    writer.close()
    cache = TokenCache(str(tmp_path / "cache"))
    (batch,) = DataLoader(cache, batch_size=len(items), collate_fn=custom_collate)
    with pytest.raises(ValueError, match="pass_number: rename"):
        columns_of({"pass_number": torch.zeros(2)})
    with pytest.raises(ValueError, match="'grid' .* rename"):
        writer.add(sequences(), columns | {"grid": columns["class_label"]})
    kept = custom_collate([{key: item[key] for key in columns} for item in items])
    for key, value in kept.items():
        same = torch.equal if isinstance(value, torch.Tensor) else list.__eq__
        assert same(batch[key], value), key


def test_what_was_interrupted_is_no_cache(tmp_path: Path) -> None:
    writer = TokenCacheWriter(tmp_path / "cache", INFO, 300, images_per_file=3)
    writer.add(sequences(), {})  # two files' worth, and one image more
    with pytest.raises(FileNotFoundError, match="holds no token cache"):
        TokenCache(str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="cache.unfinished .*remove"):
        TokenCacheWriter(tmp_path / "cache", INFO, 300)
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert len(TokenCache(str(tmp_path / "cache"))) == len(LENGTHS)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere .*scripts/encode.py"):
        TokenCache("nowhere")
    tokens = sequences()
    write(tmp_path / "a", tokens)
    with pytest.raises(ValueError, match="already holds a token cache"):
        write(tmp_path / "a", tokens)
    write(tmp_path / "b", tokens, info=INFO._replace(fingerprint="def"))
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


@pytest.mark.parametrize(
    "name, value",
    [
        *(("grid", grid) for grid in ([2], [2, 0], [2.0, 3], [True, 3], "23", None)),
        *(("pixels", 0), ("pixels", "96"), ("vocab_size", 299), ("vocab_size", 0)),
        *(("fingerprint", None), ("other", 1), ("grid", [3, 3])),
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


def test_tokens_outside_the_vocabulary_and_columns_of_two_types_are_not_saved(
    tmp_path: Path,
) -> None:
    writer = TokenCacheWriter(tmp_path / "cache", INFO, 300, images_per_file=1)
    with pytest.raises(ValueError, match="token 300 is outside 0..299"):
        writer.add(torch.full((1, 6), 300), {})
    writer.add(torch.zeros(1, 6, dtype=torch.int64), {"depth": [1]})
    with pytest.raises(ValueError, match="depth"):
        writer.add(torch.zeros(1, 6, dtype=torch.int64), {"depth": [1.5]})


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TokenCacheWriter(tmp_path / "cache", INFO, 300)
    writer.add(sequences(), {})
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(pa.RecordBatchFileWriter, "write_batch", full)
    with pytest.raises(WriteError, match=r"cache.unfinished/00000.arrow cannot be saved.* space"):
        writer.close()
    assert not (tmp_path / "cache").exists()
