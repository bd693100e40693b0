"""Picture files: one meaning for each kind, whatever the entry point, and a name in each error."""

import io
import os
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from reliability.pictures import REFUSED, RIGHT, WRONG, files, judge, kinds, save_png

from taming.data.base import ImagePaths
from taming.data.hub import ParquetImages
from taming.decoding import decode_image, rgb_of, to_mode
from taming.pictures import load_image, to_picture, to_tensor


def saved(path, pixels, **options):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_file_has_its_meaning_or_is_refused(kind, tmp_path):
    file = kinds()[kind](np.random.default_rng(0))
    path = tmp_path / f"picture{file.suffix}"
    path.write_bytes(file.content)
    wanted = RIGHT if file.mean is not None else REFUSED
    assert judge(str(path), file, "none") == (wanted, "")


def test_damaged_files_are_refused_by_name(tmp_path):
    for number, (kind, damage, file) in enumerate(files(180, seed=3)):
        path = tmp_path / f"{number}{file.suffix}"
        path.write_bytes(file.content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, why = judge(str(path), file, damage)
        assert outcome != WRONG, (kind, damage, why)


def test_channels_are_converted_and_alpha_is_kept_or_composed(tmp_path):
    pixels = np.zeros((1, 3, 4))
    pixels[0] = (200, 100, 50, 255), (200, 100, 50, 51), (9, 9, 9, 0)
    path = saved(tmp_path / "a.png", pixels)
    half = [round((value * 51 + 255 * 204) / 255) for value in (200, 100, 50)]
    colours = decode_image(path)[:, 0].T.tolist()
    assert colours == [[200, 100, 50], half, [255, 255, 255]]
    black = decode_image(path, background="#000000")[:, 0].T.tolist()
    assert black == [[200, 100, 50], [40, 20, 10], [0, 0, 0]]
    grey = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in colours]
    assert decode_image(path, channels=1)[0, 0].tolist() == pytest.approx(grey, abs=1)
    assert decode_image(path, channels=2)[1, 0].tolist() == [255, 51, 0]
    alpha = decode_image(path, channels=4)[:, 0].T.tolist()  # nothing unseen is kept
    assert alpha == [[200, 100, 50, 255], [200, 100, 50, 51], [255, 255, 255, 0]]
    opaque = decode_image(saved(tmp_path / "b.png", pixels[..., :3]), channels=4)
    assert (opaque[3] == 255).all() and torch.equal(opaque[:3, 0, 0], torch.tensor([200, 100, 50]))


def test_an_opaque_picture_is_the_same_with_alpha_and_without(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    plain = decode_image(saved(tmp_path / "a.png", pixels))
    assert torch.equal(plain, torch.from_numpy(pixels).movedim(-1, 0))
    with_alpha = np.dstack([pixels, np.full((20, 30), 255, np.uint8)])
    assert torch.equal(decode_image(saved(tmp_path / "b.png", with_alpha)), plain)


def test_a_picture_of_the_caller_stays_as_it_is():
    png = save_png(np.full((2, 2, 1), 3), depth=4, colour=0, transparent=b"\x00\x03")
    image = Image.open(io.BytesIO(png))
    assert to_mode(image, 4).getpixel((0, 0)) == (255, 255, 255, 0)
    assert image.info["transparency"] == 3


def test_every_entry_point_turns_a_picture_upright(tmp_path, parquet):
    import pyarrow as pa
    import pyarrow.parquet as pq

    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    path = saved(tmp_path / "a.png", pixels, exif=exif)
    wanted = torch.from_numpy(np.rot90(pixels, -1).copy()).movedim(-1, 0)
    pq.write_table(pa.table({"img": [{"bytes": path.read_bytes()}]}), tmp_path / "a.parquet")
    found = [
        decode_image(path),
        decode_image(io.BytesIO(path.read_bytes())),
        *(decode_image(path, channels=4)[:3],),
        *((to_tensor(p) * 127.5 + 127.5).round().to(torch.uint8) for p in (path, Image.open(path))),
        (load_image(path) * 127.5 + 127.5).round().to(torch.uint8),
    ]
    for data in (ImagePaths([path]), ParquetImages(str(tmp_path / "a.parquet"), label_column=None)):
        image = torch.from_numpy(data[0]["image"]).movedim(-1, 0)
        found.append((image * 127.5 + 127.5).round().to(torch.uint8))
    assert all(torch.equal(one, wanted) for one in found)
    assert decode_image(path, upright=False).shape == (3, 8, 16)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert decode_image(tmp_path / name).flatten(1).float().mean(1).tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["a.npy", "pages.tif", "bands.tif", "planes.tif"])
