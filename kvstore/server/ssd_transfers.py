"""Worker threads that read and write slots, and tell the event loop when they are done."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

Done = Callable[[BaseException | None], None]
_STOPPED: Final = "the SSD tier is stopping"
_COMPUTING_THREADS: Final = 2


@dataclass(slots=True)
class _Job:
    work: Callable[[], None]
    done: Done
    then: Callable[[], None] | None = None


class Transfers:
    """A pool of threads. Reads go first: somebody waits for them. Then those that are ahead of their time, then writes.

    A job's ``done`` is called on the event loop with what the work raised, or None; several at a time wake it once.
    What is computed with what was read runs in threads of its own: meanwhile the next transfer is on its way.

    Args:
        threads: how many transfers there are at a time.
        loop: where ``done`` is called.
    """

    def __init__(self, threads: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._wake = threading.Condition()
        self._computed = threading.Condition()
        self._reads: deque[_Job] = deque()
        self._ahead: deque[_Job] = deque()
        self._writes: deque[_Job] = deque()
        self._computing: deque[_Job] = deque()
        self._finished: deque[tuple[_Job, BaseException | None]] = deque()
        self._told = False
        self._stopped = False
        self.in_flight = 0
        self._transferring = threads
        self._threads = [
            threading.Thread(target=self._transfer, name=f"kvstore-ssd-{number}", daemon=True)
            for number in range(threads)
        ]
        self._threads += [
            threading.Thread(target=self._compute, name=f"kvstore-ssd-check-{number}", daemon=True)
            for number in range(_COMPUTING_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def read(
        self, work: Callable[[], None], done: Done, then: Callable[[], None] | None = None, *, ahead: bool = False
    ) -> None:
        """Have something done that somebody waits for, or with ``ahead`` will wait for.

        ``then``: what is computed with it, before it is done.
        """
        self._add(self._ahead if ahead else self._reads, _Job(work, done, then))

    def write(self, work: Callable[[], None], done: Done) -> None:
        """Have something done when no read waits."""
        self._add(self._writes, _Job(work, done))

    async def call(self, work: Callable[[], None]) -> None:
        """Have something done and wait for it.

        Raises:
            BaseException: what the work raised.
        """
        future: asyncio.Future[None] = self._loop.create_future()

        def done(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.read(work, done)
        await future

    def _add(self, queue: deque[_Job], job: _Job) -> None:
        self.in_flight += 1
        with self._wake:
            queue.append(job)
            self._wake.notify()

    def _transfer(self) -> None:
        while True:
            with self._wake:
                while not (self._reads or self._ahead or self._writes or self._stopped):
                    self._wake.wait()
                if not (self._reads or self._ahead or self._writes):
                    self._transferring -= 1
                    with self._computed:
                        self._computed.notify_all()
                    return
                job = (self._reads or self._ahead or self._writes).popleft()
            error = _raised_by(job.work)
            if error is not None or job.then is None:
                self._tell(job, error)
                continue
            with self._computed:
                self._computing.append(job)
                self._computed.notify()

    def _compute(self) -> None:
        while True:
            with self._computed:
                while not self._computing and self._transferring:
                    self._computed.wait()
                if not self._computing:
                    return
                job = self._computing.popleft()
            assert job.then is not None
            self._tell(job, _raised_by(job.then))

    def _tell(self, job: _Job, error: BaseException | None) -> None:
        with self._wake:
            self._finished.append((job, error))
            if self._told or self._stopped:
                return
            self._told = True
        self._loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        """Call ``done`` of all jobs that ended; on the event loop."""
        while True:
            with self._wake:
                if not self._finished:
                    self._told = False
                    return
                job, error = self._finished.popleft()
            self.in_flight -= 1
            try:
                job.done(error)
            except BaseException:
                # The others are told all the same.
                self._loop.call_soon(self.deliver)
                raise

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Finish what was asked for, then end; blocks. False where a call of the system does not end in time.

        Then call ``deliver``.
        """
        with self._wake:
            self._stopped = True
            # What nobody needs any more is not written: the caller has counted on none of it.
            dropped = list(self._writes)
            self._writes.clear()
            self._wake.notify_all()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        self._finished.extend((job, OSError(_STOPPED)) for job in dropped)
        return not any(thread.is_alive() for thread in self._threads)


def _raised_by(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None
