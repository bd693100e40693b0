"""The command lines of all programs: how options are spelt, and what a mistake ends with."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from taming.util import nearest

_OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]]*=")


def spelt(argument: str) -> str:
    """Return an argument with ``_`` for each ``-`` inside the name of a long option."""
    name, sign, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}" if name.startswith("--") else argument


def program(own: str | None = None) -> str | None:
    """Return what started this program: the command of ``taming`` that set it, or its own name."""
    return getattr(sys.modules["__main__"], "PROGRAM", own)


def as_commands(text: str) -> str:
    """Name the commands of ``taming`` in place of the files of its programs.

    Example:
        >>> as_commands("python scripts/encode.py -r logs/<run>; see scripts/sample.py")
        'taming encode -r logs/<run>; see taming sample'
    """
    return re.sub(r"(?:python )?scripts/(\w+)\.py|python -m taming\.(demo)", r"taming \1\2", text)


class Parser(argparse.ArgumentParser):
    """Takes long options with ``-`` and ``_`` alike, and ends a mistake with one line.

    Options are added by their spelling with ``_``.

    Args:
        prog: Name of the program where it is no command of ``taming``; None for that of its file.
        **options: Options of `argparse.ArgumentParser`.
    """

    def __init__(self, *, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog=program(prog), **options)

    def format_help(self) -> str:
        """Return the help, which names commands of ``taming`` if one started the program."""
        return as_commands(super().format_help()) if program() else super().format_help()

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse a command line.

        Args:
            args: Arguments without the program's name; None takes those of the process.
            namespace: Object that takes the values; None for a new one.

        Raises:
            SystemExit: With status 2 and a line that names the nearest option to an unknown one.
        """
        words = [*(sys.argv[1:] if args is None else args)]
        end = words.index("--") if "--" in words else len(words)
        words[:end] = map(spelt, words[:end])
        known = tuple(self._option_string_actions)
        for word in words[:end]:  # at first: what is missing may be what is misspelt
            flag = word.partition("=")[0]
            if flag.startswith("--") and not any(option.startswith(flag) for option in known):
                self._refuse(flag)
        options, unknown = self.parse_known_args(words, namespace)
        for word in unknown:
            self._refuse(word.partition("=")[0])
        return options

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}; see --help")
        self.error(f"unknown flag {word}{nearest(word, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        """End the program with one line and status 2."""
        self.exit(2, f"error: {message}\n")


def split_overrides(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into ``key=value`` items, wherever they stand, and the rest.

    Args:
        parser: Parser of the rest; an argument after a flag that needs a value is that value.
        argv: Arguments without the program's name.

    Returns:
        The items, and the arguments for the parser.
    """
    actions = [action for action in parser._actions if action.nargs is None]
    flags = {flag for action in actions for flag in action.option_strings}
    overrides, rest = [], []
    for before, argument in zip(["", *argv], argv, strict=False):
        is_override = _OVERRIDE.match(argument) and spelt(before) not in flags
        (overrides if is_override else rest).append(argument)
    return overrides, rest
