"""Pictures show the values they are given."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from taming.data.preprocessing import View, decode_image, to_unit_range
from taming.models.first_stage import length_heat_map
from taming.pictures import arrange, load_image, save_picture, side_by_side, to_picture, to_tensor


def test_values_survive_a_file(tmp_path) -> None:
    levels = torch.arange(3 * 4 * 5).reshape(3, 4, 5) * 4
    save_picture(levels / 127.5 - 1, tmp_path / "new" / "a.png")
    read = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    assert np.array_equal(read, levels.permute(1, 2, 0).numpy())


def test_values_out_of_range_are_clamped() -> None:
    picture = np.asarray(to_picture(torch.tensor([-9.0, 0.0, 9.0])[:, None, None]))
    assert picture.tolist() == [[[0, 128, 255]]]


def test_pictures_stand_side_by_side() -> None:
    left, right = -torch.ones(3, 4, 4), torch.zeros(3, 4, 4)
    both = side_by_side(left, right)
    assert both.shape == (3, 8, 14)
    assert torch.equal(both[:, 2:6, 2:6], left) and torch.equal(both[:, 2:6, 8:12], right)


def test_tiles_of_any_kind_of_picture() -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    mixed = [images[0].movedim(0, -1).numpy(), images[1]]
    torch.testing.assert_close(arrange(mixed, 2), arrange(images, 2))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tiles_are_torchvisions_grid(count: int) -> None:
    images = torch.rand(count, 3, 4, 5)
    assert torch.equal(arrange(images, 3), make_grid(images, 3, padding=2, pad_value=1.0))


def test_a_picture_has_the_values_that_data_sets_give(tmp_path) -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    Image.fromarray(levels).save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png")
    wanted = torch.from_numpy(to_unit_range(pixels)).movedim(-1, 0)
    assert torch.equal(to_tensor(levels), wanted)
    assert torch.equal(load_image(tmp_path / "a.png"), wanted)
    view = View((9, 9), 0, 0, 9, 9).apply(pixels, antialias=True)
    wanted = torch.from_numpy(to_unit_range(view)).movedim(-1, 0)
    assert torch.equal(load_image(tmp_path / "a.png", size=9), wanted)


def test_deeper_sites_are_brighter() -> None:
    picture = length_heat_map(torch.tensor([[[1, 2, 3, 4]]]), 4, (3, 12))
    assert picture.shape == (1, 3, 3, 12)
    brightness = picture.mean(dim=(0, 1, 2))[::3]
    assert (brightness.diff() > 0).all()
    assert torch.equal(picture[..., 0], picture[..., 2])
    share = np.linspace(0, 1, 101)
    inferno = torch.from_numpy(matplotlib.colormaps["inferno"](share)[:, :3] * 2 - 1).float()
    colours = length_heat_map(torch.arange(1, 102)[None, None], 101, (1, 101))[0, :, 0].T
    torch.testing.assert_close(colours, inferno, atol=0.07, rtol=0)


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    image = torch.zeros(3, 4, 4)
    save_picture(image, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(self, file, **_):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="a.png cannot be saved.*No space"):
        save_picture(image + 1, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len([*tmp_path.iterdir()]) == 1
