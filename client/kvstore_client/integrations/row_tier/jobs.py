"""Transfers on threads of their own: loads before stores, bounded, and cancelled where they have not begun."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

__all__ = ["Finished", "Jobs"]

R = TypeVar("R")

_log: Final = logging.getLogger("kvstore_client")


@dataclass(frozen=True, slots=True)
class Finished(Generic[R]):
    """A job that ended.

    Attributes:
        identity: the engine's number for it.
        is_load: or a store.
        result: what it gave; None where it never began, or where it failed in a way that it must not.
        seconds: that it ran.
    """

    identity: int
    is_load: bool
    result: R | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job(Generic[R]):
    identity: int
    is_load: bool
    weight: int
    run: Callable[[Callable[[], bool]], R]
    deadline: float


class Jobs(Generic[R]):
    """Runs jobs and keeps what became of them until it is taken.

    Each job is told by ``ended()`` when to leave the rest of its work: its time is over, or the tier drains. What it
    has begun it finishes.

    Args:
        threads: jobs at a time.
        most_queued: weight of stores that may wait.
        timeout_s: of a job, its waiting included.
    """

    def __init__(self, threads: int, most_queued: int, timeout_s: float) -> None:
        self._most_queued = most_queued
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._loads: deque[_Job[R]] = deque()
        self._stores: deque[_Job[R]] = deque()
        self._queued_weight = 0
        self._finished: deque[Finished[R]] = deque()
        self._running = 0
        self._draining = False
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvstore-tier-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, identity: int, is_load: bool, weight: int, run: Callable[[Callable[[], bool]], R]) -> bool:
        """Queue a job; False where it is not taken: then it is the caller's to ``fail`` it.

        Args:
            identity: the engine's number for it.
            is_load: loads go first, and are always taken but after ``close``.
            weight: of a store against ``most_queued``.
            run: does it, given ``ended``.
        """
        job = _Job(identity, is_load, weight, run, time.monotonic() + self._timeout_s)
        with self._changed:
            if self._closed or (
                not is_load and self._queued_weight and self._queued_weight + weight > self._most_queued
            ):
                return False
            if is_load:
                self._loads.append(job)
            else:
                self._stores.append(job)
                self._queued_weight += weight
            self._changed.notify()
        return True

    def fail(self, identity: int, is_load: bool, result: R) -> None:
        """Take over a job that ended before it began."""
        with self._changed:
            self._finished.append(Finished(identity, is_load, result, 0.0))

    def take_finished(self) -> list[Finished[R]]:
        """Jobs that ended since the last time."""
        with self._changed:
            finished = list(self._finished)
            self._finished.clear()
        return finished

    def pending(self) -> int:
        """Jobs that wait or run."""
        with self._changed:
            return len(self._loads) + len(self._stores) + self._running

    def drain(self, timeout_s: float) -> bool:
        """Cancel what waits, have what runs stop where it can, and wait for it; whether nothing runs any more."""
        end = time.monotonic() + timeout_s
        with self._changed:
            self._draining = True
            try:
                self._cancel_queued()
                while self._running:
                    left_s = end - time.monotonic()
                    if left_s <= 0:
                        return False
                    self._changed.wait(left_s)
                return True
            finally:
                self._draining = self._closed

    def close(self, timeout_s: float) -> bool:
        """Drain and end the threads; whether all of them ended."""
        end = time.monotonic() + timeout_s
        with self._changed:
            self._closed = self._draining = True
            self._cancel_queued()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    # -------------------------------------------------------------- the threads

    def _cancel_queued(self) -> None:
        for job in (*self._loads, *self._stores):
            self._finished.append(Finished(job.identity, job.is_load, None, 0.0))
        self._loads.clear()
        self._stores.clear()
        self._queued_weight = 0

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._loads and not self._stores and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                if self._loads:
                    job = self._loads.popleft()
                else:
                    job = self._stores.popleft()
                    self._queued_weight -= job.weight
                self._running += 1
            begin = time.monotonic()
            result: Any = None
            try:
                if begin < job.deadline:
                    result = job.run(lambda job=job: self._draining or time.monotonic() >= job.deadline)  # type: ignore[misc]
            except Exception as error:
                _log.error("kvstore tier: job %d failed: %r", job.identity, error, exc_info=error)
            finally:
                with self._changed:
                    self._running -= 1
                    self._finished.append(Finished(job.identity, job.is_load, result, time.monotonic() - begin))
                    self._changed.notify_all()
