"""Threads that work beside the caller's.

They are kept for a while: starting one takes as long as encoding a small block. Each call wakes those that are idle and
starts what is missing; a thread that wakes up when the work is done is not waited for.

A thread that is woken often wakes on the processor of the one that woke it, and Linux leaves the two there, by turns,
for milliseconds. So a thread that finds itself on the processor of another one of the same call steps aside once.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvstore_kernels.cpu.sections import LINE_BYTES, Job, address_of

__all__ = ["run_jobs", "share_out", "work_together"]

_THREAD_BYTES: Final = 1 << 20
"""Fewer are not worth another thread, which takes a twentieth of a millisecond to wake."""
_IDLE_S: Final = 10.0
"""Threads without work end after so long."""
_CALLER: Final = object()

_current_cpu = ctypes.CDLL(None).sched_getcpu


class _Call:
    """What the threads of one call share.

    Attributes:
        work: that each of them does once.
        allowed: processors of the caller, which are those of all.
        taken: processors on which one of them has begun.
        errors: what went wrong.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.allowed = os.sched_getaffinity(0)
        self.taken = {_current_cpu()}
        self.errors: list[BaseException] = []


class _Share:
    """One thread's part in a call.

    Attributes:
        call: which.
        done: free when the thread has done its part.
    """

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.done = _thread.allocate_lock()
        self.done.acquire()
        self._owner: dict[str, object] = {}

    def belongs_to(self, who: object) -> bool:
        """Whether it does; it belongs to who asks first, for good."""
        return self._owner.setdefault("owner", who) is who

    def run(self) -> None:
        """Do the work, beside other threads."""
        try:
            self.call.work()
        except BaseException as error:
            self.call.errors.append(error)


class _Worker:
    """A thread that is kept."""

    def __init__(self) -> None:
        self._wake = _thread.allocate_lock()
        self._wake.acquire()
        self._share: _Share | None = None
        self._allowed = os.sched_getaffinity(0)
        _thread.start_new_thread(self._live, ())

    def begin(self, share: _Share) -> None:
        """Run a share. Only for who took the worker out of ``_idle``."""
        self._share = share
        self._wake.release()

    def _live(self) -> None:
        while True:
            if not self._wake.acquire(timeout=_IDLE_S):
                with contextlib.suppress(ValueError):  # It was taken just now.
                    _idle.remove(self)
                    return
                continue
            share, self._share = self._share, None
            if share is not None and share.belongs_to(self):
                self._step_aside(share.call)
                share.run()
                _idle.append(self)
                share.done.release()
            else:
                _idle.append(self)
            del share  # It keeps the call's memory.

    def _step_aside(self, call: _Call) -> None:
        """Go to a processor where none of the call's threads is, if there is one; it may be left later."""
        with contextlib.suppress(OSError):  # The processors have changed; it stays where it is.
            cpu = _current_cpu()
            free = call.allowed - call.taken
            if cpu in call.taken and free:
                self._allowed = free
                os.sched_setaffinity(0, free)
                cpu = _current_cpu()
            if self._allowed != call.allowed:
                os.sched_setaffinity(0, call.allowed)
                self._allowed = call.allowed
            call.taken.add(cpu)


_idle: Final[list[_Worker]] = []
os.register_at_fork(after_in_child=_idle.clear)


def run_jobs(jobs: Sequence[Job], threads: int) -> None:
    """Run jobs one after another.

    Args:
        jobs: to run.
        threads: at most so many run them, the caller's among them; fewer where there is little to do.
    """
    place_bytes = max(job.plan.place_bytes for job in jobs)

    def work() -> None:
        place = np.zeros(place_bytes + LINE_BYTES, np.uint8)
        begin = -(-address_of(place) // LINE_BYTES) * LINE_BYTES
        for job in jobs:
            job.run(begin)

    work_together(work, max(1, min(threads, sum(job.plane_bytes for job in jobs) // _THREAD_BYTES)))


def share_out(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Have work on things that do not depend on each other done by several threads, each with a stretch of them.

    Args:
        work: does it, given the number of the first thing and how many.
        count: of things.
        threads: at most so many work, the caller's among them.
    """
    each = max(1, -(-count // threads))
    stretches = iter(range(0, count, each))

    def take() -> None:
        for first in stretches:
            work(first, min(each, count - first))

    work_together(take, -(-count // each))


def work_together(work: Callable[[], None], threads: int) -> None:
    """Have work done by several threads.

    Args:
        work: takes what is left to do until nothing is; the caller's thread calls it, and others beside it.
        threads: at most so many, the caller's among them.
    """
    if threads == 1:
        work()
        return
    call = _Call(work)
    others = [_Share(call) for _ in range(threads - 1)]
    try:
        for share in others:
            _worker().begin(share)
        work()
    finally:
        # Whoever has begun reads and writes memory that the caller owns.
        try:
            _wait_for(others, call.errors)
        except KeyboardInterrupt as error:  # It struck between two steps of the waiting.
            call.errors.append(error)
            _wait_for(others, call.errors)
    if call.errors:
        raise call.errors[0]


def _wait_for(others: list[_Share], errors: list[BaseException]) -> None:
    """Wait until everybody who has begun is done; nobody begins any more."""
    while others:
        try:
            if others[-1].belongs_to(_CALLER):
                others.pop()
            else:
                # A ``with``: an interrupt between two calls would leave the lock taken, and it is asked for again.
                with others[-1].done:
                    others.pop()
        except KeyboardInterrupt as error:
            errors.append(error)


def _worker() -> _Worker:
    """One that is idle, or a new one."""
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()
