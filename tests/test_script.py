"""What scripts share: devices by name, and mistakes told in one line."""

import pytest
import torch

from taming.script import choose_device, run


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


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
