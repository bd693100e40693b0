"""A run's folder belongs to one process, for as long as it lives."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taming.run.lock import EXPIRY, NAME, locked
from taming.run.rundir import RunDir

HOLD = """
import sys, time
from pathlib import Path
from taming.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_until_the_first_has_died(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    part = tmp_path / "checkpoints/last.ckpt.1.part"
    holder = hold(tmp_path)
    part.touch()
    named = rf"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}"
    for _ in range(2):
        with pytest.raises(ValueError, match=named), locked(tmp_path):
            pass
    assert part.exists()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / NAME).read_text()
        assert not part.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("age", [0.2 * EXPIRY, 1.2 * EXPIRY])
def test_a_process_of_another_machine_counts_while_it_shows_life(tmp_path, age):
    lock = tmp_path / NAME
    lock.write_text("process 7 on elsewhere\n")
    seen = lock.stat().st_mtime - age
    os.utime(lock, (seen, seen))
    if age < EXPIRY:
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert "elsewhere" not in lock.read_text()


def test_an_owner_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr("taming.run.lock.BEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        for _ in range(200):
            if (tmp_path / NAME).stat().st_mtime:
                break
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime


def test_the_first_process_locks_the_folder_of_its_run(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    run.path.mkdir(parents=True)
    with run.kept_if_used():
        assert (run.path / NAME).exists()
    assert not run.path.exists()
    run.path.mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with run.kept_if_used():
        assert not (run.path / NAME).exists()