def test_bands_of_many_channels(tmp_path, name):
    bands = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, bands)
    elif name == "pages.tif":
        pages = [Image.fromarray(bands[..., i]) for i in range(5)]
        pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_deflate")
    else:
        options = {"planarconfig": "contig" if name == "bands.tif" else "separate"}
        values = bands if name == "bands.tif" else bands.transpose(2, 0, 1)
        tifffile.imwrite(path, values, photometric="minisblack", **options)
    assert torch.equal(decode_image(path, channels=5), torch.from_numpy(bands).movedim(-1, 0))
    with pytest.raises(ValueError, match=rf"{name}: .*expected 7 channels, found 5"):
        decode_image(path, channels=7)


@pytest.mark.parametrize("name", ["a.png", "gone.tif", "empty.npy", "objects.npy"])
def test_what_has_no_bands_is_named(tmp_path, name):
    saved(tmp_path / "a.png", np.zeros((4, 4, 3)))
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match=name):
        decode_image(tmp_path / name, channels=5)


def test_large_pictures_need_a_higher_limit(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", np.zeros((10, 11, 3)))
    with pytest.raises(ValueError, match="a.png: .*11 x 10 pixels .*100.*max_pixels"):
        decode_image(path, max_pixels=100)
    assert decode_image(path, max_pixels=110).shape == (3, 10, 11)
    with pytest.raises(ValueError, match="a.png: .*max_pixels"):
        ImagePaths([path], max_pixels=100)[0]
    monkeypatch.setenv("TAMING_MAX_PIXELS", "100")
    with pytest.raises(ValueError, match="a.png: .*TAMING_MAX_PIXELS"):
        to_tensor(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses twice as many
    monkeypatch.setenv("TAMING_MAX_PIXELS", "110")
    assert to_tensor(path).shape == (3, 10, 11)
    assert Image.MAX_IMAGE_PIXELS == 20


def test_what_is_no_picture_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    saved(tmp_path / "script.eps", np.zeros((4, 4, 3)))
    (tmp_path / "noise.jpg").write_bytes(bytes([0, 0, 2] + 9 * [0] + [4, 0, 4, 0, 24, 0]) * 9)
    reasons = {"pipe.png": "not a file", "folder.png": "not a file", "script.eps": "EPS is not"}
    for name, reason in {**reasons, "noise.jpg": "TGA is not"}.items():
        with pytest.raises(ValueError, match=f"{name}: cannot be decoded .*{reason}"):
            decode_image(tmp_path / name)


def test_changed_pixels_of_a_png_are_noticed(tmp_path):
    path = saved(tmp_path / "a.png", np.full((30, 30, 3), 200), compress_level=0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.png: cannot be decoded.*checksum"):
        decode_image(path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_no_part_of_a_jpeg_2000_file_is_taken_for_the_whole(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 37, len(mode)), np.uint8)
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(tmp_path / "whole.jp2")
    decode_image(tmp_path / "whole.jp2")
    content = (tmp_path / "whole.jp2").read_bytes()
    for length in range(20, len(content), 20):
        (tmp_path / "part.jp2").write_bytes(content[:length])
        with pytest.raises(ValueError, match="part.jp2.*cannot be decoded"):
            decode_image(tmp_path / "part.jp2")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.bmp", "a.tif"])
def test_palettes_need_not_be_turned_upright(tmp_path, name):
    Image.new("RGB", (4, 4), "red").quantize(2).save(tmp_path / name)
    for upright in (False, True):
        colour = decode_image(tmp_path / name, upright)[:, 0, 0]
        assert colour.tolist() == pytest.approx([255, 0, 0], abs=1)


def test_home_stands_for_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "a.png", np.zeros((4, 4, 3)))
    assert to_tensor("~/a.png").shape == (3, 4, 4)


def test_colours():
    for colour in ("red", "#f00", "#ff0000", [255, 0, 0], (255, 0, 0)):
        assert rgb_of(colour) == (255, 0, 0)
    for wrong in ("reddish", "", [1, 2], [1, 2, 256], [-1, 0, 0], None, [0.5, 0, 0]):
        with pytest.raises(ValueError, match="expected a colour"):
            rgb_of(wrong)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_pictures_with_alpha_survive_a_file(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 6)) / 127.5 - 1
    if channels != 3:
        image[-1] = 1
    to_picture(image).save(tmp_path / "a.png")
    torch.testing.assert_close(to_tensor(tmp_path / "a.png", channels), image.float())
