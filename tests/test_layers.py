"""Imports point one way: the table of the architecture, read off the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TAMING = ROOT / "taming"

# First part of a module's path below taming -> those that it may import.
HELPERS = {"downloads", "extras", "signatures"}  # where util is allowed, these are as well
LEAVES = {"checkpoint", "lr_scheduler", *HELPERS}  # import nothing of taming
ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "util": HELPERS,
    "__main__": {"util", "run"},  # how the commands are named in a help
    "codes": {"util"},
    "decoding": {"util"},
    "pictures": {"decoding", "util"},
    "modules": {"modules", "util"},
    "models": {"models", "modules", "checkpoint", "lr_scheduler", "util"},
    "codec": {"codec", "models", "modules", "decoding"},
    "data": {"data", "decoding", "util"},
    "files": {"data", "util"},  # a script's work on each of several files
    "sharing": {"run", "util"},  # run: the folders of shared models, once one is saved or loaded
    "coding": {"codes", "models", "pictures"},  # what the tokenizer and encoding at scale share
    "tokenizer": {
        *("codec", "codes", "coding", "models", "modules", "checkpoint", "decoding", "pictures"),
        *("sharing", "util"),
    },
    "generator": {"models", "tokenizer", "checkpoint", "pictures", "sharing", "util"},
    "loading": {"generator", "tokenizer", "run", "util"},  # run: once a model is loaded
    # Measures what the face loads, on data: above both, and of use to scripts alone.
    "evaluation": {
        *("evaluation", "tokenizer", "generator", "models", "modules"),
        *("data", "decoding", "pictures", "run", "util"),
    },
    # Shows what the face loads, and runs with their data: above all, and of use to scripts alone.
    "demo": {
        *("demo", "tokenizer", "generator", "loading", "codes", "codec", "models"),
        *("data", "pictures", "run", "util"),
    },
    "run": {"run", "models", "data", "checkpoint", "pictures", "util"},
    # A program in a folder: runs to load, pictures to read, the way from images to codes.
    "scale": {"scale", "coding", "models", "modules", "data", "run", "util"},
}
FACE = (
    "taming.codes",
    "taming.evaluation.evaluate",
    "taming.generator",
    "taming.loading",
    "taming.tokenizer",
)
PROGRAM_FILES = [ROOT / "main.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
PROGRAMS = {"scripts", "benchmarks", "tests", *(file.stem for file in PROGRAM_FILES)}
RACE = sorted(ROOT.glob("benchmarks/race/*.py"))  # what the benchmarks share
SHARED = ("benchmarks.settings", "benchmarks.timing", "benchmarks.workers", "workers")  # and these


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path, known: set[str]) -> Iterator[str]:
    """Yield every module that a file imports, wherever in the file."""
    name = _name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                member = f"{origin}.{alias.name}"
                yield member if member in known else origin


FILES = sorted(TAMING.rglob("*.py"))
KNOWN = {_name(file) for file in FILES}
IMPORTS = {_name(file): set(_imports(file, KNOWN)) for file in FILES}


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_imports_follow_the_table(module):
    if module == "taming":  # names of the face, for type checkers
        assert IMPORTS[module] <= {*FACE, "__future__", "importlib", "typing"}
        return
    layer = module.split(".")[1]
    assert layer in ALLOWED, f"{module} is in no layer of the table"
    inside = {name.split(".")[1] for name in IMPORTS[module] if name.startswith("taming.")}
    assert inside <= ALLOWED[layer] | (HELPERS if "util" in ALLOWED[layer] else set())


@pytest.mark.reported(3)
@pytest.mark.parametrize("file", sorted([*FILES, *RACE, *PROGRAM_FILES]), ids=_name)
def test_nobody_imports_a_program(file):
    imports = {n for n in _imports(file, KNOWN) if n != "benchmarks" and not n.startswith(SHARED)}
    assert not {name.split(".")[0] for name in imports} & PROGRAMS


WITHOUT_LIGHTNING = (
    *("taming.modules", "taming.pictures", "taming.util"),
    *(f"taming.{leaf}" for leaf in LEAVES),
)


@pytest.mark.parametrize("module", sorted(m for m in KNOWN if m.startswith(WITHOUT_LIGHTNING)))
def test_modules_and_leaves_need_neither_lightning_nor_omegaconf(module):
    outside = {name.split(".")[0] for name in IMPORTS[module]}
    assert not outside & {"lightning", "pytorch_lightning", "omegaconf"}


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done:
            return
        for imported in sorted(IMPORTS[module] & KNOWN):
            visit(imported, (*path, module))
        done.add(module)

    for module in sorted(KNOWN):
        visit(module, ())


def test_every_folder_is_a_package():
    folders = {file.parent for file in FILES}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
