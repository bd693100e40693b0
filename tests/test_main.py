"""The program from end to end, on support.models."""

import logging
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from reliability import configurations
from support.models import ToyModel

import main as program
from taming.run.options import parse_arguments
from taming.util import get_obj_from_str

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
model:
  base_learning_rate: 0.01
  target: support.models.ToyModel
  params: {monitor: val/loss}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: support.models.ToyData}
    validation: {target: support.models.ToyData}
lightning:
  callbacks: {image_logger: {params: {batch_frequency: 4}}}
  trainer: {max_epochs: 1, enable_model_summary: false, log_every_n_steps: 1}
"""
CPU = ["--accelerator", "cpu", "--progress_bar_refresh_rate", "0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a configuration ``toy.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(logging.getLogger("taming"), "handlers", [])
    (tmp_path / "toy.yaml").write_text(CONFIG)
    return tmp_path


def start(*argv, **environment):
    """Run main.py in a process of its own."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *argv],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def only_run(root="logs"):
    (run,) = Path(root).glob("*T*")
    return run


def last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def fails(argv, capsys):
    """Return the error message that the program ends with."""
    with pytest.raises(SystemExit) as raised:
        program.main(argv)
    assert raised.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def test_a_run_leaves_what_it_promises(folder):
    program.main(["-b", "toy.yaml", "-t", "-f", "_x", *CPU, "model.params.width=3"])
    run = only_run()
    assert run.name.endswith("_toy_x")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "epoch=000000.ckpt"}
    project, lightning = (OmegaConf.load(p) for p in sorted((run / "configs").iterdir())[::-1])
    assert project.model.params == {"monitor": "val/loss", "width": 3}
    assert lightning.lightning.trainer.accelerator == "cpu"
    assert lightning.lightning.trainer.enable_progress_bar is False
    assert (run / "images/train/inputs_gs-000004_e-000000_b-000003.png").is_file()
    assert (run / "images/val/inputs_gs-000004_e-000000_b-000000.png").is_file()
    (metrics,) = run.glob("csv/*/metrics.csv")
    assert "val/loss" in metrics.read_text() and list(run.glob("tensorboard/events*"))
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.02)


def test_resume_continues_and_keeps_the_best_three(folder, caplog):
    program.main(["-b", "toy.yaml", "-t", "-n", "a", *CPU])
    run = only_run()
    program.main(["-r", str(run), "-t", "--max_epochs", "3"])
    program.main(["-r", str(run / "checkpoints/last.ckpt"), "-t", "--max_epochs", "5"])
    assert only_run() == run and last(run)["global_step"] == 20
    assert len(list(run.glob("checkpoints/epoch=*"))) == 3
    assert len(list(run.glob("configs/*-project.yaml"))) == 3
    assert "learning rates stored there" in caplog.text


@pytest.fixture
def run(folder):
    """A run of one epoch, four steps."""
    program.main(["-b", "toy.yaml", "-t", "-n", "a", *CPU, "--limit_val_batches", "1"])
    return only_run()


def saved(run):
    """Return the names and the whole text of a run's configurations."""
    files = sorted((run / "configs").iterdir())
    return [file.name for file in files], "".join(file.read_text() for file in files)


@pytest.mark.parametrize(
    ("trial", "steps"),
    [
        (["--fast_dev_run"], 0),
        (["model.params.fail_at=4"], 0),  # a mistake: it fails in the first step
        (["data.params.train.params.size=0"], 0),
        (["--limit_train_batches", "1", "--profiler", "simple"], 1),
        (["lightning.trainer.limit_train_batches=0.3", "--detect_anomaly"], 1),
    ],
)
def test_what_was_tried_on_a_resume_does_not_stay(run, trial, steps):
    before = saved(run)
    assert "limit_val_batches" not in before[1]  # it was tried on the first start
    with suppress(SystemExit):
        program.main(["-r", str(run), "-t", "--max_epochs", "2", *trial])
    assert last(run)["global_step"] == 4 + steps
    assert (saved(run) == before) == (steps == 0)
    for word in ("dev_run", "limit", "profiler", "anomaly", "fail", "size"):
        assert word not in saved(run)[1].replace("batch_size", "")
    program.main(["-r", str(run), "-t", "--max_epochs", "3"])
    assert last(run)["global_step"] == (8 + steps if steps else 12)


