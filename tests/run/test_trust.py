"""A saved run builds what is on the list, whatever its configuration names."""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from reliability import hostile, targets
from support.runs import CONFIGS, call, fails, run_main, shipped

import taming
from taming.data.base import NumpyPaths
from taming.models.vqgan import VQModel
from taming.modules.losses.vqperceptual import DummyLoss
from taming.run import trust
from taming.run.config import load_config
from taming.run.folder import SavedRun, data_from_run, model_from_run
from taming.run.sources import ConfigError

TAMING = Path(taming.__file__).parent
REFUSED = "a saved run may not"


@pytest.fixture(autouse=True)
def untrusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(trust.TRUST_VARIABLE)


def write(run, config, model=None):
    """A run with a model's weights: those of the smallest tokenizer, unless given."""
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "configs/2024-project.yaml").write_text(yaml.safe_dump(config))
    model = model or VQModel(**hostile.base()["model"]["params"])
    torch.save({"state_dict": model.state_dict()}, run / "checkpoints/last.ckpt")
    return run


def of_target(path, target, **params):
    return hostile.with_block(path, {"target": target, "params": params})


def test_whatever_a_run_names_it_does_no_harm(tmp_path):
    """One attempt of each kind at each block, and every hundredth name within reach."""
    chosen = {(a.kind, a.block): a for a in hostile.attempts()}
    popen = next(a for a in hostile.attempts() if a.name == "subprocess.Popen")
    counts, lost = targets.try_all(tmp_path, [popen, *chosen.values()], every=100)
    assert not lost
    assert counts["targets", "refused"] >= 5 and counts["names", "refused"] > 300


@pytest.mark.parametrize("place", hostile.PLACES)
def test_every_place_of_a_block_is_looked_at(place, tmp_path):
    run = write(tmp_path / "run", of_target(place, "support.models.ToyModel"))
    config = load_config([run / "configs/2024-project.yaml"], untrusted=run / "configs")
    with pytest.raises(ConfigError, match=rf"2024-project\.yaml: {place}.*{REFUSED} build support"):
        trust.check_trust(config, place.split(".")[0])
    for block in {"model", "data", "lightning"} - {place.split(".")[0]}:
        trust.check_trust(config, block)


@pytest.mark.parametrize("name", shipped())
def test_whatever_ships_may_be_saved_and_loaded(name):
    config = load_config([CONFIGS / name], untrusted=CONFIGS)
    for block in targets.BLOCKS:
        trust.check_trust(config, block)


@pytest.mark.parametrize(
    ("block", "target"),
    [
        ("model", "torch.nn.Linear"),
        ("model", "torch.optim.lr_scheduler.StepLR"),
        ("model", "torchmetrics.image.PeakSignalNoiseRatio"),
        ("model", "vector_quantize_pytorch.VectorQuantize"),
        ("model", "taming.modules.losses.vqperceptual.DummyLoss"),  # the original's
        ("data", "torchvision.datasets.CIFAR10"),
        ("data", "torchvision.transforms.CenterCrop"),
        ("data", "torch.utils.data.TensorDataset"),
        ("data", "main.WrappedDataset"),
        ("lightning", "main.ImageLogger"),
        ("lightning", "lightning.pytorch.callbacks.EarlyStopping"),
        ("lightning", "lightning.pytorch.loggers.CSVLogger"),
        ("lightning", "lightning.pytorch.plugins.environments.LightningEnvironment"),
        ("lightning", "lightning.pytorch.strategies.DDPStrategy"),
    ],
)
def test_harmless_classes_are_on_the_list_of_their_block_alone(block, target):
    assert [b for b in targets.BLOCKS if trust._is_allowed(target, b)] == [block]


def test_a_model_is_loaded_whatever_the_data_name(tmp_path):
    run = write(tmp_path / "run", of_target("data.params.validation", "support.models.ToyData"))
    assert isinstance(model_from_run(run), VQModel)
    with pytest.raises(ConfigError, match=rf"data\.params\.validation\.target.*{REFUSED}"):
        data_from_run(run)
    assert data_from_run(run, trust_config=True).datasets


