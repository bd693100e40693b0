"""Laws of every program's options: two spellings, and the nearest to one that there is not."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import main as program
from taming.demo import __main__ as page
from taming.run.parser import Parser, split_overrides

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "train": lambda: program.main([]),
    "demo page": lambda: page.main(),
    **{
        path.stem: lambda name=path.stem: importlib.import_module(f"scripts.{name}").main()
        for path in sorted(ROOT.glob("scripts/*.py"))
    },
}


class Built(Exception):
    """A program is about to parse its command line."""


@pytest.fixture(params=PROGRAMS)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parser]:
    """The parser of a program, which takes any of its options alone."""

    def stop(self: Parser, *given: Any) -> None:
        raise Built(self)

    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", [str(request.param)])
        patch.setattr(Parser, "parse_args", stop)
        with pytest.raises(Built) as built:
            PROGRAMS[request.param]()
    parser: Parser = built.value.args[0]
    for action in parser._actions:
        action.required, action.type = False, None
    yield parser


def long_options(parser: Parser) -> list[tuple[argparse.Action, str]]:
    return [(a, o) for a in parser._actions for o in a.option_strings if o.startswith("--")]


def test_every_option_is_taken_in_both_spellings(parser: Parser) -> None:
    for action, option in long_options(parser):
        if option == "--help":
            continue
        value = [] if action.nargs == 0 else [str([*(action.choices or ["1"])][0])]
        dashed = "--" + option[2:].replace("_", "-")
        shown = parser.parse_args([option, *value])
        assert parser.parse_args([dashed, *value]) == shown
        if value:
            assert parser.parse_args([f"{dashed}={value[0]}"]) == shown


def test_a_misspelt_option_is_told_the_nearest(
    parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, option in long_options(parser):
        wrong = f"{option}{option[-1]}"
        if wrong in parser._option_string_actions:
            continue
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([wrong, "1"])
        assert stop.value.code == 2
        expected = f"error: unknown flag {wrong}; did you mean {option!r}?\n"
        assert capsys.readouterr() == ("", expected)


def test_what_is_misspelt_is_named_before_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = Parser()
    parser.add_argument("--out_dir", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--out-dri", "x"])
    assert "unknown flag --out_dri; did you mean '--out_dir'?" in capsys.readouterr().err


def test_dashes_alone_are_no_likeness(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--outdir")
    with pytest.raises(SystemExit):
        parser.parse_args(["--tokenizer", "photos"])
    error = capsys.readouterr().err
    assert "unknown flag --tokenizer; valid: " in error and "did you mean" not in error


def test_values_keep_their_spelling() -> None:
    parser = Parser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--out_dir")
    options = parser.parse_args(["--out-dir=a-b=c-d", "a-b", "--", "--e-f"])
    assert (options.files, options.out_dir) == (["a-b", "--e-f"], "a-b=c-d")
    assert split_overrides(parser, ["--out-dir", "a=1", "b=2"]) == (["b=2"], ["--out-dir", "a=1"])
