"""The command ``taming``: it runs the programs beside the package, and finds recipes by name."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from taming import __main__ as command
from taming.run.config import load_config
from taming.run.sources import ConfigError, recipes
from taming.util import MAIN_NAMES, get_obj_from_str, home, instantiate_from_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without the repository's main.py, as a working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    monkeypatch.delitem(sys.modules, "main", raising=False)
    return tmp_path


def test_every_program_is_a_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    listed = capsys.readouterr().out
    command.main(["--help"])
    assert capsys.readouterr().out == listed
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [*command.programs()]
    assert {f"{name}.py" for name, _ in lines[1:]} == {p.name for p in ROOT.glob("scripts/*.py")}
    assert all(len(text) > 10 and "``" not in text and "scripts/" not in text for _, text in lines)


def test_a_wrong_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["reconstuct", "photo.jpg"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "'reconstuct'" in error and "'reconstruct'" in error


def test_a_command_runs_its_program_with_the_arguments_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "main.py").write_text("raise SystemExit(7)")
    (tmp_path / "scripts/copy.py").write_text("import sys; print(__name__, *sys.argv)")
    monkeypatch.setattr(command, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["taming", "copy", "-a", "b=c"])
    command.main()
    assert capsys.readouterr().out == f"__main__ {tmp_path / 'scripts/copy.py'} -a b=c\n"
    with pytest.raises(SystemExit) as stop:
        command.main(["train"])
    assert stop.value.code == 7


def test_the_module_is_the_command_and_imports_nothing_slow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "taming", "train", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: taming train -b")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "taming.util" in imported and not imported & {"torch", "numpy", "lightning", "PIL"}


@pytest.mark.parametrize("name", command.programs())
def test_a_usage_is_that_of_the_command_or_of_the_file(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = command.programs()[name]
    own = "taming demo" if name == "demo" else path.name
    for argv, start in ((["taming", name], command.main), ([str(path)], None)):
        monkeypatch.setattr(sys, "argv", [*argv, "--help"])
        with pytest.raises(SystemExit) as stop:
            start() if start else runpy.run_path(str(path), run_name="__main__")
        shown, text = f"taming {name}" if start else own, capsys.readouterr().out
        assert not stop.value.code and text.startswith(f"usage: {shown} ")
        named = re.findall(r"scripts/\w+\.py|python -m taming\.demo", text)
        assert not (named and start), (
            named
        )  # there are no such files where the package is installed


def test_a_recipe_is_found_by_name_and_a_file_goes_first(elsewhere: Path) -> None:
    assert {*recipes().values()} == {*home().glob("configs/**/*.yaml")}
    for name in ("photos", "demo/loopy_vqgan"):
        assert load_config([f"{name}.yaml"]).values == load_config([name]).values
        loaded = load_config([name])
        assert loaded.values == load_config([ROOT / f"configs/{name}.yaml"]).values
        assert loaded.origin("model.target") == str(recipes()[name])
    (elsewhere / "photos").write_text("model: {target: own.Model}")
    assert load_config(["photos"]).values == {"model": {"target": "own.Model"}}


@pytest.mark.parametrize("name", ["photo", "photos.yml", "../configs/photos", ""])
def test_an_unknown_recipe_lists_those_there_are(elsewhere: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"demo/loopy_vqgan.* photos"):
        load_config([name])


def test_the_nearest_recipe_comes_first(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"custom_smal; did you mean 'custom_small'\? .*cifar10"):
        load_config(["custom_smal"])


@pytest.mark.parametrize("name", MAIN_NAMES)
def test_names_of_main_need_no_clone(elsewhere: Path, name: str) -> None:
    found = get_obj_from_str(name)
    assert found is get_obj_from_str(MAIN_NAMES[name]) and "main" not in sys.modules
    assert found.__name__ == name.removeprefix("main.")


def test_other_names_of_main_are_refused_with_those_there_are(elsewhere: Path) -> None:
    with pytest.raises(ValueError, match="no module 'main'.*main.DataModuleFromConfig"):
        instantiate_from_config({"target": "main.DataModule"})
