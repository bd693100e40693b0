"""Check that everything is here that users of taming-transformers depend on.

python tests/support/compatibility.py

Runs the real checks and prints one table: every recorded output of the original ("golden"), every
configuration, every target with its parameters, every published state dict and every script. What
no check covers fails as well. The exit status is 1 if anything fails. The recorded outputs are
expected where tests look for them; see the fixture ``shared`` in tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # in place of this file's own folder
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

import safetensors  # noqa: E402
from conftest import SHARED  # noqa: E402
from support import runs  # noqa: E402
from support.original import CONFIGS, SCRIPTS, TARGETS  # noqa: E402

from taming.signatures import parameters_of  # noqa: E402
from taming.util import get_obj_from_str  # noqa: E402


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        kind: golden, config, target, state dict or script.
        name: Name of what is checked.
        checks: Number of checks that were made.
        failures: Problems, one sentence or test each.
    """

    kind: str
    name: str
    checks: int
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if it was checked and nothing failed."""
        return self.checks > 0 and not self.failures


class Recorder:
    """A plugin of pytest: records what each test used, and how it ended.

    Attributes:
        used: Test -> (kind, name) of all that it opened, called or was about.
        outcomes: Test -> passed, failed or skipped; failed if any of its phases did.
    """

    def __init__(self) -> None:
        self.used: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.outcomes: dict[str, str] = {}
        self._running = ""

    def note(self, kind: str, name: str) -> None:
        """Note that the running test uses something."""
        self.used[self._running].add((kind, name))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins; its parameters may name the configuration or model it is about."""
        self._running = nodeid
        parameters = nodeid.partition("[")[2].removesuffix("]")
        kind = "state dict" if "test_state_dict" in nodeid else "config"
        self.used[nodeid] |= {(kind, name) for name in parameters.split("-")}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test ended; a good end does not undo what came before."""
        if self.outcomes.get(report.nodeid, "passed") == "passed":
            self.outcomes[report.nodeid] = report.outcome

    def row(self, kind: str, name: str) -> Row:
        """Sum up the tests that used something."""
        tests = [test for test, used in self.used.items() if (kind, name) in used]
        ran = [test for test in tests if self.outcomes.get(test) != "skipped"]
        failed = [test for test in ran if self.outcomes.get(test) != "passed"]
        return Row(kind, name, len(ran), tuple(failed))


@contextlib.contextmanager
def watched(recorder: Recorder) -> Iterator[None]:
    """Note in a recorder which recorded outputs are opened and which scripts are called."""
    open_file, call = safetensors.safe_open, runs.call

    def opened(path: str, *args: Any, **kwargs: Any) -> Any:
        recorder.note("golden", Path(path).stem)
        return open_file(path, *args, **kwargs)

    def called(script: str, *argv: Any) -> None:
        recorder.note("script", script)
        call(script, *argv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.safe_open", opened)
        patch.setattr("safetensors.torch.safe_open", opened)
        patch.setattr("support.original.safe_open", opened)
        patch.setattr(runs, "call", called)
        yield


def run_tests() -> Recorder:
    """Run the tests that read recorded outputs, run configurations, or call scripts."""
    recorder = Recorder()
    words = ("golden", "shipped()", "state_dict_keys", "support.runs import")
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(word in path.read_text(encoding="utf-8") for word in words)
    ]
    with contextlib.redirect_stdout(sys.stderr), watched(recorder):
        pytest.main(["-q", "--no-header", f"--rootdir={ROOT}", *files], plugins=[recorder])
    return recorder


def check_target(target: str, parameters: str) -> Row:
    """Check that a target is here, takes the original's parameters, and refuses misspelt ones."""
    try:
        taken, is_open = parameters_of(get_obj_from_str(target))
    except ValueError as error:
        return Row("target", target, 1, (str(error),))
    failures = [f"takes no {name!r}" for name in parameters.split() if name not in taken]
    if is_open and parameters:
        failures.append("takes any parameter")
    return Row("target", target, 1, tuple(failures))


def table(rows: Iterable[Row]) -> str:
    """Write rows as a table, and what failed below it."""
    rows = list(rows)
    width = max(len(row.name) for row in rows)
    lines = [f"{'kind':12}{'name':{width + 2}}{'checks':>6}  result"]
    for row in rows:
        result = "pass" if row.passed else "FAIL" if row.checks else "FAIL (not checked)"
        lines.append(f"{row.kind:12}{row.name:{width + 2}}{row.checks:>6}  {result}")
    failed = [row for row in rows if not row.passed]
    lines.append(f"\n{len(rows) - len(failed)} of {len(rows)} pass")
    for row in failed:
        lines += [f"{row.kind} {row.name}: {failure}" for failure in row.failures]
    return "\n".join(lines)


def main() -> None:
    """Check everything, print the table, and leave with its verdict."""
    upstream = SHARED / "upstream"
    if not upstream.is_dir():
        sys.exit(f"error: the original's recorded outputs are not at {upstream}")
    goldens = sorted(path.stem for path in (upstream / "golden").glob("*.safetensors"))
    published = json.loads((upstream / "state_dict_keys.json").read_text(encoding="utf-8"))
    recorder = run_tests()
    rows = [
        *(recorder.row("golden", name) for name in goldens),
        *(recorder.row("config", name) for name in CONFIGS),
        *(recorder.row("state dict", name) for name in published),
        *(check_target(target, parameters) for target, parameters in TARGETS.items()),
        *(recorder.row("script", name) for name in SCRIPTS),
    ]
    sys.stdout.write(table(rows) + "\n")
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
