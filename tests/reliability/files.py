"""Damage files in many ways, and count what becomes of them when they are read.

python -m tests.reliability.files --n 1500 --seed 0

Every damaged file is read in a child process, so that a crash or a hang is counted too. It must be
refused with a ValueError (or FileNotFoundError), or be read exactly as it was written. Kinds
without a checksum may be read with other values; nothing else may happen to them either.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from support.caches import write_cache

from taming.checkpoint import load_checkpoint
from taming.data.base import NumpyPaths
from taming.data.tokens import TokenCache
from taming.modules.vqvae.quantize import VectorQuantizer2

OUTCOMES = ("refused", "same", "changed", "other error", "crashed", "hung")


class Kind(NamedTuple):
    """Files of one kind: how to save them in a folder and read them, and if they have checksums."""

    save: Callable[[Path], None]
    read: Callable[[Path], Any]
    has_checksum: bool


# --- kinds ---------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(16, 32, generator=generator) for i in range(6)}
    return {"state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1, "step": torch.arange(9)}}


def save_cache(folder: Path, files: int = 3) -> None:
    shutil.rmtree(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (8 * files - 3, 12), generator=generator)
    lengths = torch.randint(6, 13, (len(tokens), 1), generator=generator)
    tokens = tokens.masked_fill(torch.arange(12) >= lengths, -1)
    box = torch.rand(len(tokens), 4, generator=generator).tolist()
    names = [f"{number}.png" for number in range(len(tokens))]
    numbers = list(range(len(tokens)))
    labels = {"class_label": numbers, "box": box, "name": names}
    write_cache(folder, tokens, labels, sizes=[(8, 12), (5, 11)], per_file=8)


def save_earlier_cache(folder: Path) -> None:
    """A cache as it was saved before there were checksums, keys and sizes."""
    save_cache(folder)
    (folder / "checksums.json").unlink()
    about = {"fingerprint": "abc", "grid": [2, 3], "pixels": 96}
    for file in folder.glob("*.arrow"):
        with pa.OSFile(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        table = table.drop_columns(["key", "height", "width"])
        rewrite(file, table.replace_schema_metadata({b"taming.tokens": json.dumps(about)}))


def rewrite(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_cache(folder: Path) -> Any:
    cache = TokenCache(str(folder))
    return cache.about, [cache[number] for number in range(len(cache))]


def save_picture(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 12, 16), dtype=np.uint8)
    np.save(folder / "a.npy", pixels)


def save_archive(folder: Path) -> None:
    with open(folder / "a.npy", "wb") as file:
        np.savez(file, a=np.zeros((1, 3, 12, 16), np.uint8))


def read_remap(folder: Path) -> Any:
    quantizer = VectorQuantizer2(300, 2, 0.25, remap=str(folder / "used.npy"))
    return quantizer.used


def checkpoint(lazy: bool, **options: Any) -> Kind:
    return Kind(
        lambda folder: torch.save(content(), folder / "a.ckpt", **options),
        lambda folder: load_checkpoint(folder / "a.ckpt", lazy=lazy),
        has_checksum=not options,
    )


KINDS = {
    "checkpoint": checkpoint(lazy=False),
    "checkpoint, mapped": checkpoint(lazy=True),
    "checkpoint before torch 1.6": checkpoint(lazy=False, _use_new_zipfile_serialization=False),
    "token cache": Kind(save_cache, read_cache, True),
    "token cache, earlier version": Kind(save_earlier_cache, read_cache, False),
    "picture .npy": Kind(save_picture, lambda f: NumpyPaths([f / "a.npy"])[0]["image"], False),
    "picture .npz": Kind(save_archive, lambda f: NumpyPaths([f / "a.npy"])[0]["image"], True),
    "remap .npy": Kind(
        lambda folder: np.save(folder / "used.npy", np.arange(0, 300, 5)), read_remap, False
    ),
}


# --- damage --------------------------------------------------------------------------------------


def damage_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Flip bits, or cut off, take out, insert, zero or repeat a part."""
    data, size = bytearray(whole), len(whole)
    # Half of all damage is near an end, where headers and indices are.
    near = rng.randrange(min(size, 1000))
    start = rng.choice([rng.randrange(size), rng.randrange(size), near, size - 1 - near])
    end = start + rng.choice([1, 4, 64, 1000])
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            data[start] ^= 1 << rng.randrange(8)
        case 4:
            data[start] = rng.choice([0, 1, 127, 128, 255])
        case 5:
            data = data[:start]
        case 6:
            del data[start:end]
        case 7:
            data[start:start] = rng.randbytes(end - start)
        case 8:
            data[start:end] = bytes(len(data[start:end]))
        case _:
            data[start:end] = data[:end][: len(data[start:end])]
    return bytes(data)


