"""What is written to a token cache is read back, whatever the file that it is in."""

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

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


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere holds no token cache; scripts/encode.py"):
        TokenCache("nowhere")
    tokens = sequences()
    write(tmp_path / "a", tokens)
    with pytest.raises(ValueError, match="already holds a token cache"):
        write(tmp_path / "a", tokens)
    write(tmp_path / "b", tokens, info=INFO._replace(fingerprint="def"))
    (tmp_path / "b/00000.arrow").rename(tmp_path / "a/00009.arrow")
    with pytest.raises(ValueError, match="holds files of different token caches"):
        TokenCache(str(tmp_path / "a"))
    whole = (tmp_path / "b/00001.arrow").read_bytes()
    (tmp_path / "b/00001.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="00001.arrow is no whole Arrow file"):
        TokenCache(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    table = pa.table({"tokens": [[1]]})
    with pa.OSFile(str(tmp_path / "c/0.arrow"), "wb") as sink:
        pa.ipc.new_file(sink, table.schema).close()
    with pytest.raises(ValueError, match="0.arrow is no file of a token cache"):
        TokenCache(str(tmp_path / "c"))
