"""A run ends after a signal or with another of its processes, whatever its main thread does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reliability.signals import Plan, play

from taming.run.signals import PARENT, Interrupted, Request, watch

START = """
import signal, subprocess, sys, time
from taming.run import signals
from taming.run.signals import watch
signals.GRACE = 1.0
signal.signal(signal.SIGINT, signal.default_int_handler)

def hang():
    print("ready", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

with watch.handling():
"""


def program(body: str, **environment: str) -> subprocess.Popen[str]:
    """Start a program, without torch, that hangs; returns once it does."""
    started = subprocess.Popen(
        [sys.executable, "-c", START + f"    {body}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_program_that_hangs_ends_after_a_signal(number, status):
    hanging = program("hang()")
    hanging.send_signal(number)
    hanging.communicate(timeout=10)
    assert hanging.returncode == status


def test_a_second_interrupt_ends_a_program_at_once():
    training = program("watch.is_polled = True; signals.GRACE = 60; hang()")
    training.send_signal(signal.SIGINT)
    time.sleep(0.4)
    assert training.poll() is None
    training.send_signal(signal.SIGINT)
    training.communicate(timeout=5)
    assert training.returncode == 130


def test_a_child_that_dies_is_named():
    parent = program("c = subprocess.Popen(['sleep', '60']); watch.watch_children([c], 3); hang()")
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    _, errors = parent.communicate(timeout=10)
    assert parent.returncode == 1
    assert f"process 3 (pid {child} on " in errors and "was killed by SIGKILL" in errors
    assert errors.count("\n") == 1


def test_a_program_ends_with_its_parent():
    parent = subprocess.Popen(["sleep", "60"])
    orphan = program("hang()", **{PARENT: str(parent.pid)})  # no child of it: it counts as dead
    _, errors = orphan.communicate(timeout=10)
    parent.kill()
    parent.wait()
    assert orphan.returncode == 1 and f"process 0 (pid {parent.pid}" in errors


def test_what_follows_from_a_signal_ends_with_its_status():
    with pytest.raises(Interrupted) as stop, watch.handling():
        watch.is_polled = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.request is Request.TERMINATE
        raise RuntimeError("Connection closed by peer")
    assert stop.value.code == 143 and not watch.request.ends


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch.handling():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("kind", "target"),
    [pytest.param("TERM", 1, id="a signal to one"), pytest.param("KILL", 0, id="death of one")],
)
def test_two_processes_end_together(tmp_path: Path, kind, target):
    result = play(tmp_path, Plan(kind, target, processes=2, workers=1, moment=0.2))
    assert not result["wrong"], result
