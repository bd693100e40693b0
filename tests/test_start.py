"""What programs import before they answer: modules whose import takes seconds are left out."""

import os
import subprocess
import sys
from pathlib import Path

from support.runs import TinyRuns

ROOT = Path(__file__).resolve().parents[1]

# A run of one program in a process of many.
AS_PROGRAM = """
import runpy, sys
def program(path, *arguments, status=0):
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert (stop.code or 0) == status, path
"""


def imports(code: str, *names: str) -> tuple[set[str], str]:
    """Run code in a new process; return which of the names it imported, and what it printed."""
    report = f"\nimport sys; print('|', *({set(names)} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AS_PROGRAM + code + report]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed, _, found = done.stdout.rpartition("|")
    return set(found.split()), printed


def test_help_and_the_package_import_nothing_slow() -> None:
    programs = [ROOT / "main.py", *sorted(ROOT.glob("scripts/*.py"))]
    code = "".join(f"program({str(path)!r}, '--help')\n" for path in programs)
    slow = ("torch", "torchvision", "lightning", "numpy", "PIL", "matplotlib")
    found, printed = imports(f"import taming\n{code}", *slow)
    assert not found
    assert printed.count("usage: ") == len(programs) and "--max_epochs" in printed


def test_mistakes_that_a_look_finds_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    out = ("-o", str(tmp_path / "out"))
    runs = ("compress", "convert", "decompress", "encode", "evaluate", "export", "group_by_code")
    runs += ("reconstruct", "sample", "sample_fast", "make_samples", "make_scene_samples")
    there = {name: (str(tmp_path),) for name in ("compress", "decompress", "reconstruct")}
    there["convert"] = ("nowhere", "--to", "taming")
    mistakes = [
        *(
            (name, *there.get(name, ()), *(() if name == "convert" else ("-r", "nowhere")), *out)
            for name in runs
        ),
        *((name, "nowhere.png", "-r", "photos", *out) for name in [*there][:3]),
        ("sample", "-r", "photos", "--complete", "nowhere.png", *out),
        ("quantize_colours", "nowhere.png"),
        ("extract_submodel", "nowhere.ckpt", "part.ckpt"),
        ("compress", str(tmp_path), "-r", "photos", *out, "--bpp", "nan"),
        ("reconstruct", str(tmp_path), "-r", "photos", *out, "--target_psnr", "-inf"),
        *(
            (name, str(tmp_path), "-r", "photos", "-o", str(tmp_path / "file/out"))
            for name in [*there][:3]
        ),
    ]
    code = "".join(
        f"program({str(ROOT / 'scripts' / name)!r} + '.py', *{given}, status=2)\n"
        for name, *given in mistakes
    )
    assert imports(code, "torch", "numpy") == (set(), "")
    assert not (tmp_path / "out").exists()


def test_the_face_loads_torch_when_it_is_used_and_the_workshop_when_a_run_is_loaded() -> None:
    code = "import taming; assert 'torch' not in sys.modules; taming.Tokenizer"
    found, _ = imports(f"{code}; import taming.generator", "torch", "taming.run")
    assert found == {"torch"}


def test_inference_imports_no_training(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    tokenizer, prior = map(tiny_runs.of, ("demo/loopy_vqgan.yaml", "demo/loopy_transformer.yaml"))
    photo = str(tiny_runs.folder / "data/images/0.png")
    code = f"""
import taming
tokenizer = taming.load({str(tokenizer)!r})
tokenizer.decode(tokenizer.encode({photo!r}))
taming.load({str(prior)!r}).sample()
scripts = {str(ROOT / "scripts")!r}
program(scripts + "/reconstruct.py", {photo!r}, "-r", {str(tokenizer)!r}, "-o", {str(tmp_path)!r})
program(scripts + "/sample.py", "-n", "1", "-r", {str(prior)!r}, "-o", {str(tmp_path)!r})
options = "-r", {str(tokenizer)!r}, "-o", {str(tmp_path)!r}
assert "taming.codec" not in sys.modules
program(scripts + "/compress.py", {photo!r}, "--entropy", "raw", "--no_quality", *options)
assert "constriction" not in sys.modules
"""
    slow = ("lightning", "torchmetrics", "torchvision", "scipy", "torch._dynamo", "tensorboard")
    found, _ = imports(code, "torch", *slow)
    assert found == {"torch"}
    names = ("grid.png", "reconstructions.json", "0.loop", "compressed.json")
    assert all((tmp_path / name).is_file() for name in names)


def test_models_built_before_lightning_is_imported_go_on_and_those_built_after_train() -> None:
    code = """
import torch
from taming.models.module import Model
class Net(Model):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)
before = Net()
from lightning.pytorch import LightningModule
after = Net()
assert isinstance(after, LightningModule) and type(after) is type(before) is Net
for model in (before, after):
    model.to("meta")
    assert (model.device, model.global_step) == (torch.device("meta"), 0)
    assert model.eval().layer(torch.ones(1, 2, device="meta")).shape == (1, 3)
assert [*before.state_dict()] == [*after.state_dict()] == ["layer.weight", "layer.bias"]
try:
    before.log("loss", 0.0)
except AttributeError as error:
    assert "build it again to train it" in str(error)
else:
    raise AssertionError
"""
    assert imports(code) == (set(), "")
