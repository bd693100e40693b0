"""Portraits, from a miniature in the layout of the original."""

import numpy as np
import pytest
from support.data import write_faces

from taming.data import faceshq
from taming.data.base import ImagePaths


@pytest.fixture
def root(tmp_path):
    write_faces(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("split", ["Train", "Validation"])
@pytest.mark.parametrize("name", ["CelebAHQ", "FFHQ"])
def test_one_set(root, name, split):
    items = getattr(faceshq, name + split)(8, root=root)
    assert [item["file_path_"].rsplit("/", 1)[1].split(".")[0] for item in items] == [
        f"{split.lower()}{n}" for n in (0, 1)
    ]
    assert items[0]["image"].shape == (8, 8, 3)
    assert list(getattr(faceshq, name + split)(8, keys=["image"], root=root)[0]) == ["image"]


@pytest.mark.parametrize("split", ["Train", "Validation"])
def test_both_sets(root, split):
    items = getattr(faceshq, f"FacesHQ{split}")(8, root=root)
    assert [item["class"] for item in items] == [0, 0, 1, 1]
    path = items[2]["file_path_"]
    np.testing.assert_array_equal(items[2]["image"], ImagePaths([path], 8)[0]["image"])
    assert "coord" not in items[0]


@pytest.mark.parametrize("split", ["Train", "Validation"])
def test_coordinates_are_those_of_the_pixels_that_a_crop_shows(root, split):
    items = getattr(faceshq, f"FacesHQ{split}")(8, crop_size=5, coord=True, root=root)
    whole = getattr(faceshq, f"FacesHQ{split}")(8, coord=True, root=root)[3]
    np.testing.assert_array_equal(whole["coord"].flatten(), np.arange(64, dtype=np.float32) / 64)
    corners = set()
    for _ in range(20):
        item = items[3]
        assert item["coord"].shape == (5, 5, 1)
        assert item["coord"].dtype == np.float32
        places = (item["coord"] * 64).astype(int)[..., 0]
        np.testing.assert_array_equal(item["image"], whole["image"].reshape(64, 3)[places])
        corners.add(places[0, 0])
    if split == "Validation":
        assert corners == {8 + 1}
    else:
        assert len(corners) > 1


def test_errors_for_missing_parts_name_their_source(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="celebahq from https://github.com/tkarras"):
        faceshq.CelebAHQTrain(8, root=str(tmp_path / "nowhere"))
    (tmp_path / "ffhqtrain.txt").unlink()
    with pytest.raises(FileNotFoundError, match="get the list ffhqtrain.txt from https://github"):
        faceshq.FacesHQTrain(8, root=root)
