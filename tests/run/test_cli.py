"""Every flag of the original and of the current Trainer works; mistakes end in one line."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from taming.run.cli import choose_device, run
from taming.run.options import _TRAINER_HELP, parse_arguments


def test_defaults_are_the_originals():
    options = parse_arguments([])
    assert (options.seed, options.train, options.no_test, options.scale_lr) == (
        23,
        False,
        False,
        True,
    )
    assert (options.base, options.name, options.resume, options.postfix) == ([], "", "", "")
    assert options.trainer == {} and options.dotlist == []


def test_the_originals_command_line():
    options = parse_arguments(
        ["--base", "a.yaml", "b.yaml", "-t", "True", "--gpus", "0,", "-n", "run", "-f", "_x"]
        + ["-p", "proj", "-d", "-s", "3", "--no-test", "model.params.n_embed=64"]
        + ["--max_epochs", "7"]
    )
    assert options.base == ["a.yaml", "b.yaml"]
    assert (options.name, options.postfix, options.project, options.seed) == (
        "run",
        "_x",
        "proj",
        3,
    )
    assert options.train and options.debug and options.no_test
    assert options.trainer == {"gpus": "0,", "max_epochs": 7}
    assert options.dotlist == ["model.params.n_embed=64"]


def test_several_base_flags_add_up():
    assert parse_arguments(["-b", "a", "b", "-t", "-b", "c"]).base == ["a", "b", "c"]


def test_overrides_may_stand_anywhere():
    argv = ["-t", "a.b=1", "--fast_dev_run", "data={target: main.X, params: {k: v=1}}", "-b", "c"]
    options = parse_arguments(argv)
    assert options.dotlist == [argv[1], argv[3]]
    assert options.train is True and options.trainer == {"fast_dev_run": True}


def test_the_value_of_a_flag_is_no_override():
    argv = ["-t", "x.y=1", "-n", "beta=0.25", "-f", "_lr=1e-4", "-b", "beta=0.25", "-b", "lr=0.1"]
    options = parse_arguments(argv)
    assert (options.name, options.postfix) == ("beta=0.25", "_lr=1e-4")
    assert options.dotlist == ["x.y=1", "beta=0.25", "lr=0.1"]
    assert options.train and options.base == []


@pytest.mark.parametrize("name", set(inspect.signature(pl.Trainer).parameters))
def test_every_trainer_argument_is_a_flag(name):
    if name in ("callbacks", "plugins"):  # objects, which YAML describes
        return
    value = "7" if name == "max_time" else 7
    assert parse_arguments([f"--{name}", "7"]).trainer == {name: value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("100", 100), ("1e-4", 1e-4), ("0,1", "0,1"), ("-1", -1), ("false", False), ("null", None)]
    + [("bf16-mixed", "bf16-mixed"), ("[0,1]", [0, 1]), ("00:01:00:00", "00:01:00:00")],
)
def test_values_are_yaml(text, value):
    assert parse_arguments(["--devices", text]).trainer == {"devices": value}


@pytest.mark.parametrize("text", ["12:00:00:00", "00:12:00:00"])
def test_times_are_text(text):
    assert parse_arguments(["--max_time", text]).trainer == {"max_time": text}
    assert parse_arguments(["--max_time", "{hours: 2}"]).trainer == {"max_time": {"hours": 2}}


@pytest.mark.parametrize("text", ["true", "Yes", "1", "t"])
def test_switches(text):
    assert parse_arguments(["-t", text]).train is True
    assert parse_arguments(["--scale_lr", "false"]).scale_lr is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_step", "3"], "flag --max_step; .*'--max_steps'"),
        (["--gpu", "0,"], "flag --gpu; .*'--gpus'"),
        (["-t", "maybe"], "true or false, .*'maybe'"),
        (["-b", "a.yaml", "-t", "true", "stray"], "argument 'stray'"),
        (["-n", "x", "-r", "logs/y"], "give one"),
        (["-s", "x"], "invalid int value"),
    ],
)
def test_mistakes_end_with_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as raised:
        parse_arguments(argv)
    captured = capsys.readouterr()
    assert raised.value.code == 2 and captured.out == ""
    assert re.search(message, captured.err) and captured.err.count("\n") == 1


@pytest.mark.reported(6)
def test_help_lists_the_common_flags_and_hides_old_ones(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for flag in ("-b", "-n", "-r", "-t", "--no_test", "-p", "-d", "-s", "-f", "--wandb", "--gpus"):
        assert f" {flag}" in text
    for name in _TRAINER_HELP:
        assert f"--{name}" in text
    assert "other argument of lightning.pytorch.Trainer" in " ".join(text.split())
    assert "--distributed_backend" not in text
    assert "PowerShell" in " ".join(text.split())


def test_help_describes_arguments_that_the_trainer_has() -> None:
    assert set(_TRAINER_HELP) - {"gpus"} <= set(inspect.signature(pl.Trainer).parameters)


def test_numbers_keep_their_kind() -> None:
    arguments = "-b x --max_steps 1e3 --limit_val_batches 1.0 --max_epochs=-1 --fast_dev_run"
    trainer = parse_arguments(arguments.split()).trainer
    expected = {"max_steps": 1e3, "limit_val_batches": 1.0, "max_epochs": -1, "fast_dev_run": True}
    assert trainer == expected
    assert {n: type(v) for n, v in trainer.items()} == {n: type(v) for n, v in expected.items()}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--max_steps", "--max_steps: expected one argument"),
        ("--devices [0", r"--devices: .*YAML.*'\[0'"),
        ("--default_root_dir", "--default_root_dir: expected one argument"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_flag(flags: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(f"-b x {flags}".split())
    assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "tpu9", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{name}'"):
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
        f"import sys; sys.path.insert(0, {root!r}); from taming.run.cli import run; "
        f"sys.path.remove({root!r}); run(lambda: __import__('main').Experiment)"
    )
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
