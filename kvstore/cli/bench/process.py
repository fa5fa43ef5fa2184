"""Processes that a measurement needs beside itself: they say when they are ready and end with their starter.

A child prints one line (``READY``, or what went wrong) and then lives until its standard input ends, which also
happens when the starter dies. Some are asked things meanwhile: a line for them, a line back.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Final, Self

from kvstore.errors import DaemonUnavailable, DeadlineExceeded

__all__ = ["READY", "ChildProcess"]

READY: Final = "ready"
_END_SECONDS: Final = 10.0


class ChildProcess:
    """``python -m MODULE ARGUMENTS...`` with this process's import path. A context manager; starts when made.

    Args:
        what: names the child in errors.
        module: to run.
        arguments: its command line.
    """

    def __init__(self, what: str, module: str, *arguments: str) -> None:
        self._what = what
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a terminal's Ctrl+C is for the command, which then ends its children
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait_until_ready(self, deadline: float) -> None:
        """Wait for the child's line.

        Args:
            deadline: of ``time.monotonic()``.

        Raises:
            DaemonUnavailable: it failed, ended, or said nothing in time.
        """
        if not self.has_answer(deadline - time.monotonic()):
            raise DaemonUnavailable(f"{self._what} was not ready in time; the machine may be too busy")
        line = self._line()
        if line != READY:
            raise DaemonUnavailable(f"{self._what} did not start: {line or 'its process ended'}")

    def tell(self, line: str) -> None:
        """Send a line, whose answer ``answer`` gives.

        Raises:
            DaemonUnavailable: its process ended.
        """
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(f"{line}\n".encode())
            pipe.flush()
        except BrokenPipeError:
            raise DaemonUnavailable(f"{self._what} ended: {self._line() or 'it said nothing'}") from None

    def has_answer(self, timeout_s: float = 0.0) -> bool:
        """Whether a line of the child is there, or its output ended, within so many seconds."""
        output = self._process.stdout
        assert output is not None
        readable, _, _ = select.select([output], [], [], max(0.0, timeout_s))
        return bool(readable)

    def answer(self, deadline: float) -> str:
        """The line that answers what the child was told.

        Args:
            deadline: of ``time.monotonic()``.

        Raises:
            DeadlineExceeded: it said nothing in time.
            DaemonUnavailable: its process ended.
        """
        if not self.has_answer(deadline - time.monotonic()):
            raise DeadlineExceeded(f"{self._what} did not answer in time; the machine may be too busy")
        line = self._line()
        if not line:
            raise DaemonUnavailable(f"{self._what} ended while it was asked")
        return line

    def _line(self) -> str:
        output = self._process.stdout
        assert output is not None
        return output.readline().decode("utf-8", "replace").strip()

    def close(self) -> None:
        """End the child and wait for it."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a line that it did not read
                    pipe.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
