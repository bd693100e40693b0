"""Pictures to token caches: equal bytes however they are computed, each key once, nothing half."""

import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from reliability.shards import differences, save_tokenizer, survive, write_pictures
from support.runs import TinyRuns, call, fails
from support.shards import write_parquet, write_tar

import taming
from taming.data.tokens import TokenCache
from taming.run.folder import SavedRun
from taming.scale import encode_shards, engines, open_source
from taming.scale.job import Job
from taming.scale.sources import Items, shard_size_of
from taming.util import IncompleteError

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(16, 24), (20, 16), (17, 31), (16, 16)]


@pytest.fixture(scope="module")
def run(tiny_runs: TinyRuns) -> Path:
    return tiny_runs.of("demo/loopy_vqgan.yaml")


def pixels(number: int) -> np.ndarray:
    height, width = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of four sizes in two folders, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        path = folder / f"{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(number)).save(path)
    (folder / "b/broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def whole(run: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their cache, of three shards."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    encode(run, pictures, folder)
    return folder


def encode(run: Path, data: Path, output: Path, **options: Any) -> Any:
    options = {"shard_size": 3, "devices": ["cpu"], **options}
    return encode_shards(run, str(data), output, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("rate", [{}, {"rate": 0.5}])
def test_codes_are_those_of_the_face(
    run: Path, pictures: Path, whole: Path, rate: dict[str, float], tmp_path: Path
) -> None:
    if rate:
        encode(run, pictures, whole := tmp_path, **rate)
    tokenizer, cache = taming.load(run), TokenCache(str(whole))
    assert [item["key"] for item in cache] == [*(f"a/{n}.png" for n in (0, 2, 4, 6))] + [
        f"b/{n}.png" for n in (1, 3, 5, 7)
    ]
    for item in cache:
        codes = tokenizer.encode(str(pictures / item["key"]), **rate)
        assert (item["height"], item["width"]) == codes.size
        tokens = torch.from_numpy(item["tokens"])
        sequence = tokenizer.model.quantize.sequence
        decoded = sequence.decode(tokens[None], tuple(item["grid"].tolist()))
        assert torch.equal(decoded[0], codes.indices)
        assert item["fingerprint"] == tokenizer.model.fingerprint()


def test_unreadable_pictures_are_reported_or_fatal(
    run: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    report = json.loads((whole / "report.json").read_text())
    ((key, reason),) = report["unreadable"]
    assert report["pictures"] == 8 and key == "b/broken.png" and "cannot be decoded" in reason
    assert report["tokens"] == sum(int((i["tokens"] >= 0).sum()) for i in TokenCache(str(whole)))
    with pytest.raises(ValueError, match="broken.png: cannot be decoded"):
        encode(run, pictures, tmp_path / "cache", on_error="raise")
    assert "checksums.json" not in contents(tmp_path / "cache")
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 2 pictures .*, a.png: image .*a.png"):
        encode(run, tmp_path, tmp_path / "none")


def test_a_second_call_goes_on_and_a_third_does_nothing(
    run: Path, pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: Job, shard: int, *_: Any) -> None:
        if shard == 2:
            (job.output / "00002.arrow.7.part").write_bytes(b"half")  # of a process that dies
            raise KeyboardInterrupt
        encode_one(job, shard, *_)

    encode_one, output = Job._encode, tmp_path / "cache"
    monkeypatch.setattr(Job, "_encode", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(run, pictures, output)
    begun = contents(output)
    with pytest.raises(ValueError, match="not finished"):
        TokenCache(str(output))
    monkeypatch.setattr(Job, "_encode", encode_one)
    encode(run, pictures, output)
    assert contents(output) == contents(whole)
    assert all(contents(whole)[n] == begun[n] for n in ("00000.arrow", "00001.arrow"))
    monkeypatch.setattr(Job, "_encode", None)  # which is not needed
    assert encode(run, pictures, output).pictures == 8


def test_another_plan_is_refused(run: Path, pictures: Path, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    for options in ({"size": 16}, {"shard_size": 4}, {"labels": True}):
        with pytest.raises(ValueError, match=f"{whole} was begun with other data: repeat"):
            encode(run, pictures, whole, **options)
    with pytest.raises(ValueError, match="begun with another rate, none, not max_codes 400"):
        encode(run, pictures, whole, max_codes=400)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/a.txt").touch()
    with pytest.raises(ValueError, match="already holds a token cache or other files"):
        encode(run, pictures, tmp_path / "cache")
    assert contents(whole) == before


@pytest.mark.parametrize("kind", ["list", "parquet", "tar"])
def test_a_picture_has_the_same_codes_in_any_file(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, numbers = tmp_path / "data", range(5)
    data.mkdir()
    if kind == "list":
        for n in numbers:
            Image.fromarray(np.full((8, 8 + n % 2, 3), n, np.uint8)).save(data / f"{n}.png")
        (tmp_path / "list.txt").write_text("".join(f"data/{n}.png\n" for n in numbers))
        keys, source = [f"data/{n}.png" for n in numbers], tmp_path / "list.txt"
        monkeypatch.chdir(tmp_path)
    elif kind == "parquet":
        write_parquet(data / "some.parquet", numbers)
        keys, source = [f"some/{n}" for n in numbers], data
    else:
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        write_tar(data / "some.tar", numbers)
        keys, source = [f"some/{n:03}" for n in numbers], data / "some.tar"
    encode(run, source, tmp_path / "cache", shard_size=2)
    cache, tokenizer = TokenCache(str(tmp_path / "cache")), taming.load(run)
    assert [item["key"] for item in cache] == keys
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == (1 if kind == "tar" else 3)
    for item, n in zip(cache, numbers, strict=True):
        codes = tokenizer.encode(np.full((8, 8 + n % 2, 3), n, np.uint8))
        assert (item["tokens"] >= 0).sum() >= len(codes)
        assert (item["height"], item["width"]) == codes.size
        assert kind == "list" or item["class_label"] == n % 3


def test_classes_rates_and_squares(run: Path, pictures: Path, tmp_path: Path) -> None:
    encode(run, pictures, tmp_path / "a", labels=True, size=16, max_codes=70)
    cache = TokenCache(str(tmp_path / "a"))
    assert [item["class_label"] for item in cache] == [0] * 4 + [1] * 4
    assert {(item["height"], item["width"]) for item in cache} == {(16, 16)}
    tokenizer: Any = taming.load(run)
    sequence = tokenizer.model.quantize.sequence
    for item in cache:
        tokens = torch.from_numpy(item["tokens"])[None]
        assert (sequence.decode(tokens, (4, 4)) >= 0).sum() <= 70
    report = encode(run, pictures, tmp_path / "b", max_codes=16)  # 4 x 4 sites at most
    assert [reason for _, reason in report.unreadable if "need more" in reason]
    assert report.pictures == sum(SIZES[n % 4] == (16, 16) for n in range(8))


def test_ranks_share_the_shards(
    run: Path, pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_one(job: Job, shard: int, *_: Any) -> None:
        done.append(shard)
        job.file(shard).touch()

    saved, done = SavedRun.load(run), list[int]()
    source = open_source(str(pictures), shard_size=3)
    fingerprint = json.loads((whole / "plan.json").read_text())["tokenizer"]
    output = tmp_path / "cache"
    monkeypatch.setattr(Job, "_encode", encode_one)
    job = Job(saved.model, source, output, fingerprint)
    job.begin()
    for rank in range(2):
        done.clear()
        for file in output.glob("*.arrow"):
            file.unlink()
        job.work("cpu", rank, 2, lambda _: None)
        assert done == ([0, 2, 1] if rank == 0 else [1, 2, 0])  # its own, then those of the other


def test_a_launcher_names_the_rank(
    run: Path, pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="needs the variables SLURM_PROCID, .* by srun"):
        encode(run, pictures, tmp_path / "cache", engine="slurm", devices="cpu")
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    encode(run, pictures, tmp_path / "cache", engine="torchrun", devices="cpu")
    assert contents(tmp_path / "cache") == contents(whole)


def start(code: str, *argv: Any) -> None:
    """Run a program of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, argv)]
    subprocess.run(command, env=environment, check=True, timeout=500)


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
def test_a_cluster_of_ray_outlives_a_node(
    run: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    code = """
import sys, threading, time, ray
from pathlib import Path
from ray.cluster_utils import Cluster
from taming.scale import encode_shards
run, data, output = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
def kill():
    while not list(Path(output).glob(".*.lock")):  # of a shard that is being computed
        time.sleep(0.01)
    cluster.remove_node(nodes[0], allow_graceful=False)
killer = threading.Thread(target=kill)
killer.start()
encode_shards(run, data, output, engine="ray", devices="cpu", shard_size=3)
killer.join()
assert nodes[0] not in cluster.worker_nodes and not nodes[0].any_processes_alive()
"""
    start(code, run, pictures, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(whole)


def test_processes_of_this_machine_give_the_same_bytes(
    run: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    encode(run, pictures, tmp_path / "cache", devices=["cpu", "cpu"])
    assert contents(tmp_path / "cache") == contents(whole)


def test_killed_at_any_time_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    run, data, whole = save_tokenizer(tmp_path / "run"), tmp_path / "data", tmp_path / "whole"
    write_pictures(data, 100)
    encode(run, data, whole, shard_size=10)
    assert survive(run, data, tmp_path / "killed", kills=3, shard_size=10) >= 3
    assert differences(tmp_path / "killed", whole) == []


def test_files_that_were_half_written_at_a_kill_are_removed(tmp_path: Path) -> None:
    run, data, output = save_tokenizer(tmp_path / "run"), tmp_path / "data", tmp_path / "cache"
    write_pictures(data, 10)
    output.mkdir()
    (output / "plan.json.123.part").write_text("{")
    (output / "report.json.124.part").touch()
    with pytest.raises(ValueError, match="already holds a token cache or other files"):
        encode(run, data, output)
    (output / "report.json.124.part").unlink()
    encode(run, data, output)
    (output / "checksums.json").rename(output / "checksums.json.125.part")
    encode(run, data, output)
    assert not list(output.glob("*.part")) and (output / "checksums.json").exists()


def test_the_command(
    run: Path, pictures: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cache"
    arguments = ("-r", run, "-o", output, "--device", "cpu", "--devices", 1)
    with pytest.raises(IncompleteError, match="1 of 9 files failed; the first: b/broken.png: "):
        call("encode", *arguments, "--data", pictures, "--shard_size", 3)
    assert contents(output) == contents(whole)
    shown = capsys.readouterr().err
    assert "9/9" in shown and "picture/s" in shown
    with pytest.raises(IncompleteError, match="1 of 9 files failed; the first: b/broken.png: "):
        call("encode", *arguments, "--data", pictures, "--shard_size", 3)
    assert contents(output) == contents(whole) and "9/9" not in capsys.readouterr().err
    error = fails(capsys, "encode", *arguments, "--data", tmp_path / "none")
    assert "none" in error
    error = fails(capsys, "encode", *arguments, "--data", pictures, "--engine", "rays")
    assert "did you mean 'ray'?" in error
    error = fails(capsys, "encode", *arguments, "--data", run / "checkpoints")
    assert "no image" in error


def test_what_is_wrong_is_named_before_anything_is_written(
    run: Path, pictures: Path, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    def refused(message: str, data: Any = pictures, tokenizer: Path = run, **options: Any) -> None:
        source = data if isinstance(data, Items) else str(data)
        options = {"devices": ["cpu"], **options}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            encode_shards(tokenizer, source, tmp_path / "cache", **options)
        assert not (tmp_path / "cache").exists()

    (tmp_path / "list.txt").write_text("a/0.png\na/0.png\n")
    refused("files .* do not exist", tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(f"{pictures}/a/0.png\n" * 2)
    refused("a/0.png more than once", tmp_path / "list.txt")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    refused("0 columns of encoded pictures", tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no table")
    refused("b.parquet is not a Parquet file", tmp_path / "b.parquet")
    refused("labels of subfolders need a folder", tmp_path / "a.parquet", labels=True)
    refused("on_error must be", on_error="ignore")
    refused("give one rate, got max_codes and threshold", max_codes=9, threshold=1.0)
    refused("must be above 0", max_codes=0)
    refused("devices must be 1 to", devices=0)
    refused("device 'tpu'", devices=["tpu"])
    refused("devices is an empty list", devices=[])
    for name in ("batch_size", "tile", "shard_size", "size"):
        refused(f"{name} must be at least 1, got 0", **{name: 0})
    for engine in ("torchrun", "slurm", "ray"):
        for devices in (2, ["cpu"], "cuda:1"):
            refused(f"engine '{engine}' takes the devices", engine=engine, devices=devices)
    refused("image_column and columns are of tables", image_column="image")
    refused("split is of a data set of the hub", split="test")
    refused("size: of pictures that a name finds", Items([{"image": 0}]), size=8)
    fixed = tiny_runs.of("custom_vqgan.yaml")
    refused("VectorQuantizer2 has a fixed rate: omit max_codes", tokenizer=fixed, max_codes=9)
    refused("holds a VQVAE2", tokenizer=tiny_runs.of("vqvae2_cifar10.yaml"))


def test_labels_that_a_cache_cannot_hold(run: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels(0)).save(file, "PNG")
    rows: dict[str, Any] = {"image": [{"bytes": file.getvalue()}] * 2, "label": [3, 4]}
    rows |= {"text": ["a", None], "width": [7, 7]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="label 'text' has no value for some pictures"):
        encode(run, tmp_path / "a.parquet", tmp_path / "cache")
    encode(run, tmp_path / "a.parquet", tmp_path / "b", columns=["label", "width"])
    (first, second) = TokenCache(str(tmp_path / "b"))
    assert (first["class_label"], second["class_label"], first["width"]) == (3, 4, 24)
    with pytest.raises(ValueError, match="no column 'texts'"):
        encode(run, tmp_path / "a.parquet", tmp_path / "c", columns=["texts"])
    saved = SavedRun.load(run)
    items = Items([{"image": np.zeros((16, 16, 3), np.float32), "grid": 1}])
    with pytest.raises(ValueError, match="'grid' is reserved in a token cache: rename"):
        encode_shards(saved, items, tmp_path / "d", devices=["cpu"])
    items = Items([{"image": np.zeros((16, 16, 3), np.float32), "pass_number": 1}])
    with pytest.raises(ValueError, match="pass_number: rename"):
        encode_shards(saved, items, tmp_path / "e", devices=["cpu"])


@pytest.mark.parametrize("pictures", [1, 64, 65, 10_000, 1_000_000, 10**9])
def test_shards_are_neither_tiny_nor_huge(pictures: int) -> None:
    size = shard_size_of(pictures)
    assert 64 <= size <= 10_000 and (size == 10_000 or -(-pictures // size) <= 64)


def test_a_name_that_is_not_utf8_is_kept_with_escapes(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    Image.fromarray(pixels(0)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    report = encode(run, tmp_path, tmp_path / "cache", labels=True)
    (item,) = TokenCache(str(tmp_path / "cache"))
    assert item["key"] == r"caf\udce9/a.png" and item["human_label"] == r"caf\udce9"
    assert [key for key, _ in report.unreadable] == [r"caf\udce9/b.png"]


def test_a_plan_that_appears_meanwhile_is_no_foreign_file(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(SavedRun.load(run).model, open_source(str(pictures)), tmp_path, "a")
    look = Path.iterdir

    def begun_by_another(folder: Path) -> Any:
        monkeypatch.undo()
        job.begin()
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", begun_by_another)
    job.begin()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_keys_and_plan_do_not_depend_on_how_a_path_is_spelt(
    kind: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    if kind == "folder":
        (tmp_path / "data").symlink_to(pictures)
    else:
        (tmp_path / "data").mkdir()
        write_parquet(tmp_path / "data/a.parquet", range(3))
    sources = [open_source(name) for name in ("data", "./data", "data/", "~/data")]
    assert len({source.identity for source in sources}) == 1
    keys = [[task().key for task in source.read(0)] for source in sources]
    assert keys == [keys[0]] * 4 and keys[0][0] in ("a/0.png", "a/0")
    for name in ("none/", "./none", "~/none"):  # are no names of the hub in any spelling
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            open_source(name)


def test_a_home_is_found_for_the_cache(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    encode(run, pictures / "a", Path("~/cache"))
    assert (tmp_path / "cache/checksums.json").exists()
    assert len(TokenCache("~/cache")) == 4


def test_the_command_takes_the_options_of_one_kind_of_data(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-r", run, "-o", tmp_path / "cache", "--device", "cpu")
    for name, value in {"splits": "train", "passes": 2, "seed": 1}.items():
        error = fails(capsys, "encode", *arguments, "--data", pictures, f"--{name}", value)
        assert f"--{name} is of the run's own data: omit --data" in error
    for name, value in {"size": 8, "split": "test", "columns": "a", "shard_size": 4}.items():
        error = fails(capsys, "encode", *arguments, f"--{name}", value)
        assert f"--{name} is of pictures: give --data" in error
    assert "seed must be at least 0" in fails(capsys, "encode", *arguments, "--seed", -1)
    for number in (0, -1):
        assert "devices" in fails(capsys, "encode", *arguments, "--devices", number)
    assert not (tmp_path / "cache").exists()


def test_a_script_without_a_guard_is_told_so(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # a process that imports the script which started it
        patch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
        with pytest.raises(ValueError, match="under if __name__ == '__main__':"):
            encode(run, pictures, tmp_path / "cache")
    monkeypatch.setattr(engines, "_run_round", lambda *_: None)  # its processes die so
    with pytest.raises(OSError, match="^the workers died, and 3 shards are not done$"):
        encode(run, pictures, tmp_path / "cache", devices=["cpu", "cpu"])
