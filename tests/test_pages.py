"""README and docs keep their word: every command and every snippet is run, on tiny runs.

Programs of ``scripts/`` and snippets of Python are run; ``main.py`` goes as far as a run's folder,
with every key checked; of programs that measure for minutes, the arguments are parsed. Whatever is
not run is listed here with its reason.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from support.hub import Hub, standing_in
from support.pages import PAGES, ROOT, files, fill, read, steps
from support.runs import TinyRuns, call, picture

import main as program
from taming.__main__ import programs
from taming.run import cli
from taming.run.options import parse_arguments
from taming.run.parser import Parser
from taming.signatures import parameters_of
from taming.util import get_obj_from_str, instantiate_from_config

# Name of a run in the pages -> the recipe that it is of here; those that some pages mean otherwise.
RUNS = {
    "tokenizer": "custom_loopy_vqgan.yaml",
    "run": "custom_loopy_vqgan.yaml",
    "prior": "custom_loopy_transformer.yaml",
    "class_prior": "cifar10_two_level_transformer.yaml",
}
OTHER_RUNS = {
    "docs/extending": {"time_my_prior": "custom_loopy_transformer.yaml"},
    "docs/hierarchy": {
        "run_of_vqvae2": "vqvae2_cifar10.yaml",
        "run_of_vqvae2_top": "vqvae2_top_prior.yaml",
        "run_of_vqvae2_bottom": "vqvae2_bottom_prior.yaml",
    },
    "docs/photos": {
        "run_of_configs_photos_yaml": "photos.yaml",
        "run_of_the_decoder": "photos.yaml",
        "run_of_configs_photos_context_yaml": "photos_context.yaml",
    },
    "docs/recipes": {
        "run_of_single_code": "vqvae_single_code.yaml",
        "run_of_transformer": "cifar10_transformer.yaml",
        "run_of_two_level": "cifar10_two_level_transformer.yaml",
        "run_of_vqvae2_top": "vqvae2_top_prior.yaml",
        "run_of_vqvae2_bottom": "vqvae2_bottom_prior.yaml",
        "run_of_imagenet_transformer": "imagenet_transformer.yaml",
    },
}
# What snippets and commands of a page take as given, beside the files that `world` makes.
GIVEN = {
    "docs/loopy": """
        import torch
        model = taming.load("logs/tokenizer").model
        batches = [torch.rand(2, 3, 32, 32) * 2 - 1]
    """,
    "docs/migration": """
        import pathlib, shutil
        shutil.copy("logs/tokenizer/checkpoints/last.ckpt", ".")
        shutil.copy(*pathlib.Path("logs/tokenizer/configs").glob("*-project.yaml"), "model.yaml")
    """,
    "docs/photos": """
        import shutil
        shutil.copytree("photos", "data/photos/val")
    """,
    "docs/sharing": """
        import numpy as np
        images = np.zeros((1, 3, 32, 32), np.float32)
    """,
}
# Numbers of a page -> smaller ones, after the same flag.
LESS = {"--generated": "4", "--grid": "6,8"}
# Programs whose arguments are parsed alone, and why.
PARSED = {
    "benchmarks": "measures for minutes; tests/test_benchmark*.py run them on tiny plans",
    "tests": "searches for minutes; short forms are in the suite",
    "scripts/convert.py": "needs files of other projects; tests/test_convert.py makes them",
    "scripts/sample_conditional.py": "serves until it is stopped; has its own tests",
    "taming/demo/__main__.py": "serves until it is stopped; tests/demo runs it",
}
# Programs of others: what is checked of them in place of a run, which would change the machine.
REQUIREMENT = re.compile(r"[\w.-]+(?:\[[\w,]+\])?$")
PEERS = {"taming-transformers-rom1504"}  # what benchmarks compare with


class Parsed(Exception):
    """A program has accepted its arguments."""


def parse_alone(path: Path, arguments: Sequence[str]) -> None:
    """Start a program, and stop it as soon as it has parsed its arguments."""

    def stops(parse: Callable[..., Any]) -> Callable[..., None]:
        def parse_and_stop(*given: Any, **options: Any) -> None:
            parse(*given, **options)
            raise Parsed

        return parse_and_stop

    assert "__main__" in path.read_text(encoding="utf-8")
    if not arguments:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(sys, "argv", [str(path), *arguments])
        for name in ("existing", "existing_run"):  # files that a page leaves to its reader
            patch.setattr(cli, name, str)
        for kind in (argparse.ArgumentParser, Parser):
            patch.setattr(kind, "parse_args", stops(kind.parse_args))
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def check_install(*arguments: str) -> None:
    """Every package is this one, with extras that there are, or one that it names."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    command, *rest = (a for a in arguments if not a.startswith("-") and a != "PEER")
    assert command == "install" and rest
    for text in rest:
        requirement = Requirement(text.replace(".", "loopy-taming", 1) if text[0] == "." else text)
        assert requirement.name in {"loopy-taming", *PEERS}, text
        for extra in requirement.extras:
            assert f"\n{extra} = [" in project, text


def check_target(*targets: str) -> None:
    """The Makefile has the target."""
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in rules for target in targets)


def check_file(*arguments: str) -> None:
    """The file that is named is there."""
    assert all((ROOT / name).is_file() for name in arguments if name.endswith(".yaml"))


