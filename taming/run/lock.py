"""Locks that keep a run's folder, or a piece of work, to one process, and end with it."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "lock"  # of the file in the run's folder
BEAT = 15.0  # seconds between the signs of life that other machines see
EXPIRY = 60.0  # seconds without one after which the process counts as dead


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which must exist.

    Raises:
        ValueError: Another process holds it; names it.
    """
    with held(folder / NAME) as owner:
        if owner is not None:
            raise ValueError(
                f"the run {folder} is in use by {owner or 'another process'}: wait until it has "
                f"ended; if its machine is down, until {EXPIRY:.0f} s have passed"
            )
        for part in folder.glob("checkpoints/*.part"):  # of processes that were killed
            part.unlink(missing_ok=True)
        yield


@contextmanager
def held(path: Path) -> Iterator[str | None]:
    """Hold a lock if it is free: yield None, or else the name of its owner, which may be empty.

    The file names the host and the process. The system releases its lock when the process dies. On
    file systems whose locks do not reach other machines, or have none, the file counts as long as
    its time is less than a minute old by the file system's own clock: its owner renews it.
    """
    owner, file = _acquire(path)
    if file is None:
        yield owner
        return
    done = threading.Event()

    def show_life() -> None:
        while not done.wait(BEAT):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=show_life, name="lock", daemon=True).start()
    try:
        yield None
    finally:
        done.set()
        os.ftruncate(file, 0)
        with suppress(OSError):  # the folder is gone, or Windows keeps an open file
            path.unlink()
        os.close(file)


def _acquire(path: Path) -> tuple[str, int | None]:
    """Return the owner, and the open, locked file with this process in it if that is the owner."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        owner = os.read(file, 200).decode(errors="replace").strip()
        has_locks = _lock(file)
        # On this machine, a lock that is free belongs to a process that has died.
        is_local = has_locks and owner.endswith(f" on {socket.gethostname()}")
        if has_locks is None or (owner and not is_local and _is_fresh(path)):
            os.close(file)
            return owner, None
        if os.fstat(file).st_nlink > 0:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return "", file
        os.close(file)  # its owner removed it just now


def _lock(file: int) -> bool | None:
    """Try to lock; return False on a system without locks, None if another process has the lock.

    These locks are the process's own: loader processes, which live on for seconds, inherit none.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return None
    except OSError:
        return False
    return True


def _is_fresh(path: Path) -> bool:
    """Return True if the file's owner showed signs of life within `EXPIRY`."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    probe.touch()  # the time now, by the clock that dates the file
    try:
        return probe.stat().st_mtime - path.stat().st_mtime < EXPIRY
    finally:
        probe.unlink()
