"""Own images from lists and folders, and errors for unsuitable ones."""

import numpy as np
import pytest
from PIL import Image

from taming.data.custom import CustomTest, CustomTrain, ImageFolder, find_files
from taming.signatures import parameters_of


def save(path, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write_list(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def names(items):
    return [item["file_path_"].rsplit("/", 1)[-1] for item in items]


def test_lists_name_absolute_and_relative_paths(tmp_path, monkeypatch):
    work, lists = tmp_path / "work", tmp_path / "lists"
    for path in (work / "here.png", lists / "there.png", lists / "here.png", tmp_path / "any.png"):
        save(path)
    monkeypatch.chdir(work)
    listed = write_list(
        lists / "train.txt", "here.png", "", "  there.png ", str(tmp_path / "any.png")
    )
    for items in (CustomTrain(8, listed), CustomTest(8, listed)):
        assert [item["file_path_"] for item in items] == [
            "here.png",
            str(lists / "there.png"),
            str(tmp_path / "any.png"),
        ]
        assert items[0]["image"].shape == (8, 8, 3)


def test_lists_naming_missing_files_are_refused(tmp_path):
    save(tmp_path / "a.png")
    listed = write_list(tmp_path / "train.txt", "a.png", "", "gone.png", "lost.png")
    message = r"2 of the 3 files that .*train.txt names do not exist.*gone.png \(line 3\)"
    with pytest.raises(FileNotFoundError, match=message):
        CustomTrain(8, listed)


def test_lists_in_another_encoding_are_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a.png", encoding="utf-16")
    with pytest.raises(ValueError, match="list.txt is not in UTF-8"):
        CustomTrain(8, tmp_path / "list.txt")


def test_missing_and_empty_lists_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        CustomTest(8, str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="list of images .*empty.txt is empty"):
        CustomTest(8, write_list(tmp_path / "empty.txt", ""))


@pytest.mark.parametrize("kind", ["list", "folder"])
def test_images_smaller_than_the_crop(tmp_path, kind):
    save(tmp_path / "a.png")
    listed = write_list(tmp_path / "train.txt", "a.png")
    root = str(tmp_path)

    def build(**options):
        if kind == "list":
            return CustomTrain(16, listed, **options)
        return ImageFolder(root, 16, **options)

    with pytest.raises(ValueError, match="a.png: 12x10 .*16x16"):
        build(allow_upscale=False)[0]
    assert build(allow_upscale=True)[0]["image"].shape == (16, 16, 3)
    save(tmp_path / "b.png", (20, 20))
    write_list(tmp_path / "train.txt", "a.png", "b.png")
    assert names([build(allow_upscale=False, on_error="skip")[0]]) == ["b.png"]


def test_lists_enlarge_small_images_as_the_original_does(tmp_path):
    save(tmp_path / "a.png")
    listed = write_list(tmp_path / "train.txt", "a.png")
    for images in (CustomTrain(16, listed), CustomTest(16, listed)):
        assert images[0]["image"].shape == (16, 16, 3)


def test_folders_are_searched_in_order_without_hidden_and_other_files(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/3.webp", "0.png", ".hidden.png", ".thumbs/4.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert names(ImageFolder(str(tmp_path))) == ["0.png", "3.webp", "1.png", "2.JPG"]
    assert names(ImageFolder(str(tmp_path), recursive=False)) == ["0.png"]
    assert names(ImageFolder(str(tmp_path), extensions=[".webp"])) == ["3.webp"]


def test_linked_folders_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert names(ImageFolder(str(tmp_path / "root"))) == ["1.png"]


def test_a_file_that_several_paths_lead_to_is_found_once(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    given = ["b/../a/2.png", "a", "b", tmp_path / "a/1.png", "b/1.png"]
    assert list(map(str, find_files(given))) == ["b/../a/2.png", "a/1.png", "b/1.png"]


def test_splits_share_nothing_leave_nothing_out_and_never_move(tmp_path):
    def splits():
        root = str(tmp_path)
        return [
            set(ImageFolder(root, split=split, validation_fraction=0.3).labels["file_path_"])
            for split in ("train", "validation", None)
        ]

    for number in range(40):
        (tmp_path / f"{number}.png").touch()
    train, validation, everything = splits()
    assert not train & validation
    assert train | validation == everything
    assert 4 <= len(validation) <= 20
    for number in range(40, 60):
        (tmp_path / f"{number}.png").touch()
    later_train, later_validation, _ = splits()
    assert train < later_train
    assert validation < later_validation


def test_subfolders_are_classes_with_the_same_numbers_in_both_splits(tmp_path):
    for kind in ("dog", "cat", "owl"):
        for number in range(12):
            save(tmp_path / kind / "more" / f"{number}.png")
    for split in ("train", "validation"):
        items = ImageFolder(str(tmp_path), 8, split, validation_fraction=0.4, labels=True)
        assert items.classes == ["cat", "dog", "owl"]
        for item in items:
            assert isinstance(item["class_label"], np.int64)
            assert items.classes[item["class_label"]] == item["human_label"]
            assert f"/{item['human_label']}/" in item["file_path_"]


def test_labels_need_subfolders(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is directly in"):
        ImageFolder(str(tmp_path), labels=True)


def test_missing_and_imageless_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder .*nowhere does not exist"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no image \(\.jpg, .*\) "):
        ImageFolder(str(tmp_path))


def test_invalid_splits_are_refused(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="got 'val'"):
        ImageFolder(str(tmp_path), split="val")
    with pytest.raises(ValueError, match="between 0 and 1, got 5"):
        ImageFolder(str(tmp_path), split="train", validation_fraction=5)
    with pytest.raises(ValueError, match="the validation split of the 1 images below .* is empty"):
        ImageFolder(str(tmp_path), split="validation", validation_fraction=1e-9)


@pytest.mark.parametrize(("split", "fraction"), [("train", 1 - 1e-9), ("validation", 1e-9)])
def test_the_fraction_that_an_empty_split_proposes_fills_it(tmp_path, split, fraction):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="is empty") as raised:
        ImageFolder(str(tmp_path), split=split, validation_fraction=fraction)
    proposed = float(str(raised.value).partition("try ")[2].split()[0])
    assert len(ImageFolder(str(tmp_path), split=split, validation_fraction=proposed))


@pytest.mark.reported(24)
@pytest.mark.parametrize("option", [{"random_crop": True}, {"random_flip": True}])
def test_training_images_can_be_augmented(tmp_path, option):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    listed = write_list(tmp_path / "train.txt", "a.png")

    def kinds(items):
        return len({items[0]["image"].tobytes() for _ in range(20)})

    assert kinds(CustomTrain(8, listed)) == 1
    assert kinds(CustomTrain(8, listed, **option)) > 1
    assert kinds(CustomTrain(8, listed, random_scale=(1, 1.25))) > 1
    assert kinds(ImageFolder(str(tmp_path), 8, **option)) > 1


def test_a_misspelt_option_of_a_folder_is_known_to_be_one() -> None:
    names, is_open = parameters_of(ImageFolder)
    assert not is_open and {"channels", "background", "on_error"} <= names.keys()
