"""Token caches: round trips across files, complete values, refusal of damaged caches."""

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from scripts.encode import columns_of
from taming.data.helper_types import Annotation
from taming.data.tokens import CacheInfo, TokenCache, TokenCacheWriter
from taming.data.utils import custom_collate

INFO = CacheInfo("abc", [2, 3], 96)
LENGTHS = [3, 7, 1, 5, 6, 2, 4]


def sequences() -> torch.Tensor:
    tokens = torch.randint(0, 300, (len(LENGTHS), 7))
    return tokens.masked_fill(torch.arange(7) >= torch.tensor(LENGTHS)[:, None], -1)


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
    assert len(list((tmp_path / "new/cache").iterdir())) == 3
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
    with pytest.raises(ValueError, match="different token caches"):
        TokenCache(str(tmp_path / "a"))
    whole = (tmp_path / "b/00001.arrow").read_bytes()
    (tmp_path / "b/00001.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="00001.arrow .* Arrow file"):
        TokenCache(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    table = pa.table({"tokens": [[1]]})
    with pa.OSFile(str(tmp_path / "c/0.arrow"), "wb") as sink:
        pa.ipc.new_file(sink, table.schema).close()
    with pytest.raises(ValueError, match="0.arrow .* token cache"):
        TokenCache(str(tmp_path / "c"))
