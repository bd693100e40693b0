"""The installed package is whole, and it works from any folder without what trains a model."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.runs import TRAINER, TinyRuns

from taming.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
NAME = "loopy-taming"
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("taming/**/*.py"),
        *ROOT.glob("taming/pretrained/*/*"),
        ROOT / "taming/demo/example.jpg",
        ROOT / "taming/py.typed",
    ]
)
PROGRAMS = sorted(
    f"taming/programs/{path.relative_to(ROOT).as_posix()}"
    for path in [ROOT / "main.py", *ROOT.glob("scripts/*.*"), *ROOT.glob("configs/**/*.yaml")]
)
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "main.py")
FOLDERS = ("taming", "tests", "scripts", "configs")

# Makes the packages that LACKING names as good as not installed.
LACKING = """
import os, sys
from importlib.machinery import PathFinder

lacking = set(os.environ.get("LACKING", "").split())

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in lacking else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def test_every_folder_is_a_package() -> None:
    folders = {Path(source).parent for source in SOURCES if source.endswith(".py")}
    assert Path("taming/modules/vqvae") in folders
    assert {f"{folder.as_posix()}/__init__.py" for folder in folders} <= set(SOURCES)


def installed(name: str, least: str) -> bool:
    try:
        return Version(metadata.version(name)) >= Version(least)
    except metadata.PackageNotFoundError:
        return False


def run_python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Run Python in a folder; return its output, or fail with what it wrote."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, built in a copy so that nothing is left in the repository."""
    if not installed("setuptools", "77") or not installed("pip", "20"):
        pytest.skip("building a wheel offline needs pip, and setuptools 77 or later")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run_python("-c", code, out, cwd=copy)
    (file,) = out.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of the sdist installed, its command in ``bin``."""
    out, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    offline = ("--no-deps", "--no-index", "--quiet")
    run_python("-m", "pip", "wheel", sdist, "--no-build-isolation", *offline, "-w", out, cwd=out)
    (file,) = out.glob("loopy_taming-*.whl")
    target = ("--target", folder, "--no-compile")
    run_python("-m", "pip", "install", file, *offline, *target, cwd=out)
    return folder


@pytest.mark.reported(2)
def test_the_wheel_holds_package_programs_and_recipes_and_nothing_else(wheel: Path) -> None:
    files = [path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()]
    own = sorted(f for f in files if ".dist-info/" not in f and not f.startswith("bin/"))
    assert own == sorted([*SOURCES, *PROGRAMS])
    assert any(file.endswith("licenses/LICENSE") for file in files)


def test_version_and_licence_are_cited_as_they_are() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for key in ("version", "license"):
        assert f'\n{key} = "{cited[key]}"\n' in project
    assert f"\n## {cited['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_map_of_the_house_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = {path for path in re.findall(r"`([\w./]+)`", text) if "/" in path}
    paths |= set(re.findall(r"\]\(([\w./]+)\)", text))
    assert len(paths) > 15
    for path in paths:
        places = (ROOT / path, ROOT / "taming" / path)
        assert any(place.exists() for place in places), path


def test_the_sdist_has_the_tests(sdist: Path) -> None:
    tests = {path.relative_to(ROOT) for path in ROOT.glob("tests/**/*.py")}
    assert tests <= {path.relative_to(sdist) for path in sdist.glob("tests/**/*.py")}


def needed(package: Path, *names: str) -> set[str]:
    """Return the distributions that an installation brings, given those that it asks for."""
    found, seen, waiting = set(), set(), [*names]
    while waiting:
        requirement = Requirement(waiting.pop())
        name, extras = canonicalize_name(requirement.name), sorted(requirement.extras) or [""]
        found.add(name)
        if (name, *extras) in seen:
            continue
        seen.add((name, *extras))
        where = [str(package)] if name == NAME else sys.path
        about = next(iter(metadata.distributions(name=name, path=where)), None)
        for line in (about.requires if about else None) or ():
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(line)
    return found


@functools.cache
def owners() -> dict[str, set[str]]:
    """Return the distributions of each importable module."""
    found = metadata.packages_distributions().items()
    return {module: {canonicalize_name(name) for name in names} for module, names in found}


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that has the wheel and what it needs without extras."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(LACKING)
    base = needed(wheel, NAME)
    lacking = {module for module, names in owners().items() if not names & base} - {"taming"}
    assert {"lightning", "matplotlib", "skimage", "tensorboard", "torchmetrics"} <= lacking
    paths = os.pathsep.join([str(folder), str(wheel)])
    return {"PYTHONPATH": paths, "LACKING": " ".join(lacking)}


def test_a_model_is_used_without_what_trains_one(
    bare: dict[str, str], wheel: Path, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    runs = map(tiny_runs.of, ("demo/loopy_vqgan.yaml", "demo/loopy_transformer.yaml"))
    code = """
