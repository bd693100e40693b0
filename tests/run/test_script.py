"""What scripts share: devices by name, and mistakes told in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taming.run.script import choose_device, run


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "tpu9", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here"):
            choose_device(name)


@pytest.mark.parametrize("mistake", [ValueError, FileNotFoundError])
def test_a_users_mistake_is_one_line_and_exit_2(mistake, capsys) -> None:
    def program() -> None:
        raise mistake("there is no such thing")

    with pytest.raises(SystemExit) as stop:
        run(program)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: there is no such thing\n")


def test_ctrl_c_is_one_line_and_exit_130(capsys) -> None:
    def program() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(program)
    assert stop.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.reported(3)
def test_programs_find_main_targets_from_any_folder(tmp_path) -> None:
    (tmp_path / "main.py").write_text("raise RuntimeError('a main.py of the user')")
    root = str(Path(__file__).resolve().parents[2])
    program = tmp_path / "programs/program.py"
    program.parent.mkdir()
    program.write_text(
        f"import sys; sys.path.insert(0, {root!r}); from taming.run.script import run; "
        f"sys.path.remove({root!r}); run(lambda: __import__('main').DataModuleFromConfig)"
    )
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
