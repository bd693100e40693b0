"""A mixture of data sets takes each as often as its share, the same for the same seed."""

from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from taming.data.mixture import Mixture


class Constant(Dataset):
    """Items with one value as their image."""

    def __init__(self, value: int, length: int) -> None:
        self.value, self.length = value, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"image": self.value * 1000 + range(self.length)[index], "class_label": 3}


def blocks(*lengths: int) -> list[dict]:
    return [
        {"target": f"{__name__}.Constant", "params": {"value": value, "length": length}}
        for value, length in enumerate(lengths)
    ]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taming.data.mixture.instantiate_from_config", build)


def build(block: dict) -> Constant:
    return Constant(**block["params"])


def test_each_is_taken_as_often_as_its_share_whatever_its_size():
    mixture = Mixture(blocks(500, 2), shares=[3, 1], length=2000)
    images = [mixture[number]["image"] for number in range(len(mixture))]
    counts = Counter(image // 1000 for image in images)
    assert 0.7 < counts[0] / len(images) < 0.8 and counts[0] + counts[1] == 2000
    assert {image for image in images if image >= 1000} == {1000, 1001}
    assert len(set(images)) > 400  # all items of the large one have a chance


def test_a_seed_repeats_the_items_and_only_images_are_kept():
    mixture = Mixture(blocks(50, 50), shares=[1, 2], length=20)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([mixture[number] for number in range(20)])
    assert runs[0] == runs[1] and set(runs[0][0]) == {"image"}


def test_iterating_ends_after_its_length():
    mixture = Mixture(blocks(5), shares=[1], length=7)
    assert len(list(islice(mixture, 20))) == 7
    assert mixture[-1] and pytest.raises(IndexError, mixture.__getitem__, 7)


@pytest.mark.parametrize("shares", [[1], [1, 0], [1, -1], [1, 1, 1]])
def test_shares_that_fit_no_data_set_are_refused(shares):
    with pytest.raises(ValueError, match="one positive number for each of 2 data sets"):
        Mixture(blocks(3, 3), shares, length=4)


def test_an_empty_data_set_is_named():
    with pytest.raises(ValueError, match="Constant is empty"):
        Mixture(blocks(3, 0), [1, 1], length=4)