def test_the_user_is_trusted_and_may_trust(tmp_path, monkeypatch):
    """By a module's name, by a flag, by a file or a key of the command line; at any depth."""
    loss = "support.models.X"
    monkeypatch.setattr("support.models.X", type("X", (DummyLoss,), {}), raising=False)
    monkeypatch.setattr("support.models.X.__module__", "support.models")
    path, config = "model.params.lossconfig", of_target("model.params.lossconfig", loss)
    tokenizer = write(tmp_path / "logs/tokenizer", config)
    loader = {"target": "taming.run.folder.model_from_run", "params": {"run": "logs/tokenizer"}}
    outer = write(tmp_path / "logs/outer", hostile.with_block("model", loader))
    for run in (tokenizer, outer):
        with pytest.raises(
            ConfigError, match=rf"tokenizer.*{path}\.target.*{REFUSED} build {loss}"
        ):
            model_from_run(run)
        assert model_from_run(run, trust_config=True)
        with pytest.raises(ConfigError, match="--trust_config.*TAMING_TRUST.*docs/security.md"):
            taming.load(run)
        taming.load(run, trust_config=True)
        with monkeypatch.context() as patch:
            patch.setenv(trust.TRUST_VARIABLE, "mine, support.models")
            model_from_run(run)
    own = tmp_path / "own.yaml"
    OmegaConf.save(OmegaConf.create({"model": {"params": {"lossconfig": {"target": loss}}}}), own)
    SavedRun.load(tokenizer, [own]).model()
    SavedRun.load(tokenizer, dotlist=[f"{path}.target={loss}"]).model()
    with pytest.raises(ConfigError, match=REFUSED):  # the same file, only named once more
        SavedRun.load(tokenizer, [tokenizer / "configs/2024-project.yaml"]).model()
    with pytest.raises(ConfigError, match=REFUSED):  # ${...} may bring a value of the run's
        SavedRun.load(tokenizer, dotlist=["model.params.monitor=${model.params.embed_dim}"]).model()


def test_a_trusted_module_does_not_lend_its_trust(monkeypatch):
    monkeypatch.setenv(trust.TRUST_VARIABLE, "support")
    assert trust._is_allowed("support.models.ToyModel", "model")
    assert trust._is_allowed("support.models.trainer", "lightning")  # a function of the user's
    assert not trust._is_allowed("support.models.Path", "model")
    assert not trust._is_allowed("support.runs.importlib", "model")


def test_a_link_in_the_folder_does_not_make_a_file_the_users(tmp_path):
    run = write(tmp_path / "run", of_target("model.params.lossconfig", "support.models.ToyModel"))
    file = run / "configs/2024-project.yaml"
    file.rename(tmp_path / "elsewhere.yaml")
    file.symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(ConfigError, match=REFUSED):
        model_from_run(run)


def test_a_module_in_the_current_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "absent_package.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "main").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_IMPORTABLE", ("absent_package", *trust._IMPORTABLE))
    assert not trust._is_allowed("absent_package.Thing", "model")
    assert trust._is_allowed("main.WrappedDataset", "data")


