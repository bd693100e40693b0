"""Token caches of given sequences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from taming.data.token_files import CacheInfo, name_of, save_file, seal

INFO = CacheInfo("abc", 300, 4)
SIZE = (8, 12)  # pixels of a picture, 2 x 3 sites


def write_cache(
    folder: Path,
    tokens: torch.Tensor,
    labels: Mapping[str, Sequence[Any]],
    info: CacheInfo = INFO,
    sizes: Sequence[tuple[int, int]] = (SIZE,),
    per_file: int = 3,
) -> None:
    """Write a cache of tokens (N, L), -1 after the end of each; sizes are repeated."""
    rows = [row[row >= 0].tolist() for row in tokens]
    height, width = zip(*(sizes[n % len(sizes)] for n in range(len(rows))), strict=True)
    columns = {"tokens": rows, "key": list(map(str, range(len(rows))))}
    columns |= {"height": height, "width": width, **labels}
    for number, first in enumerate(range(0, len(rows), per_file)):
        part = {name: values[first : first + per_file] for name, values in columns.items()}
        save_file(folder / name_of(number), info, part)
    seal(folder)
