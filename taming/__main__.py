"""The command ``taming``: each command runs ``main.py``, a program of ``scripts/`` or the demo."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from taming.run.parser import as_commands
from taming.util import home, nearest


def programs() -> dict[str, Path]:
    """Return the programs by the name of their command: ``train`` first, then all scripts.

    ``demo`` is the page in the browser; scripts/demo.py is what ``make demo`` runs.
    """
    scripts = {path.stem: path for path in sorted(home().glob("scripts/*.py"))}
    page = Path(__file__).parent / "demo/__main__.py"
    return {"train": home() / "main.py", **scripts, "demo": page}


def usage() -> str:
    """Return the list of commands, each with the first line of its program's docstring."""
    lines = ["usage: taming COMMAND [arguments], or taming COMMAND --help", ""]
    for name, path in programs().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        line = text.partition("\n")[0].partition(": ``")[0].replace("`", "")
        lines.append(f"  {name:20} {as_commands(line).rstrip('.')}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first argument names, with the others.

    Args:
        argv: Arguments without the command's own name; None takes those of the process.

    Raises:
        SystemExit: As the program ends; with status 2 if there is no such command.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return
    if name not in programs():
        sys.stderr.write(f"error: there is no command {name!r}{nearest(name, programs())}\n")
        sys.exit(2)
    path = str(programs()[name])
    sys.argv = [path, *rest]  # which Lightning starts again for each further process
    runpy.run_path(path, {"PROGRAM": f"taming {name}"}, run_name="__main__")


if __name__ == "__main__":
    main()