def check_processes(*arguments: str) -> None:
    """Parse the arguments of the program that a launcher starts many times."""
    (number,) = (n for n, argument in enumerate(arguments) if argument.endswith(".py"))
    parse_alone(ROOT / arguments[number], arguments[number + 1 :])


def change_files(*command: str) -> None:
    """Really do it, in the page's own folder."""
    subprocess.run(command, check=True)


OTHERS: dict[str, Callable[..., None]] = {
    "pip": check_install,
    "make": check_target,
    "conda": check_file,
    **dict.fromkeys(("srun", "torchrun"), check_processes),
    **{name: lambda *rest, name=name: change_files(name, *rest) for name in ("cp", "mkdir")},
}


def run_program(path: Path, arguments: list[str]) -> None:
    """Run one of the repository's programs, as far as the tables say."""
    name = path.relative_to(ROOT).as_posix()
    if name == "main.py":
        program.load(parse_arguments(arguments))
    elif name in PARSED or path.relative_to(ROOT).parts[0] in PARSED:
        parse_alone(path, arguments)
    else:
        for flag, number in LESS.items():
            if flag in arguments:
                arguments[arguments.index(flag) + 1] = number
        call(path.stem, *arguments)


def run_command(command: list[str], names: dict[str, Any]) -> None:
    """Run a command of a page, or check it where the tables say so."""
    name, *rest = command
    if name == "python" and rest[0] == "-W":
        rest = rest[2:]
    if name in OTHERS:
        OTHERS[name](*rest)
    elif name == "taming":
        run_program(programs()[rest[0]], rest[1:])
    elif name == "python" and rest[0] == "-c":
        exec(rest[1], names)
    elif name == "python" and rest[:2] == ["-m", "pytest"]:
        check_file(*(item for item in rest[2:] if "/" in item))
    elif name == "python" and rest[:2] == ["-m", "taming"]:
        run_program(programs()[rest[2]], rest[3:])
    elif name == "python" and rest[0] == "-m":
        run_program(ROOT / f"{rest[1].replace('.', '/')}.py", rest[2:])
    elif name == "python":
        run_program(ROOT / rest[0], rest[1:])
    else:
        pytest.fail(f"no table says how to try {name!r}")


def is_a_name(command: list[str]) -> bool:
    """Tell whether a command in a sentence only names a program, which is there."""
    if command[0] != "taming" or len(command) > 2 or command[-1] == "--help":
        return command[1:] in (["--help"], ["-m", "taming"])
    assert command[1] in programs()
    return True


def check_blocks(value: Any) -> None:
    """Every ``target`` is there and takes the ``params`` beside it."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        if value.get("target", "...") != "...":
            parameters, any_other = parameters_of(get_obj_from_str(value["target"]))
            assert any_other or not {*value.get("params", {})} - {*parameters}, value["target"]
        for part in value.values():
            check_blocks(part)


@pytest.fixture
def world(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_runs: TinyRuns,
    without_networks: None,
) -> Iterator[Path]:
    """A reader's folder with pictures, data and the repository's recipes; the working folder."""
    for folder in ("folder", "photos"):
        (tmp_path / folder).mkdir()
        picture(1).save(tmp_path / folder / "first.png")
        picture(2).save(tmp_path / folder / "second.png")
    picture(3).resize((192, 160)).save(tmp_path / "photo.jpg")
    picture(4).convert("L").save(tmp_path / "mask.png")
    (tmp_path / "list.txt").write_text("photos/first.png\nphotos/second.png\n")
    shutil.copy(tiny_runs.data / "images.parquet", tmp_path / "test.parquet")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TAMING_DATA", str(tiny_runs.data))
    with standing_in(Hub(), monkeypatch, tmp_path / "cache"):
        yield tmp_path
    for name, module in [*sys.modules.items()]:
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_keeps_its_word(page: str, world: Path, tiny_runs: TinyRuns) -> None:
    given = textwrap.dedent(GIVEN.get(page, ""))
    for name, recipe in {**RUNS, **OTHER_RUNS.get(page, {})}.items():
        if re.search(rf"logs/{name}\b", fill(read(page)) + given):
            shutil.copytree(tiny_runs.of(recipe), world / "logs" / name)
    for name, content in files(page).items():
        (world / name).write_text(content, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(f"import taming\n{given}", names)
    for kind, step in steps(page, world):
        if kind == "python":
            exec(compile(step, f"{page}.md", "exec"), names)
        elif kind == "yaml":
            check_blocks(yaml.safe_load(step))
        else:
            for command in step:
                if kind == "bash" or not is_a_name(command):
                    run_command(command, names)


@pytest.mark.parametrize("recipe", ["custom_small", "custom_loopy_vqgan", "custom_vqgan"])
def test_fine_tuning_begins_from_any_run(recipe: str, world: Path, tiny_runs: TinyRuns) -> None:
    shutil.copytree(tiny_runs.of(f"{recipe}.yaml"), world / "logs/run")
    shell = [step for kind, step in steps("docs/quantizers", world) if kind == "bash"]
    (words,) = (words for step in shell for words in step if "freeze=[enc" in "".join(words))
    model = instantiate_from_config(program.load(parse_arguments(words[2:])).model)
    assert model.quantize.target_length == 2.0 and not model.encoder.training
