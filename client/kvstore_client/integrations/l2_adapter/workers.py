"""Tasks on threads of their own, and their results until they are taken."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, TypeVar

__all__ = ["Results", "Workers"]

R = TypeVar("R")

_log: Final = logging.getLogger("kvstore_client")


class Results(Generic[R]):
    """Results by task, each taken once; whoever waits for them is told by ``notify``."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._lock = threading.Lock()
        self._results: dict[int, R] = {}

    def put(self, task: int, result: R) -> None:
        """Keep a result, and say that there is one."""
        with self._lock:
            self._results[task] = result
        self._notify()

    def take(self, task: int) -> R | None:
        """A task's result, None where there is none (any more)."""
        with self._lock:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, R]:
        """All results."""
        with self._lock:
            results, self._results = self._results, {}
        return results


class Workers:
    """Threads for one kind of task. Each task that was taken is run, also after ``close``; then it is told to end.

    Args:
        name: of the threads.
        threads: tasks at a time.
        timeout_s: of a task, its waiting included: then ``ended()`` is true.
    """

    def __init__(self, name: str, threads: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._closing = False
        self._pool = ThreadPoolExecutor(threads, f"kvstore-l2-{name}")

    def submit(self, run: Callable[[Callable[[], bool]], None]) -> bool:
        """Have a task run, given ``ended``; False where it is too late for that."""
        deadline = time.monotonic() + self._timeout_s

        def ended() -> bool:
            return self._closing or time.monotonic() >= deadline

        def work() -> None:
            try:
                run(ended)
            except Exception as error:
                _log.error("kvstore L2 adapter: a task failed: %r", error, exc_info=error)

        try:
            self._pool.submit(work)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """End tasks as soon as they look, and wait for them: each waits for the store a bounded time."""
        self._closing = True
        self._pool.shutdown(wait=True)
