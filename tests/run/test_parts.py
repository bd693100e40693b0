"""A prior finds the run of its tokenizer again, or the message names both and the remedy."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.models import GPT, vqmodel_config
from support.runs import TRAINER, TinyRuns, call, fails, run_main

import taming
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import VQModel
from taming.run.folder import model_from_run
from taming.util import instantiate_from_config

LOADER = "taming.run.folder.model_from_run"


def write(run: Path, block: dict, **params) -> Path:
    """A run of a model that ``block`` describes, with random weights."""
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    block = {**block, "params": {**block["params"], **params}}
    OmegaConf.save(OmegaConf.create({"model": block}), run / "configs/2024-project.yaml")
    return run


def write_tokenizer(run: Path) -> Path:
    block = vqmodel_config()
    write(run, block)
    state = instantiate_from_config(block).state_dict()
    torch.save({"state_dict": state}, run / "checkpoints/last.ckpt")
    return run


def write_prior(run: Path, tokenizer: str) -> Path:
    params = {"transformer_config": GPT, "cond_stage_config": "__is_unconditional__"}
    block = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
    built = Net2NetTransformer(**params, first_stage_config=vqmodel_config())
    write(run, block, first_stage_config={"target": LOADER, "params": {"run": tokenizer}})
    torch.save({"state_dict": built.state_dict()}, run / "checkpoints/last.ckpt")
    return run


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that both runs were trained in, and from which they are then moved."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_tokenizer(work / "logs/tokenizer")
    return work


@pytest.mark.parametrize("moved", ["nothing", "both", "renamed", "tokenizer"])
@pytest.mark.parametrize(
    "named",
    ["logs/tokenizer", "{work}/logs/tokenizer", "logs/tokenizer/checkpoints/last.ckpt"],
)
def test_a_prior_finds_its_tokenizer_beside_itself(named, moved, work):
    prior = write_prior(work / "logs/prior", named.format(work=work))
    if moved == "both":
        shutil.move(work, work.with_name("moved"))
        prior = work.with_name("moved") / "logs/prior"
    elif moved == "renamed":
        shutil.move(work / "logs", work / "runs")
        prior = work / "runs/prior"
    elif moved == "tokenizer":  # into the folder above
        shutil.move(work / "logs/tokenizer", work.parent / "tokenizer")
    assert isinstance(model_from_run(prior).first_stage_model, VQModel)
    assert taming.load(prior / "checkpoints/last.ckpt").sample(1)[0].size == (16, 16)


def test_the_place_that_is_named_comes_first(work, monkeypatch):
    prior = write_prior(work / "logs/prior", "logs/tokenizer")
    write(Path("logs/tokenizer"), {"target": "taming.modules.losses.DummyLoss", "params": {}})
    with pytest.raises(FileNotFoundError, match=r"logs/tokenizer has no .*last\.ckpt"):
        model_from_run(prior)


@pytest.mark.parametrize("named", ["logs/gone", "logs/gone/checkpoints/last.ckpt", 20240501])
def test_a_missing_tokenizer_is_named_with_the_remedy(named, work, capsys):
    """No shorter end of the path leads to the prior's own checkpoint, or to no run."""
    prior, tokenizer = write_prior(work / "logs/prior", named), work / "logs/tokenizer"
    (work / "logs/gone").mkdir()
    message = rf"{prior} needs the run {named} of its tokenizer.*--tokenizer.*tokenizer=.*main\.py"
    with pytest.raises(FileNotFoundError, match=message):
        model_from_run(prior)
    assert f"{named} of its tokenizer" in fails(capsys, "sample", "-r", prior)
    assert taming.load(prior, tokenizer=tokenizer).sample(1)
    call("sample", "-r", prior, "-n", 1, "-o", "out", "--tokenizer", tokenizer)
    assert Path("out/000000.png").is_file()
    assert f"{named} of its tokenizer" in fails(capsys, "sample_fast", "-r", prior, "-n", 1)
    call("sample_fast", "-r", prior, "-n", 1, "-o", "fast", "--tokenizer", tokenizer)


def test_a_run_that_is_no_tokenizer_is_refused(work, capsys):
    tokenizer = work / "logs/tokenizer"
    prior = write_prior(work / "logs/prior", str(tokenizer))
    with pytest.raises(ValueError, match=r"must name a tokenizer.* got a Net2NetTransformer"):
        taming.load(write_prior(work / "logs/other", "logs/prior"))
    with pytest.raises(ValueError, match=r"logs/itself names itself .* tokenizer"):
        taming.load(write_prior(work / "logs/itself", "logs/itself"))
    with pytest.raises(ValueError, match=r"must name a tokenizer.* got a Net2NetTransformer"):
        taming.load(write_prior(work / "logs/third", "logs/gone"), tokenizer=prior)
    message = "a tokenizer x is given, but the taming.models.vqgan.VQModel of this run takes none"
    assert message in fails(capsys, "evaluate", "-r", tokenizer, "--tokenizer", "x")


def test_a_prior_is_resumed_from_another_folder(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, logs = tiny_runs.of("demo/loopy_vqgan.yaml"), tmp_path / "a/logs"
    shutil.copytree(tokenizer, logs / tokenizer.name)
    shutil.copytree(tiny_runs.of("demo/loopy_transformer.yaml"), logs / "prior")
    name = f"logs/{tokenizer.name}"
    for file in (logs / "prior/configs").glob("*-project.yaml"):
        config = OmegaConf.load(file)
        config.model.params.first_stage_config.params.run = name
        OmegaConf.save(config, file)
    (tmp_path / "b").mkdir()
    run_main(tmp_path / "b", "-r", logs / "prior", "-t", "--max_steps", 3, *TRAINER)
    newest = sorted((logs / "prior/configs").glob("*-project.yaml"))[-1]
    assert OmegaConf.load(newest).model.params.first_stage_config.params.run == name
    shutil.rmtree(logs / tokenizer.name)
    with pytest.raises(SystemExit):
        run_main(tmp_path / "b", "-r", logs / "prior", "-t", "--max_steps", 4, *TRAINER)
    assert f"needs the run {name} of its tokenizer" in capsys.readouterr().err
