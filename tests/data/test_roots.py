"""Locations of data sets, and errors that name what is missing."""

from pathlib import Path

import pytest

from taming.data.roots import data_root, read_list, require, resolve


def test_configuration_wins_over_environment_over_default(monkeypatch):
    monkeypatch.delenv("TAMING_DATA", raising=False)
    assert data_root() == Path("data")
    assert data_root(default="/cache") == Path("/cache")
    monkeypatch.setenv("TAMING_DATA", "/environment")
    assert data_root(default="/cache") == Path("/environment")
    assert data_root("/config") == Path("/config")


def test_paths_that_start_with_data_follow_the_environment(monkeypatch):
    monkeypatch.delenv("TAMING_DATA", raising=False)
    assert resolve("data/coco/a") == Path("data/coco/a")
    monkeypatch.setenv("TAMING_DATA", "/environment")
    assert resolve("data/coco/a") == Path("/environment/coco/a")
    assert resolve("mine/coco") == Path("mine/coco")
    assert resolve("/data/coco") == Path("/data/coco")


def test_the_error_names_what_is_missing_its_source_and_its_place(tmp_path):
    assert require(tmp_path, "it", "there") == tmp_path
    with pytest.raises(FileNotFoundError) as caught:
        require(tmp_path / "faces", "the faces", "https://faces.org")
    message = str(caught.value)
    assert f"{tmp_path}/faces does not exist: get the faces from https://faces.org" in message
    assert "TAMING_DATA" in message


def test_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeffa.png\n\n b c.png \n", encoding="utf-8")
    assert read_list(path) == ["a.png", "b c.png"]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"list .*list.txt is empty"):
        read_list(path)
    with pytest.raises(FileNotFoundError, match="get the list none.txt from https://github.com"):
        read_list(tmp_path / "none.txt")
