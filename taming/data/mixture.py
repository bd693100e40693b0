"""Several data sets as one, each with a share of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from taming.util import instantiate_from_config


class Mixture(Dataset[Any]):
    """Random items of several data sets, whatever their sizes, from torch's global generator.

    Args:
        datasets: ``{target, params}`` blocks of data sets with a length.
        shares: How often each is taken, relative to the others; all positive.
        length: Number of items of an epoch.

    Raises:
        ValueError: There is not one positive share for each data set, or a data set is empty.
    """

    def __init__(
        self, datasets: Sequence[Mapping[str, Any]], shares: Sequence[float], length: int
    ) -> None:
        if len(shares) != len(datasets) or not all(share > 0 for share in shares):
            raise ValueError(
                f"shares must be one positive number for each of {len(datasets)} data sets, got "
                f"{list(shares)}"
            )
        self.datasets: list[Any] = [instantiate_from_config(block) for block in datasets]
        if empty := [b["target"] for b, d in zip(datasets, self.datasets, strict=True) if not d]:
            raise ValueError(f"the data set {empty[0]} is empty")
        self.shares = torch.tensor(shares, dtype=torch.float)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        range(self.length)[index]  # an IndexError ends an iteration
        dataset = self.datasets[int(torch.multinomial(self.shares, 1))]
        item = dataset[int(torch.randint(len(dataset), ()))]
        return {"image": item["image"]}