def test_show_prints_what_would_be_used_and_where_it_comes_from(run, capsys):
    program.main(["-r", str(run), "-t", "--max_epochs", "2", "model.params.width=2"])
    Path("more.yaml").write_text("data: {params: {batch_size: 1}}")
    files = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        argv = ["-r", str(run), "-b", "more.yaml", "--show", "--max_epochs", "3"]
        program.main([*argv, "--limit_train_batches", "7"])
    assert not stop.value.code and sorted(run.rglob("*")) == files
    text = capsys.readouterr().out
    first, second = (name for name in saved(run)[0] if "project" in name)
    for line in (
        rf"monitor: val/loss  # .*/{first}",
        rf"width: 2  # .*/{second}",
        "batch_size: 1  # more.yaml",
        "max_epochs: 3  # command line",
        "limit_train_batches: 7  # command line",
    ):
        assert re.search(line, text), line
    shown = OmegaConf.create(text)
    assert shown.model.params == {"monitor": "val/loss", "width": 2}
    assert "limit_train_batches" not in shown.lightning.trainer


def test_show_prints_what_a_run_would_be_built_from(folder, capsys):
    argv = ["-b", "custom_loopy_vqgan", "-t", "lightning.modelcheckpoint.params.save_top_k=2"]
    argv += ["model.params.quantizer_config.target=taming.modules.vqvae.quantize.VectorQuantizer2"]
    argv += ["model.params.quantizer_config.params.beta=1", "lightning.trainer.max_steps=1e3"]
    with pytest.raises(SystemExit) as stop:
        program.load(parse_arguments([*argv, "--show"]))
    text = capsys.readouterr().out
    assert not stop.value.code and not Path("logs").exists()
    shown, built = OmegaConf.create(text), program.load(parse_arguments(argv))
    assert shown == {"model": built.model, "data": built.data, "lightning": built.lightning}
    assert shown.model.params.quantizer_config.params == {"beta": 1}
    assert "max_steps: 1000  # command line" in text
    assert "ModelCheckpoint  # default" in text
    fails([*argv, "--show", "model.params.n_embd=3"], capsys)


def test_a_trial_of_a_new_run_leaves_nothing(folder):
    program.main(["-b", "toy.yaml", "-t", *CPU, "--fast_dev_run"])
    assert os.listdir() == ["toy.yaml"]


def test_resume_from_checkpoint_in_a_new_run(folder):
    program.main(["-b", "toy.yaml", "-t", "-n", "a", *CPU])
    old = only_run()
    argv = ["-b", "toy.yaml", "-t", "-n", "b", *CPU, "--max_epochs", "2"]
    program.main([*argv, "--resume_from_checkpoint", str(old / "checkpoints/last.ckpt")])
    (new,) = Path("logs").glob("*_b")
    assert last(new)["global_step"] == 8 and last(old)["global_step"] == 4
    (old / "checkpoints/last.ckpt").unlink()
    program.main(["-r", str(new), "-t", "--max_epochs", "3"])
    assert last(new)["global_step"] == 12


def test_resume_does_not_need_what_the_model_started_from(folder):
    program.main(["-b", "toy.yaml", "-t", "-n", "a", *CPU])
    start = only_run() / "checkpoints/last.ckpt"
    program.main(["-b", "toy.yaml", "-t", "-n", "b", *CPU, f"model.params.ckpt_path={start}"])
    start.unlink()
    (run,) = Path("logs").glob("*_b")
    program.main(["-r", str(run), "-t", "--max_epochs", "2"])
    assert last(run)["global_step"] == 8


def test_stops_at_max_steps_with_a_checkpoint(folder):
    program.main(["-b", "toy.yaml", "-t", *CPU, "--max_steps", "3", "--max_epochs", "-1"])
    run = only_run()
    assert last(run)["global_step"] == 3
    program.main(["-r", str(run), "-t", "--max_steps", "9"])
    assert last(run)["global_step"] == 9


