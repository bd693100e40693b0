"""A run's folder is found again, and so is the model that it left."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta

import pytest
import torch
from omegaconf import OmegaConf
from support.models import ToyModel

from taming.run.folder import SavedRun, data_from_run, model_from_run, without_starts
from taming.run.rundir import _RANK_VARIABLES, _RUN_VARIABLE, RunDir, is_first_process, run_name
from taming.run.sources import ConfigError

PROJECT = {
    "model": {
        "base_learning_rate": 0.1,
        "target": "support.models.ToyModel",
        "params": {"width": 5},
    },
    "data": {"target": "support.models.ToyDataModule"},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a saved configuration and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "logs" / "run")
    run.configs.mkdir(parents=True)
    run.checkpoints.mkdir()
    OmegaConf.save(OmegaConf.create(PROJECT), run.configs / "2024-project.yaml")
    torch.save({"state_dict": ToyModel(width=5).state_dict()}, run.last_checkpoint)
    return run


@pytest.mark.parametrize(
    ("name", "base", "postfix", "expected"),
    [
        ("", ["configs/vq.yaml", "b.yaml"], "", "vq"),
        ("mine", ["configs/vq.yaml"], "_x", "mine_x"),
        ("", [], "", "run"),
    ],
)
def test_names(name, base, postfix, expected):
    assert run_name(name, base, postfix) == expected


@pytest.fixture(autouse=True)
def first_process(monkeypatch):
    """No test leaves its run, or takes it for another's, in the environment."""
    for name in (*_RANK_VARIABLES, _RUN_VARIABLE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_runs_begun_in_one_second_do_not_meet(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = [*pool.map(lambda _: RunDir.new("a", tmp_path), range(8))]
    assert len({run.path for run in runs}) == 8
    for run in runs:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_a", run.path.name)
        assert run.path.is_dir()


@pytest.mark.parametrize(
    ("saved", "hours"), [([], 0), (["model"], 0), (["model", -3], 0), ([-5, 5, 2], 5)]
)
def test_a_start_is_newer_than_all_before_whatever_the_clock_says(tmp_path, saved, hours):
    run, now, form = RunDir(tmp_path), datetime.now(), "%Y-%m-%dT%H-%M-%S"
    run.configs.mkdir()
    for name in saved:
        time = name if isinstance(name, str) else (now + timedelta(hours=name)).strftime(form)
        (run.configs / f"{time}-project.yaml").touch()
    for _ in range(2):
        time = run.start_time()
        (run.configs / f"{time}-project.yaml").touch()
        assert (
            timedelta(0)
            <= datetime.strptime(time, form) - (now.replace(microsecond=0) + timedelta(hours=hours))
            < timedelta(minutes=1)
        )
        times = [p.name for p in run.saved_configs if p.name[0].isdigit()]
        assert times[-1].startswith(time)
        assert len(times) == len({*times})


def test_a_start_is_newer_than_one_that_failed(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "csv" / "2100-01-01T00-00-00").mkdir(parents=True)
    assert run.start_time() == "2100-01-01T00-00-01"


@pytest.mark.parametrize(
    ("file", "fails", "is_kept"),
    [
        (None, False, False),
        (None, True, False),
        ("csv/metrics.csv", False, True),
        ("csv/metrics.csv", True, False),
        ("configs/a-project.yaml", True, True),
        ("checkpoints/last.ckpt", True, True),
    ],
)
def test_a_run_that_took_no_step_leaves_no_folder(file, fails, is_kept, tmp_path):
    run = RunDir.new("a", tmp_path / "logs")
    with suppress(KeyError), run.kept_if_used():
        if file:
            (run.path / file).parent.mkdir()
            (run.path / file).touch()
        if fails:
            raise KeyError
    assert (tmp_path / "logs").exists() == run.path.exists() == is_kept


def test_relaunched_processes_share_their_parents_run(tmp_path, monkeypatch):
    parent = RunDir.new("a", tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert RunDir.new("a", tmp_path) == parent


@pytest.mark.parametrize("variable", _RANK_VARIABLES)
def test_only_the_first_process_makes_a_folder(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "1")
    one = RunDir.new("a", tmp_path)
    monkeypatch.setenv(variable, "2")
    other = RunDir.new("a", tmp_path)
    assert not [*tmp_path.iterdir()]
    assert one != other  # they may know nothing of each other, as jobs that one srun started


@pytest.mark.parametrize(("rank", "first"), [("0", True), ("1", False)])
def test_torchrun_alone_numbers_its_processes(rank, first, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("SLURM_PROCID", str(1 - int(rank)))
    assert is_first_process() == first


def test_resume_finds_run_and_checkpoint(run):
    other = run.checkpoints / "epoch=000001.ckpt"
    other.touch()
    assert RunDir.resume(run.path) == (run, run.last_checkpoint)
    assert RunDir.resume(other) == (run, other)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "nowhere does not exist"),
        ("logs/the_tokenizers_run", FileNotFoundError, "placeholder: .*run.* first_stage_config"),
        ("logs", ValueError, "logs is not a run"),
        ("logs/run/configs/2024-project.yaml", None, None),
        ("logs/empty", FileNotFoundError, "logs/empty .*logs/empty/checkpoints/last.ckpt"),
    ],
)
def test_a_path_that_is_not_a_run_is_refused(run, path, error, message):
    empty = RunDir(run.path.parent / "empty")
    empty.configs.mkdir(parents=True)
    (empty.configs / "a.yaml").touch()
    if error is None:
        assert RunDir.resume(path)[0].path == run.path
        return
    with pytest.raises(error, match=message):
        RunDir.resume(path)


def test_model_from_run_has_the_runs_weights(run):
    expected = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    for path in (run.path, run.last_checkpoint):
        model = model_from_run(path, monitor="val/x")
        assert not model.training and model.monitor == "val/x"
        torch.testing.assert_close(model.state_dict(), expected)


def test_a_run_of_another_model_than_is_asked_for_is_named(run):
    message = rf"{re.escape(str(run.path))} .*support\.models\.ToyModel, .*lossconfig"
    with pytest.raises(ValueError, match=message):
        model_from_run(run.path, lossconfig={"target": "taming.modules.losses.DummyLoss"})


def test_a_saved_run_takes_files_and_overrides(run, tmp_path):
    wide = tmp_path / "wide.yaml"
    OmegaConf.save(OmegaConf.create({"model": {"params": {"monitor": "val/y"}}}), wide)
    saved = SavedRun.load(run.path, [wide], ["data.params.size=6"])
    assert (saved.folder, saved.checkpoint) == (run.path, run.last_checkpoint)
    assert saved.model().monitor == "val/y"
    assert len(saved.data().data) == 6
    of_checkpoint = SavedRun.load(run.last_checkpoint, [wide], ["data.params.size=6"])
    assert of_checkpoint.config.values == saved.config.values  # merged into the run's own
    assert "data" not in SavedRun.load(run.path, ignore_data=True).config.values
    alone = SavedRun.load(run.path, [wide], alone=True)
    assert alone.config.values == {"model": {"params": {"monitor": "val/y"}}}
    with pytest.raises(ConfigError, match="there is no 'data' block"):
        alone.data()
    with pytest.raises(ConfigError, match=r"model\.params\.widht: .* 'width'"):
        SavedRun.load(run.path, dotlist=["model.params.widht=5"]).model()


def test_a_checkpoint_without_a_run_needs_files_that_describe_its_model(run, tmp_path):
    elsewhere = tmp_path / "downloads" / "weights.ckpt"
    elsewhere.parent.mkdir()
    run.last_checkpoint.rename(elsewhere)
    saved = SavedRun.load(elsewhere, run.saved_configs)
    torch.testing.assert_close(
        saved.model().state_dict(), torch.load(elsewhere, weights_only=True)["state_dict"]
    )
    assert saved.step() == 0
    with pytest.raises(ValueError, match="is not a run"):
        SavedRun.load(elsewhere)


def test_data_from_run_is_set_up_for_validation(run):
    assert len(data_from_run(run.path).val_dataloader()) == 4


def test_what_a_run_started_from_has_served(run):
    start = {"ckpt_path": "gone.ckpt", "ignore_keys": ["encoder"]}
    block = {"n": 1, **start, "first_stage_config": {"target": "x", "params": {"m": 2, **start}}}
    kept = {"n": 1, "first_stage_config": {"target": "x", "params": {"m": 2}}}
    assert without_starts(block) == kept


def test_model_from_run_takes_the_newest_configuration(run):
    newer = {"model": {**PROJECT["model"], "params": {"width": 5, "monitor": "newer"}}}
    OmegaConf.save(OmegaConf.create(newer), run.configs / "2025-project.yaml")
    assert model_from_run(run.path).monitor == "newer"


def test_the_last_date_of_all_is_named(tmp_path):
    run = RunDir(tmp_path)
    run.configs.mkdir()
    (run.configs / "9999-12-31T23-59-58-project.yaml").touch()
    assert run.start_time() == "9999-12-31T23-59-59"
    (run.configs / "9999-12-31T23-59-59-project.yaml").touch()
    with pytest.raises(ValueError, match="9999-12-31T23-59-59-project.yaml .*rename"):
        run.start_time()


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_run_without_a_validation_set_says_so(run, kind):
    target = "taming.data.datamodule.DataModuleFromConfig"
    train = {"target": "support.models.ToyData"}
    block = {"target": target, "params": {"batch_size": 2, "train": train, "num_workers": 0}}
    if kind == "module":
        block = {"target": "lightning.pytorch.LightningDataModule"}
    OmegaConf.save(OmegaConf.create(PROJECT | {"data": block}), run.configs / "2024-project.yaml")
    saved = SavedRun.load(run.path, trust_config=True)
    with pytest.raises(ValueError, match=f"{run.path} has no validation set"):
        saved.validation()
    OmegaConf.save(OmegaConf.create(PROJECT), run.configs / "2024-project.yaml")
    assert len(SavedRun.load(run.path, trust_config=True).validation().val_dataloader()) > 0
