"""The end of a run by signals, and by the death of another of its processes on this machine.

An error raised wherever a signal happens to arrive leaves locks held and collective operations half
done. While training, a signal is therefore only noted; `LastCheckpoint` lets all processes agree on
it after a batch. At other times there is nothing to save, and it ends the program at once. A thread
sees to it that the program ends even if its main thread hangs, such as in a collective operation
with a process that has died.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any

logger = logging.getLogger(__name__)

GRACE = 20.0  # seconds for the main thread to end by itself
DEBOUNCE = 0.2  # seconds within which programs such as make pass a Ctrl-C on a second time
PERIOD = 0.5  # seconds between looks at the other processes

# Environment variable with the process id of the process that started this one.
PARENT = "TAMING_PARENT"


class Request(IntEnum):
    """What a signal asks of a run, by urgency."""

    NOTHING = 0
    SAVE = 1
    TERMINATE = 2
    INTERRUPT = 3

    @property
    def ends(self) -> bool:
        """True if it asks the run to end."""
        return self in STATUS


STATUS = {Request.TERMINATE: 128 + signal.SIGTERM, Request.INTERRUPT: 128 + signal.SIGINT}
REQUESTS: dict[int, Request] = {
    signal.SIGTERM: Request.TERMINATE,
    signal.SIGINT: Request.INTERRUPT,
}
if hasattr(signal, "SIGUSR1"):  # Windows has none
    REQUESTS[signal.SIGUSR1] = Request.SAVE


class Interrupted(SystemExit):
    """A signal ended the program, with the exit status that a shell shows for it."""

    def __init__(self, request: Request) -> None:
        super().__init__(STATUS[request])


def describe_status(status: int) -> str:
    """Put the status of a `subprocess.Popen` that failed in words."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}; its own message tells why"


class Watch:
    """Signals that this process received, and the state of its parent and children.

    Attributes:
        is_active: True within `handling`.
        is_polled: True while somebody asks for `request` after every batch; signals that end the
            program do so at once otherwise.
        request: Most urgent request received; that to save goes when a checkpoint is saved.
    """

    def __init__(self) -> None:
        self.is_active = False
        self._reset()

    def _reset(self) -> None:
        self.is_polled = False
        self.request = Request.NOTHING
        self._pid = self._parent = self._interrupts = 0
        self._last_interrupt = 0.0
        self._children: list[tuple[int, subprocess.Popen[Any]]] = []
        self._deadline: float | None = None
        self._death: str | None = None
        self._died = threading.Event()
        self._is_closing = False

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle signals, except those that have a handler or are ignored already.

        Raises:
            Interrupted: In place of whatever else ended the program, if a signal asked it to end.
            SystemExit: With status 1, in place of an error in talking to a process that died.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are not for this thread
            return
        self._take_signals()
        self._parent = int(os.environ.get(PARENT) or 0)
        thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
            self._join_children()
        except Interrupted:
            self._join_children()
            raise
        except BaseException as error:
            if self.request.ends:
                raise Interrupted(self.request) from error
            # Collective operations raise a RuntimeError when a process is gone.
            if self._death and isinstance(error, RuntimeError):
                logger.error("error: %s", self._death)
                raise SystemExit(1) from error
            raise
        finally:
            self.leave_signals()
            self._writer.send(b"\0")  # wakes the thread
            thread.join()
            self._reader.close()
            self._writer.close()
            self._reset()

    def _take_signals(self) -> None:
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        handlers: dict[int, Any] = dict.fromkeys(REQUESTS, self._handle)
        if hasattr(signal, "SIGUSR2"):
            handlers[signal.SIGUSR2] = lambda *_: breakpoint()
        handlers = {n: h for n, h in handlers.items() if signal.getsignal(n) in defaults}
        self._before = {n: signal.signal(n, handler) for n, handler in handlers.items()}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # The thread learns of a signal even if the main thread does not get to its handler.
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._pid, self.is_active = os.getpid(), True

    def leave_signals(self) -> None:
        """Give signals back to the handlers that they had before."""
        if self.is_active:
            self.is_active = False
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def watch_children(self, children: Sequence[subprocess.Popen[Any]], first_rank: int) -> None:
        """End this process when one of the children dies; they have consecutive ranks."""
        self._children = list(enumerate(children, start=first_rank))

    def find_death(self, seconds: float = 2.0) -> None:
        """Wait for news of a process that died, of which an error may be the consequence.

        The main thread, which does not hang then, has all the time that it needs to save.
        """
        if self.is_active and (self._children or self._parent) and self._died.wait(seconds):
            self._deadline = None

    def end(self, request: Request) -> None:
        """End the program if the signal asks for it, within `GRACE` even if something hangs.

        Raises:
            Interrupted: It does.
        """
        if request.ends:
            self.request = max(request, self.request)
            self._deadline = time.monotonic() + GRACE
            raise Interrupted(self.request)

    def saved(self) -> None:
        """Note that a checkpoint was saved, which is all that SIGUSR1 asks for."""
        if not self.request.ends:
            self.request = Request.NOTHING

    def _handle(self, number: int, frame: Any) -> None:
        was_ending = self.request.ends
        self.request = max(REQUESTS[number], self.request)
        if not was_ending and not self.is_polled:
            self.end(self.request)

    # --- in the thread ---------------------------------------------------------------------------

    def _watch(self) -> None:
        while self.is_active:
            if select.select([self._reader], [], [], PERIOD)[0]:
                self._count_interrupts(self._reader.recv(64))
            if not self._is_closing:
                self._look_at_processes()
            if self._deadline is not None and time.monotonic() > self._deadline:
                if self._death:
                    sys.stderr.write(f"error: {self._death}\n")
                self._exit(STATUS.get(self.request, 1))

    def _count_interrupts(self, received: bytes) -> None:
        now = time.monotonic()
        if signal.SIGINT in received:
            self._interrupts += now - self._last_interrupt > DEBOUNCE
            self._last_interrupt = now
        if self._interrupts > 1:
            self._exit(STATUS[Request.INTERRUPT])

    def _look_at_processes(self) -> None:
        for rank, child in self._children:
            if status := child.poll():
                self._note(rank, child.pid, status)
        if self._parent and os.getppid() != self._parent:
            self._note(0, self._parent, None)

    def _note(self, rank: int, pid: int, status: int | None) -> None:
        """Take note that a process has ended too early, the first time."""
        if self._deadline is not None or self._death:
            return
        self._deadline = time.monotonic() + GRACE
        for number in (signal.SIGTERM, signal.SIGINT):
            if status in (-number, 128 + number):  # as if this process had received the signal
                if not self.request.ends:
                    os.kill(self._pid, number)
                return
        what = "has ended" if status is None else describe_status(status)
        host = socket.gethostname()
        self._death = f"process {rank} (pid {pid} on {host}), on which this one depends, {what}"
        self._died.set()

    def _exit(self, status: int) -> None:
        for _, child in self._children:
            child.kill()
        sys.stderr.flush()
        os._exit(status)

    def _join_children(self) -> None:
        """Wait until the children, which end now too, are gone."""
        self._is_closing = True
        latest = time.monotonic() + GRACE
        for _, child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, latest - time.monotonic()))
            child.kill()


watch = Watch()  # signals belong to the process, so there is one of it
if hasattr(os, "register_at_fork"):  # a forked process, such as a loader's, is not watched
    os.register_at_fork(after_in_child=watch.leave_signals)