@pytest.mark.parametrize("flag", ["--max_steps", "--max_epochs"])
def test_a_finished_run_says_what_lets_it_go_on(folder, caplog, flag):
    steps = ["--max_epochs", "-1", "--max_steps", "3"] if flag == "--max_steps" else []
    shown = "lightning.trainer.enable_model_summary=true"
    caplog.set_level(logging.INFO, "lightning.pytorch")  # benchmarks quiet it in their processes
    program.main(["-b", "toy.yaml", "-t", *CPU, *steps, shown])
    assert "parameters, of which" in caplog.text and "FLOPs" not in caplog.text
    assert "a larger" not in caplog.text and "GPU available" in caplog.text
    program.main(["-r", str(only_run()), "-t"])
    assert f"; a larger {flag} lets it go on" in caplog.text


def test_a_checkpoint_that_does_not_fit_is_a_mistake(folder, capsys):
    program.main(["-b", "toy.yaml", "-t", *CPU])
    error = fails(["-r", str(only_run()), "-t", "model.params.width=9"], capsys)
    assert error.startswith(str(only_run() / "checkpoints/last.ckpt does not fit"))
    assert "net.0.weight" in error and error.count("\n") == 1


def test_learning_rate_as_it_is(folder):
    program.main(["-b", "toy.yaml", "-t", *CPU, "--scale_lr", "false"])
    rate = last(only_run())["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.01)


@pytest.mark.reported(9)
def test_tests_only_what_can_be_tested(folder, capsys):
    tested = "model.target=support.models.ToyTestedModel"
    program.main(["-b", "toy.yaml", *CPU, tested])
    assert "test/loss" not in capsys.readouterr().out
    with_set = [tested, "data.params.test.target=support.models.ToyData"]
    program.main(["-b", "toy.yaml", *CPU, *with_set])
    assert "test/loss" in capsys.readouterr().out
    program.main(["-b", "toy.yaml", "--no-test", *CPU, *with_set])
    assert "test/loss" not in capsys.readouterr().out
    assert not list(Path("logs").glob("*/configs"))


def test_wandb_gets_the_pictures_offline(folder):
    pytest.importorskip("wandb")
    result = start("-b", "toy.yaml", "-t", "--wandb", *CPU, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert list(only_run().glob("wandb/offline-run-*/files/media/images/train/inputs_*.png"))


@pytest.mark.reported(21)
def test_two_processes_share_one_run(folder):
    argv = ["-b", "toy.yaml", "-t", "data.params.batch_size=1"]
    result = start(*argv, *CPU, "--devices", "2", "--strategy", "ddp")
    assert result.returncode == 0, result.stderr
    run = only_run()
    assert last(run)["global_step"] == 4
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.02)
    assert len(list(run.glob("configs/*.yaml"))) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-b", "none.yaml"], "no .*file none.yaml"),
        (["-r", "."], r"^\. is not a run"),
        (["-r", "logs/none"], "logs/none does not exist"),
        (["-r", "photos"], "photos is a model without .*with -b, and .*ckpt_path=.*safetensors"),
        (["-b", "toy.yaml", "--devices", "9999"], r"9999 devices .* CPU cores; pass --devices"),
        (["-b", "toy.yaml", "--gpus", "97,98"], r"\[97, 98\] .* GPUs are visible .*--gpus 0"),
        (["-b", "toy.yaml", *CPU, "--devices", "zero"], "`devices` selected with"),
        (["-b", "toy.yaml", *CPU, "--max_epochs", "two"], "trainer.max_epochs must be int.* 'two'"),
        (
            ["-b", "toy.yaml", "model.params.width=${lightning.trainer.max_steps}"]
            + [*CPU, "--max_steps", "abc"],
            r"^command line: lightning.trainer.max_steps must be int",
        ),
        (["-b", "toy.yaml", *CPU, "--max_epochs"], "max_epochs: expected one argument"),
        (["-b", "toy.yaml", *CPU, "--max_epoch", "2"], "--max_epoch; .*'--max_epochs'"),
        (["-b", "toy.yaml", "model.params.widht=3"], "model.params.widht: .*ToyModel.* 'width'"),
        (["-b", "toy.yaml", "data.params.batch_size=two"], "batch_size must be int, .*'two'"),
        (["-b", "toy.yaml", "data.params.batch_size=0"], "batch_size must be at least 1, .*0"),
        (["-b", "toy.yaml", *CPU, "data.params.train.params.size=0"], "size must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, argv, message):
    error = fails([*argv, "-t"], capsys)
    assert re.search(message, error) and error.count("\n") == 1
    assert os.listdir() == ["toy.yaml"]


def test_a_folder_of_pictures_that_is_not_there_comes_before_a_run(folder, capsys):
    block = "{target: taming.data.custom.ImageFolder, params: {root: path/to/images}}"
    with pytest.raises(SystemExit):
        program.main(["-b", "toy.yaml", "-t", *CPU, f"data.params.train={block}"])
    shown = capsys.readouterr().err
    assert "run's folder" not in shown and "Seed set" not in shown
    assert shown.endswith("path/to/images does not exist; set data.params.train.params.root\n")


@pytest.mark.filterwarnings("ignore")
def test_mutated_configurations_train_or_are_refused_in_one_line(tiny_runs, tmp_path):
    names = ["demo/loopy_vqgan.yaml", "cifar10_two_level_transformer.yaml"]
    recipes = configurations.bases(tiny_runs, names)
    for number in range(30):
        draw = random.Random(number)
        mutant = configurations.mutate(recipes[draw.choice(names)], draw)
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, text = configurations.train(mutant, folder)
        assert outcome in ("trained", "refused"), (mutant.kind, mutant.path, text)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(folder, capsys, workers):
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    for name in "abc":
        image.save(f"{name}.jpg")
    Path("c.jpg").write_bytes(Path("a.jpg").read_bytes()[:-900])
    Path("list.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    data = "{target: taming.data.custom.CustomTrain, "
    data += "params: {size: 4, training_images_list_file: list.txt}}"
    argv = ["-b", "toy.yaml", "-t", *CPU, f"data.params.num_workers={workers}"]
    error = fails([*argv, f"data.params.train={data}"], capsys)
    assert error.startswith("image c.jpg: ") and error.count("\n") == 1


def test_a_monitor_that_nobody_logs_is_named_before_the_first_epoch(folder, capsys):
    error = fails(["-b", "toy.yaml", "-t", *CPU, "model.params.monitor=val/los"], capsys)
    assert re.search("monitor 'val/los'; .*'val/loss'", error) and error.count("\n") == 1
    assert os.listdir() == ["toy.yaml"]


def test_an_error_in_training_is_raised(folder):
    with pytest.raises(OSError, match="toy"):
        program.main(["-b", "toy.yaml", "-t", *CPU, "model.params.fail_at=2"])
    assert last(only_run())["global_step"] == 2


def test_an_interrupted_run_says_where_it_is_and_how_it_goes_on(folder, capsys, monkeypatch):
    step = ToyModel.training_step

    def interrupted(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ToyModel, "training_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        program.main(["-b", "toy.yaml", "-t", *CPU])
    run, shown = only_run(), capsys.readouterr().err
    assert stop.value.code == 130 and last(run)["global_step"] == 1
    assert f"the run is saved in {run}; go on with: python main.py -r {run} -t" in shown


def test_a_run_that_is_interrupted_before_its_first_step_says_so(folder, capsys, monkeypatch):
    def interrupted(self, *_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ToyModel, "validation_step", interrupted)
    with pytest.raises(SystemExit):
        program.main(["-b", "toy.yaml", "-t", *CPU])
    assert "nothing is kept" in capsys.readouterr().err and os.listdir() == ["toy.yaml"]


def test_debug_opens_a_debugger_and_keeps_the_run_apart(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("pdb.post_mortem", seen.append)
    with pytest.raises(OSError):
        program.main(["-b", "toy.yaml", "-t", "-d", *CPU, "model.params.fail_at=2"])
    assert len(seen) == 1 and only_run("logs/debug_runs").is_dir()


@pytest.mark.reported(3)
@pytest.mark.parametrize("name", program.__all__)
def test_what_configurations_name_is_there(name):
    assert get_obj_from_str(f"main.{name}") is getattr(program, name)


def test_everything_else_is_not():
    with pytest.raises(AttributeError, match="nothing"):
        _ = program.nothing
