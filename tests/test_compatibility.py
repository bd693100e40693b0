"""The table of compatibility is right, and every target of the original is here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import runs
from support.compatibility import Recorder, Row, check_target, table, watched
from support.original import TARGETS, load_golden


@pytest.mark.reported(4)
@pytest.mark.parametrize("target", list(TARGETS))
def test_a_target_of_the_original_is_here(target: str) -> None:
    assert check_target(target, TARGETS[target]).failures == ()


def test_what_is_missing_is_named() -> None:
    row = check_target("taming.models.vqgan.VQModell", "")
    assert not row.passed and "VQModell" in row.failures[0]
    row = check_target("taming.models.vqgan.VQModel", "n_embed nothing")
    assert row.failures == ("takes no 'nothing'",)


def test_calls_of_scripts_are_noted() -> None:
    recorder = Recorder()
    with watched(recorder), pytest.raises(ModuleNotFoundError):
        runs.call("nothing")
    assert recorder.used[""] == {("script", "nothing")}


def test_recorded_outputs_that_are_opened_are_noted(shared: Path) -> None:
    recorder = Recorder()
    with watched(recorder):
        load_golden(shared, "vqmodel")
    assert recorder.used[""] == {("golden", "vqmodel")}


def report(test: str, outcome: str) -> Any:
    return SimpleNamespace(nodeid=test, outcome=outcome)


def test_a_row_passes_if_all_its_tests_do() -> None:
    recorder = Recorder()
    for test, outcomes in {
        "a.py::one[x.yaml-2]": ["passed", "passed", "passed"],
        "a.py::two": ["passed", "failed", "passed"],
        "a.py::three": ["passed", "passed", "failed"],
        "a.py::four": ["skipped", "passed"],
        "test_state_dict.py::five[x.yaml]": ["passed", "passed", "passed"],
    }.items():
        recorder.pytest_runtest_logstart(test)
        if test.endswith(("two", "four")):
            recorder.note("golden", "vq")
        if test.endswith("four"):
            recorder.note("script", "s")
        for outcome in outcomes:
            recorder.pytest_runtest_logreport(report(test, outcome))
    assert recorder.row("config", "x.yaml") == Row("config", "x.yaml", 1)
    assert recorder.row("state dict", "x.yaml") == Row("state dict", "x.yaml", 1)
    assert recorder.row("golden", "vq") == Row("golden", "vq", 1, ("a.py::two",))
    assert recorder.outcomes["a.py::three"] == "failed"
    skipped = recorder.row("script", "s")
    assert skipped.checks == 0 and not skipped.passed
    assert recorder.row("golden", "never opened") == Row("golden", "never opened", 0)


def test_the_table_names_what_failed() -> None:
    rows = [Row("golden", "a", 2), Row("script", "b", 0), Row("target", "c", 1, ("it is gone",))]
    lines = table(rows).splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["pass", "checked)"]
    assert lines[3].endswith("FAIL") and lines[-2] == "1 of 3 pass"
    assert lines[-1] == "target c: it is gone"