def test_no_run_makes_its_own_checkpoint_trusted(tmp_path):
    config = hostile.with_block("model.params.trust_checkpoint", True)
    run = write(tmp_path / "run", config)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    torch.save({**state, "extra": Payload()}, run / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt.*mkdir.*trust_checkpoint"):
        model_from_run(run)
    assert not Path("harm").exists()
    model_from_run(run, trust_config=True)
    Path("harm").rmdir()
    SavedRun.load(run, dotlist=["model.params.trust_checkpoint=true"]).model()
    assert Path("harm").is_dir()


class Payload:
    """An object that a file should not hold: it would make a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    np.save("x.npy", np.array([Payload()], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.npy|pickle"):
        NumpyPaths(["x.npy"])[0]
    config = hostile.base()["model"]["params"]
    with pytest.raises(ValueError, match=r"x\.npy|pickle"):
        VQModel(**config, remap="x.npy")
    assert not Path("harm").exists()


@pytest.mark.parametrize("script", ["evaluate", "reconstruct", "sample", "make_samples"])
def test_programs_take_the_flag(script, tmp_path, capsys):
    run = write(tmp_path / "run", of_target("model.params.lossconfig", "support.models.ToyModel"))
    more = {"reconstruct": ["x.png"], "make_samples": ["-o", "out"]}.get(script, [])
    torch.save(torch.zeros(1), tmp_path / "x.png")
    assert REFUSED in fails(capsys, script, "-r", run, *more)
    with pytest.raises((ValueError, TypeError)) as error:  # later mistakes
        call(script, "-r", run, *more, "--trust_config")
    assert REFUSED not in str(error.value)


def test_the_program_takes_the_flag(tmp_path, capsys, monkeypatch):
    run = write(tmp_path / "run", of_target("model.params.lossconfig", "support.models.OwnLoss"))
    monkeypatch.setattr("support.models.OwnLoss", type("OwnLoss", (DummyLoss,), {}), raising=False)
    monkeypatch.setattr("support.models.OwnLoss.__module__", "support.models")
    with pytest.raises(SystemExit):
        run_main(tmp_path, "-r", run, "--no-test", "true")
    assert REFUSED in capsys.readouterr().err
    run_main(tmp_path, "-r", run, "--no-test", "true", "--trust_config")


def test_what_a_run_writes_stays_in_its_folder(tmp_path):
    inside = {"dirpath": str(tmp_path / "run/checkpoints"), "filename": "{epoch}/best"}
    for params, is_refused in (
        (inside, False),
        ({"dirpath": "run/x"}, False),  # from the current folder
        ({"dirpath": "elsewhere"}, True),
        ({"dirpath": str(tmp_path / "elsewhere")}, True),
        ({"filename": "../../x"}, True),
    ):
        run = tmp_path / "run"
        config = hostile.with_block("lightning.modelcheckpoint", {"params": params})
        (run / "configs").mkdir(parents=True, exist_ok=True)
        (run / "configs/a.yaml").write_text(yaml.safe_dump(config))
        loaded = load_config([run / "configs/a.yaml"], untrusted=run / "configs")
        try:
            trust.check_trust(loaded, "lightning")
        except ConfigError as error:
            assert is_refused and "only write into its own folder" in str(error)
        else:
            assert not is_refused


# --- nothing else turns text into code -----------------------------------------------------------

CODE = {"eval", "exec", "compile", "__import__", "import_module", "reload", "run_path"}


def test_only_targets_become_code():
    """What the check does not know of would pass it by: no other way leads from text to code."""
    found = set()
    for file in TAMING.rglob("*.py"):
        module = ".".join(file.relative_to(TAMING.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                owner = getattr(getattr(node.func, "value", None), "id", None)
                is_method = isinstance(node.func, ast.Attribute)  # of a module or a pattern
                is_code = name in CODE and not (name in ("eval", "compile") and is_method)
                if is_code or name == "get_obj_from_str" or (name == "load" and owner == "hub"):
                    found.add((module, name))
    outside = {(m, n) for m, n in found if not m.startswith("taming.run")}
    assert outside == {
        ("taming.__init__", "import_module"),  # of the names of the face
        ("taming.__main__", "run_path"),  # of the programs beside it
        ("taming.signatures", "eval"),  # of the annotations in a target's own source
        ("taming.util", "import_module"),
        ("taming.util", "reload"),
        ("taming.util", "get_obj_from_str"),
        ("taming.models.sizes", "get_obj_from_str"),
        ("taming.data.annotated_objects_dataset", "get_obj_from_str"),
    }
