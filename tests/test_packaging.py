"""The installed package is whole, and it works from any folder."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("taming/**/*.py"), ROOT / "taming/py.typed"]
)


def test_every_folder_is_a_package() -> None:
    folders = {Path(source).parent for source in SOURCES}
    assert Path("taming/modules/vqvae") in folders
    assert {f"{folder.as_posix()}/__init__.py" for folder in folders} <= set(SOURCES)


def installed(name: str, least: str) -> bool:
    try:
        return Version(metadata.version(name)) >= Version(least)
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built in a copy so that nothing is left in the repository."""
    if not installed("setuptools", "77") or not installed("pip", "20"):
        pytest.skip("building a wheel offline needs pip, and setuptools 77 or later")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("taming", "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["wheel", str(copy), "--no-deps", "--no-build-isolation", "--no-index", "-w", out]
    result = subprocess.run(
        [sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("loopy_taming-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


@pytest.mark.reported(2)
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = [path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()]
    assert "taming/models/vqgan.py" in files
    assert sorted(file for file in files if ".dist-info/" not in file) == SOURCES
    assert any(file.endswith("licenses/LICENSE") for file in files)


@pytest.mark.reported(2)
def test_the_wheel_is_imported_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    code = "import taming.run.config as module; print(module.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == wheel / "taming/run/config.py"


def imported(source: Path) -> set[str]:
    """Top-level names of the modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_everything_imported_is_declared(wheel: Path) -> None:
    (package,) = metadata.distributions(path=[str(wheel)])
    requirements = [Requirement(line) for line in package.requires or []]
    extras = set(package.metadata.get_all("Provides-Extra") or ()) - {"dev"}
    declared = {
        canonicalize_name(requirement.name)
        for requirement in requirements
        for extra in extras
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    }
    owners = metadata.packages_distributions()
    missing = {}
    given = {*sys.stdlib_module_names, "taming", "main", "triton"}  # torch brings triton, or not
    for path in [ROOT / "main.py", *ROOT.glob("taming/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for name in imported(path) - given:
            if not {canonicalize_name(owner) for owner in owners.get(name, [])} & declared:
                missing[name] = path.relative_to(ROOT).as_posix()
    assert missing == {}