def swap_metadata(file: Path, rng: random.Random) -> None:
    """Rewrite an Arrow file with other properties of its cache."""
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    about = json.loads(table.schema.metadata[b"taming.tokens"])
    name = rng.choice([*about, "other"])
    about[name] = rng.choice(["abd", [3, 3], [0, 6], [2], 97, -1, 2**70, None, True, 0.5, "", {}])
    text = rng.choice([json.dumps(about), json.dumps([about]), "{", "null", "\xff"])
    rewrite(file, table.replace_schema_metadata({b"taming.tokens": text}))


def damage_folder(folder: Path, rng: random.Random) -> None:
    """Damage the bytes of one file; in a cache, also lose, mix up or rewrite whole files."""
    files = sorted(folder.iterdir())
    tables = [file for file in files if file.suffix == ".arrow"]
    file = rng.choice(files)
    match rng.randrange(10) if tables else 9:
        case 0:
            file.unlink()
        case 1:
            target = folder / f"{rng.randrange(6):05}.arrow"
            if target != file:
                shutil.copy(file, target)
        case 2:
            swap_metadata(rng.choice(tables), rng)
        case _:
            file.write_bytes(damage_bytes(file.read_bytes(), rng))


# --- counting ------------------------------------------------------------------------------------


def is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*one] == [*other] and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return one == other


def outcome(kind: Kind, folder: Path, seed: int) -> tuple[str, str]:
    """Damage a new copy of the files and read them: one of OUTCOMES, and details."""
    scratch = folder / "damaged"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder / "whole", scratch)
    damage_folder(scratch, random.Random(seed))
    try:
        found = kind.read(scratch)
    except (ValueError, FileNotFoundError) as error:
        return "refused", str(error)
    except Exception as error:
        return "other error", f"{type(error).__name__}: {error}"
    return ("same" if is_same(found, kind.read(folder / "whole")) else "changed"), ""


def serve(kind: Kind, folder: Path, connection: Any) -> None:
    torch.set_num_threads(1)
    while (seed := connection.recv()) is not None:
        connection.send(outcome(kind, folder, seed))


def count(name: str, n: int, seed: int = 0, timeout: float = 30) -> Counter[str]:
    """Damage the files of a kind n times; count the outcomes, and print what is wrong."""
    kind, counts = KINDS[name], Counter(dict.fromkeys(OUTCOMES, 0))
    context = multiprocessing.get_context("fork")
    child = None
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "whole").mkdir()
        kind.save(folder / "whole")
        for number in range(seed * 1_000_000, seed * 1_000_000 + n):
            if child is None:
                ours, theirs = context.Pipe()
                child = context.Process(target=serve, args=(kind, folder, theirs))
                with warnings.catch_warnings():  # about forks beside threads
                    warnings.simplefilter("ignore")
                    child.start()
                theirs.close()
            ours.send(number)
            try:
                result, details = ours.recv() if ours.poll(timeout) else ("hung", "")
            except EOFError:
                result, details = "crashed", ""
            if result in ("hung", "crashed"):
                child.kill()
                child.join()
                child = None
            if result in failures(name):
                sys.stdout.write(f"{name}, damage {number}: {result} {details}\n")
            counts[result] += 1
        if child is not None:
            ours.send(None)
            child.join()
    return counts


def failures(name: str) -> tuple[str, ...]:
    """Outcomes that must not occur for a kind."""
    return OUTCOMES[2:] if KINDS[name].has_checksum else OUTCOMES[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1500, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    sys.stdout.write("kind".ljust(32) + "".join(name.rjust(13) for name in OUTCOMES) + "\n")
    wrong = 0
    for name in options.kinds:
        counts = count(name, options.n, options.seed)
        wrong += sum(counts[result] for result in failures(name))
        row = "".join(str(counts[result]).rjust(13) for result in OUTCOMES)
        sys.stdout.write(name.ljust(32) + row + "\n")
        sys.stdout.flush()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
