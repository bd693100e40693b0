"""Batches: collated as torch does, except for values that cannot be stacked."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from taming.data.helper_types import Annotation
from taming.data.utils import custom_collate
from taming.util import DataError

ITEMS = [
    {
        "image": np.full((2, 2, 3), n, np.float32),
        "tokens": torch.tensor([n, n]),
        "class_label": np.int64(n),
        "human_label": f"thing {n}",
        "caption": [f"a {n}"],
        "box": (0.0, 0.5, float(n), 1.0),
        "more": {"flag": bool(n)},
    }
    for n in range(3)
]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and all(map(same, a, b))
    return a == b


@pytest.mark.reported(1)
def test_what_torch_can_stack_is_stacked_as_torch_does():
    assert same(custom_collate(ITEMS), default_collate(ITEMS))
    assert torch.equal(custom_collate([torch.zeros(2), torch.ones(2)])[1], torch.ones(2))


@pytest.mark.reported(1)
@pytest.mark.parametrize("counts", [(1, 3), (0, 2), (2, 0)])
def test_annotations_stay_lists(counts):
    one = Annotation(area=1, image_id="1", bbox=(0, 0, 1, 1), category_no=0, category_id="0")
    items = [{"annotations": [one] * count, "n": count} for count in counts]
    batch = custom_collate(items)
    assert [len(objects) for objects in batch["annotations"]] == list(counts)
    assert batch["n"].tolist() == list(counts)


def test_missing_values_stay_lists():
    assert custom_collate([{"license": None}, {"license": 4}]) == {"license": [None, 4]}


def test_pictures_of_different_sizes_are_refused():
    batch = [{"image": np.zeros((side, 4, 3), np.float32)} for side in (4, 5)]
    with pytest.raises(DataError, match=r"'image' .*\(4, 4, 3\) and \(5, 4, 3\).* size"):
        custom_collate(batch)


def test_arrays_of_different_shapes_are_named():
    items = [{"image": np.zeros((4, 4, 3)), "more": {"box": torch.zeros(n)}} for n in (3, 5)]
    with pytest.raises(DataError, match=r"arrays 'box' .*\(3,\) and \(5,\)"):
        custom_collate(items)
