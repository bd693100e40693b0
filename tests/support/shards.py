"""Shards of small pictures whose pixels tell their numbers, as tars and Parquet files."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(number: int, side: int = 8) -> bytes:
    """A PNG whose pixels tell its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side + number % 2, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, numbers: range, damaged: int | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            picture = b"no picture" if number == damaged else encoded(number)
            for ending, data in (("png", picture), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers: range, damaged: int | None = None) -> None:
    pictures = [b"no picture" if n == damaged else encoded(n) for n in numbers]
    rows = {
        "image": [{"bytes": data, "path": None} for data in pictures],
        "label": [number % 3 for number in numbers],
    }
    pq.write_table(pa.table(rows), path, row_group_size=3)
