"""Follow a function while it works: what it sends becomes an iterator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):  # noqa: N818
    """Ends work that nobody follows any more."""


class Send(Generic[T]):
    """What work gets to send rows with."""

    def __init__(self) -> None:
        self.rows: queue.Queue[Any] = queue.Queue()
        self.is_closed = False

    def check(self) -> None:
        """End the work if nobody follows it any more, by raising `Closed`."""
        if self.is_closed:
            raise Closed

    def __call__(self, row: T) -> None:
        """Send a row."""
        self.check()
        self.rows.put((row, None))


def followed(work: Callable[[Send[T]], None]) -> Iterator[T]:
    """Yield what work sends from a thread of its own; closing the iterator ends it.

    Args:
        work: Function that sends rows; an error that it raises is raised to the reader.

    Example:
        >>> list(followed(lambda send: [send(n) for n in range(3)]))
        [0, 1, 2]
    """
    send: Send[T] = Send()

    def run() -> None:
        error: BaseException = StopIteration()
        try:
            work(send)
        except BaseException as raised:
            error = raised
        send.rows.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (row := send.rows.get())[1] is None:
            yield row[0]
        if not isinstance(row[1], StopIteration):
            raise row[1]
    finally:
        send.is_closed = True
        thread.join()
