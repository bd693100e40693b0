"""Streams of pictures: every row once, an order from the seed, resumed bit for bit."""

import functools
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.shards import encoded, write_parquet, write_tar

pytest.importorskip("datasets")

from taming.data.custom import ImageFolder
from taming.data.datamodule import DataModuleFromConfig
from taming.data.stream_loader import StreamLoader
from taming.data.streams import StreamedImages
from taming.util import DataError

ROWS = (7, 5, 6)  # of three shards


WRITERS = {"tar": write_tar, "parquet": write_parquet}


def write(folder: Path, kind: str, damaged: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    first = 0
    for shard, rows in enumerate(ROWS):
        WRITERS[kind](folder / f"{shard}.{kind}", range(first, first + rows), damaged)
        first += rows
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in WRITERS}


def number_of(image: Any) -> Any:
    return ((image[..., 0, 0, 0] + 1) * 127.5).round().int()


def read(stream: StreamedImages, lane: int = 0, lanes: int = 1, seed: Any = None) -> list[int]:
    stream.begin(seed, 0, lane, lanes)
    return [int(number_of(torch.from_numpy(item["image"]))) for item in stream]


@pytest.mark.parametrize("kind", WRITERS)
def test_items_are_those_of_their_files(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for number in range(sum(ROWS)):
        (tmp_path / f"{number:03}.png").write_bytes(encoded(number))
    stream = StreamedImages(str(folders[kind]))
    for item, expected in zip(stream, ImageFolder(str(tmp_path)), strict=True):
        assert np.array_equal(item["image"], expected["image"])
        assert item["class_label"] == number_of(torch.from_numpy(item["image"])) % 3
        assert item.keys() == {"image", "class_label"}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_readers_share_all_rows(kind: str, lanes: int, folders: dict[str, Path]) -> None:
    stream = StreamedImages(str(folders[kind]), block=4)
    orders = []
    for seed in (None, 3, 4, 3):
        parts = [read(stream, lane, lanes, seed) for lane in range(lanes)]
        assert sorted(sum(parts, [])) == list(range(sum(ROWS)))
        orders.append(parts)
    assert orders[1] == orders[3] and len({str(order) for order in orders}) == 3


@pytest.mark.parametrize("kind", WRITERS)
def test_a_position_is_resumed_bit_for_bit(kind: str, folders: dict[str, Path]) -> None:
    stream, again = (StreamedImages(str(folders[kind]), length=50, block=4) for _ in range(2))
    stream.begin(1, 2, 1, 2)
    whole = [(number_of(item["image"]), stream.state_dict()) for item in as_tensors(stream)]
    assert len(whole) == 25
    for place, (_, state) in enumerate(whole):
        again.begin(1, 2, 1, 2)
        again.load_state_dict(state)
        rest = [number_of(item["image"]) for item in as_tensors(again)]
        assert rest == [number for number, _ in whole[place + 1 :]]


def as_tensors(stream: StreamedImages) -> Iterator[dict[str, Any]]:
    for item in stream:
        yield item | {"image": torch.from_numpy(item["image"])}


def test_loaders_of_several_processes_give_as_many_batches(folders: dict[str, Path]) -> None:
    def loader(rank: int, **options: Any) -> StreamLoader:
        stream = StreamedImages(str(folders["tar"]), size=8, **options)
        return StreamLoader(stream, 2, 2, seed=1, shuffle=True, share=(rank, 2))

    loaders = [loader(rank, length=11) for rank in range(2)]
    shares = [[number_of(batch["image"]).tolist() for batch in each] for each in loaders]
    assert [len(share) for share in shares] == [len(each) for each in loaders] == [2, 2]
    assert len({n for share in shares for batch in share for n in batch}) == 2 * 4  # none twice
    with pytest.raises(DataError, match="StreamedImages needs a length"):
        loader(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_resumes_a_stream(workers: int, folders: dict[str, Path]) -> None:
    def loader(at: list[Any]) -> StreamLoader:
        stream = StreamedImages(str(folders["parquet"]), size=6, random_crop=True, block=4)
        return StreamLoader(stream, 2, workers, seed=1, shuffle=True, position=lambda: at[0])

    at: list[Any] = [(1, 0)]
    first = loader(at)
    batches = iter(first)
    whole = [next(batches)["image"] for _ in range(5)]
    at[0] = (1, 5)
    state = first.state_dict()
    whole += [batch["image"] for batch in batches]
    second = loader(at)
    second.load_state_dict(state)
    rest = [batch["image"] for batch in second]
    assert len(rest) == len(whole) - 5 > 2
    assert all(map(torch.equal, rest, whole[5:]))


class Quiet(SimpleHTTPRequestHandler):
    """A server of files."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_addresses_are_read(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            urls = [f"{url}/{shard}.{kind}" for shard in range(len(ROWS))]
            assert read(StreamedImages(urls)) == list(range(sum(ROWS)))
            with pytest.raises(ValueError, match=f"{url}/9.{kind}.* cannot be opened"):
                read(StreamedImages([f"{url}/9.{kind}"]))
        finally:
            server.shutdown()
            server.server_close()


def test_a_data_set_of_the_hub_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "name"  # in a clone of its repository
    (data / "data").mkdir(parents=True)
    for shard in range(len(ROWS)):
        source = folders["parquet"] / f"{shard}.parquet"
        (data / f"data/test-{shard:05}-of-00003.parquet").write_bytes(source.read_bytes())
    assert read(StreamedImages(str(data), split="test")) == list(range(sum(ROWS)))
    with pytest.raises(ValueError, match="name cannot be opened"):
        StreamedImages(str(data), split="train")


@pytest.mark.parametrize("path", ["/nowhere/data", "./photos", "photos/", "a/b/c", "~/no"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist, and is no name"):
        StreamedImages(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_picture_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    folder = str(write(tmp_path / "data", kind, damaged=8))
    skipping = StreamedImages(folder, on_error="skip")
    assert read(skipping) == [n for n in range(sum(ROWS)) if n != 8] and skipping.skipped == 1
    with pytest.raises(DataError, match="image .* cannot be decoded"):
        read(StreamedImages(folder))


def write_labels(folder: Path, **labels: Any) -> str:
    """Save four pictures with labels in a file of Parquet; return its path."""
    table = pa.table({"image": [{"bytes": encoded(n)} for n in range(4)], **labels})
    pq.write_table(table, folder / "a.parquet")
    return str(folder / "a.parquet")


def test_vectors_become_the_rows_of_a_tensor(tmp_path: Path) -> None:
    vectors = [[float(n), 1.0, 2.0] for n in range(4)]
    path = write_labels(tmp_path, vector=vectors, place=[[n, n] for n in range(4)], text=[*"abcd"])
    batches = list(StreamLoader(StreamedImages(path, size=8), 2))
    assert torch.equal(torch.cat([batch["vector"] for batch in batches]), torch.tensor(vectors))
    assert batches[1]["place"].tolist() == [[2, 2], [3, 3]] and batches[1]["text"] == ["c", "d"]


def test_vectors_of_several_lengths_are_named(tmp_path: Path) -> None:
    path = write_labels(tmp_path, ragged=[[1] * n for n in range(1, 5)])
    with pytest.raises(DataError, match=r"'ragged' .*\(1,\) and \(2,\)"):
        list(StreamLoader(StreamedImages(path, size=8), 2))


@pytest.mark.parametrize(
    "values", [[1, 2, 3, None], ["a", "b", "c", None], [[1], [2], [3], [None]]]
)
@pytest.mark.parametrize("block", [2, 1000])
def test_a_label_without_a_value_is_named(values: list[Any], block: int, tmp_path: Path) -> None:
    path = write_labels(tmp_path, other=values, label=[5, 6, 7, 8])
    with pytest.raises(DataError, match="row 3 of shard 0: the column 'other' has no value"):
        list(StreamedImages(path, block=block))
    skipping = StreamedImages(path, block=block, on_error="skip")
    assert read(skipping) == [0, 1, 2] and skipping.skipped == 1
    items = list(StreamedImages(path, block=block, columns=["label"]))
    assert [item["class_label"] for item in items] == [5, 6, 7, 8] and "other" not in items[0]


def test_what_is_wrong_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"9.tar does not exist"):
        StreamedImages([str(tmp_path / "9.tar")])
    with pytest.raises(ValueError, match="files of several kinds, .parquet, .tar"):
        StreamedImages([str(folder / f"0.{kind}") for kind, folder in folders.items()])
    with pytest.raises(ValueError, match="no column 'img' of encoded pictures, only png"):
        StreamedImages(str(folders["tar"]), image_column="img")
    with pytest.raises(ValueError, match="at least 1"):
        StreamedImages(str(folders["tar"]), block=0)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="0 columns of encoded pictures"):
        StreamedImages(str(tmp_path / "a.parquet"))


def test_a_stream_is_named_by_a_configuration(folders: dict[str, Path]) -> None:
    target = "taming.data.streams.StreamedImages"
    block = {"target": target, "params": {"data": str(folders["parquet"]), "size": 8}}
    data = DataModuleFromConfig(4, block, num_workers=0)
    data.setup()
    assert sorted(torch.cat([number_of(b["image"]) for b in data.train_dataloader()])) == list(
        range(sum(ROWS))
    )


def test_a_name_that_is_no_shard_is_not_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    good = str(folders["tar"] / "0.tar")
    for stray in ("typo", str(tmp_path), "notes.txt"):
        with pytest.raises(FileNotFoundError, match=f"{stray} is no .tar or .parquet file"):
            StreamedImages([good, stray])


def test_what_a_path_is_stands_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "b").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # is not needed for any of them
    for data in (str(tmp_path / "a.png"), [str(tmp_path / "b")] * 2):
        with pytest.raises(ValueError, match="is no .tar or .parquet file or folder of such"):
            StreamedImages(data)
    with pytest.raises(FileNotFoundError, match="a/b/typo does not exist"):
        StreamedImages("a/b/typo")
    with pytest.raises(ValueError, match="no file or folder photoz is here; .*needs? the package"):
        StreamedImages("photoz")


def test_a_picture_whose_path_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "/nowhere/x.png"}, {"bytes": encoded(7), "path": None}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(rows, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    skipping = StreamedImages(str(tmp_path / "a.parquet"), on_error="skip")
    assert read(skipping) == [7] and skipping.skipped == 1
    with pytest.raises(DataError, match="/nowhere/x.png cannot be read"):
        read(StreamedImages(str(tmp_path / "a.parquet")))


def test_a_label_of_the_pictures_name_does_not_replace_it(tmp_path: Path) -> None:
    table = pa.table({"img": [{"bytes": encoded(5)}], "image": ["a text"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(StreamedImages(str(tmp_path / "a.parquet"))) == [5]