import sys, taming
assert taming.__file__.startswith(sys.argv[4])
tokenizer, prior = map(taming.load, sys.argv[1:3])
codes = tokenizer.encode(sys.argv[3], max_codes=500)
codes.save("codes.npz")
picture = tokenizer.decode(taming.Codes.load("codes.npz"))
assert (picture.height, picture.width) == codes.size and 0 < codes.bpp < 99
assert len(prior.sample(2)) == 2
"""
    photo = tiny_runs.folder / "data/images/0.png"
    run_python("-c", code, *runs, photo, wheel, cwd=tmp_path, **bare)
    arguments = (photo, "-r", tiny_runs.of("demo/loopy_vqgan.yaml"), "-o", "out")
    run_python(wheel / "bin/taming", "reconstruct", *arguments, cwd=tmp_path, **bare)
    assert {path.name for path in tmp_path.glob("out/*")} > {"0.png", "0_lengths.png"}


def test_a_missing_extra_is_named_in_one_line(
    bare: dict[str, str], wheel: Path, tiny_runs: TinyRuns, tmp_path: Path
) -> None:
    run = tiny_runs.of("demo/loopy_vqgan.yaml")
    missing = {("train", "-b", "photos", "-t"): "train", ("evaluate", "-r", str(run)): "train"}
    missing["demo", "-r", str(run)] = "demo"
    for arguments, extra in missing.items():
        done = subprocess.run(
            [sys.executable, wheel / "bin/taming", *arguments],
            env={**os.environ, **bare},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        line = rf"error: (\w+) is not installed: pip install 'loopy-taming\[{extra}\]'\n"
        assert done.returncode == 2 and re.fullmatch(line, done.stderr), done.stderr
    assert not [*tmp_path.glob("logs/*")]


def test_a_recipe_trains_without_a_clone(wheel: Path, tiny_runs: TinyRuns, tmp_path: Path) -> None:
    name = "demo/loopy_vqgan"
    sizes = [*TRAINER, *tiny_runs.overrides[f"{name}.yaml"]]
    arguments = ("train", "--base", name, "-t", "-n", "a", "--max_steps", "2", *sizes)
    run_python(wheel / "bin/taming", *arguments, cwd=tmp_path, PYTHONPATH=str(wheel))
    (run,) = tmp_path.glob("logs/*_a")
    assert (run / "checkpoints/last.ckpt").is_file()


def test_the_command_lists_its_programs(wheel: Path, tmp_path: Path) -> None:
    listed = run_python(wheel / "bin/taming", cwd=tmp_path, PYTHONPATH=str(wheel))
    names = {line.split()[0] for line in listed.splitlines() if line.startswith("  ")}
    assert names == {"train", *(path.stem for path in ROOT.glob("scripts/*.py"))}


def imported(source: Path) -> set[str]:
    """Top-level names of the modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_everything_imported_is_declared_and_what_is_optional_has_its_extra(wheel: Path) -> None:
    base = needed(wheel, NAME)
    given = {*sys.stdlib_module_names, "taming", "triton"}  # torch brings triton, or not
    known = given | set(EXTRAS) | {module for module, names in owners().items() if names & base}
    missing = {}
    for path in [ROOT / "main.py", *ROOT.glob("taming/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for name in imported(path) - known:
            missing[name] = path.relative_to(ROOT).as_posix()
    assert missing == {}


def test_extras_bring_what_they_are_named_for(wheel: Path) -> None:
    whole = needed(wheel, f"{NAME}[all]")
    for module, extra in EXTRAS.items():
        brought = needed(wheel, f"{NAME}[{extra}]")
        wanted = owners().get(module, {canonicalize_name(module)})
        assert wanted & brought and not wanted & needed(wheel, NAME), module
        assert brought <= whole, extra
