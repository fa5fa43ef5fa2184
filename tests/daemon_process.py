"""Daemons for tests: a subprocess that can be ended in any way and started again at the same endpoint.

Leaving the ``with`` block stops the daemon gracefully and fails the test where it logged an error, did not end, or left
a file behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import uvloop
import zmq

from kvstore.protocol.endpoint import default_arena_directory
from kvstore_client import Client, DaemonStats, DaemonUnavailable, DeadlineExceeded

MIB = 1 << 20
START_S = 30.0
STOP_S = 20.0


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for children: the same import path, no settings of kvstore."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return environ | dict(extra or {})


def warm_up() -> None:
    """Have libraries make what they keep until the process ends, so that no test is blamed for it."""
    left, right = zmq.Context.instance().socket(zmq.PAIR), zmq.Context.instance().socket(zmq.PAIR)
    with left, right:
        left.bind("inproc://warm-up")
        right.connect("inproc://warm-up")
        left.send(bytes(1 << 20), copy=False)
        right.recv()
    zmq.Context.instance().term()
    uvloop.new_event_loop().close()
    loop = uvloop.new_event_loop()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0, poll_s: float = 0.02) -> None:
    """Poll until ``condition()`` is true; fail with its source line otherwise."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"still not true after {timeout_s:g} s"
        time.sleep(poll_s)


def wait_until_nothing_is_lent(stats: Callable[[], DaemonStats], timeout_s: float = 5.0) -> None:
    """Wait until no client holds a granted slot: those lent ahead to mapped clients come back when they idle."""
    wait_until(lambda: not (stats().dram.granted_bytes or stats().dram.limbo_bytes), timeout_s, 0.1)


@dataclass(frozen=True)
class Resources:
    """What a process uses."""

    private_bytes: int
    fds: int
    threads: int


def resources_of(pid: int) -> Resources:
    """Memory that is not shared, descriptors and threads of a process."""
    process = psutil.Process(pid)
    memory = process.memory_info()
    return Resources(memory.rss - memory.shared, process.num_fds(), process.num_threads())


class DaemonProcess:
    """``kvstore serve`` at an endpoint of its own.

    Args:
        arguments: more arguments of ``kvstore serve``.
        capacity, grant: sizes, as on the command line.
        expected_errors: names of error events that the test provokes.
        environ: more environment variables.
        program: what Python runs in place of the ``kvstore`` command, with its arguments.
    """

    def __init__(
        self,
        *arguments: str,
        capacity: str = "64MiB",
        grant: str = "16MiB",
        expected_errors: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "kvstore"),
    ) -> None:
        self._program = program
        self._arguments = ("--http", "off", "--capacity", capacity, "--grant", grant, *arguments)
        self._expected_errors = expected_errors
        self._environ = environ
        self.directory = Path(tempfile.mkdtemp(prefix="kvt-", dir="/tmp"))
        self.endpoint = f"ipc://{self.directory}/kv.sock"
        self.socket = self.directory / "kv.sock"
        self.arena_directory = default_arena_directory(self.endpoint)
        self._log = self.directory / "log"
        self._log.touch()
        self.process: subprocess.Popen[bytes] | None = None

    # -------------------------------------------------------------- life

    def spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a daemon process without waiting for it."""
        command = [sys.executable, "-P", *self._program, *self.serve_arguments(os.getpid(), *arguments)]
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=child_environment(self._environ)
            )

    def serve_arguments(self, parent_pid: int, *arguments: str) -> list[str]:
        """The arguments of ``kvstore``, for a daemon that ends with this parent."""
        common = ["serve", "--endpoint", self.endpoint, "--log-format", "json", "--parent-pid", str(parent_pid)]
        return [*common, *self._arguments, *arguments]

    def start(self, *, populated: bool = True) -> Self:
        """Start and wait until the daemon answers, and by default until all its memory is there."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        self.process = self.spawn()
        end = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, f"the daemon ended instead of serving: {self.log()}"
            assert time.monotonic() < end, f"the daemon does not serve: {self.log()}"
            try:
                with Client(self.endpoint, timeout=5.0) as client:
                    if not populated:
                        return self
                    dram = client.stats().dram
                    if dram.populated_bytes >= dram.arena_bytes:
                        return self
            except (DaemonUnavailable, DeadlineExceeded):
                pass
            time.sleep(0.02)

    def refused(self, *arguments: str) -> tuple[int, str]:
        """Exit status and last line of a daemon that does not start."""
        before = len(self.log())
        process = self.spawn(*arguments)
        try:
            status = process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the daemon started: {self.log()[before:]}") from None
        lines = self.log()[before:].strip().splitlines()
        return status, lines[-1] if lines else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not end within {STOP_S:g} s of {number.name}") from None

    def restart(self) -> Self:
        """SIGKILL, then a new daemon at the same endpoint."""
        self.kill()
        return self.start()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self._remove()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            alive = self.alive()
            status = self.terminate() if alive else None
            if error is not None:
                error.add_note(
                    f"the daemon {'lived' if alive else 'was dead'}; its log ends with:\n{self.log()[-2000:]}"
                )
            else:
                assert not alive or status == 0, f"exit status {status}: {self.log()}"
                assert not self.errors(), f"the daemon logged errors: {self.errors()}"
                if alive:
                    assert self.files() == [], f"the daemon left files: {self.files()}"
        finally:
            self._remove()

    def _remove(self) -> None:
        if self.alive():
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.arena_directory, ignore_errors=True)

    # -------------------------------------------------------------- looking at it

    def log(self) -> str:
        """Everything that it logged."""
        return self._log.read_text("utf-8", "replace")

    def events(self) -> list[dict[str, Any]]:
        """Logged events."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def errors(self) -> list[dict[str, Any]]:
        """Error events that no test expects, and lines that are no events (tracebacks)."""
        found = [
            event
            for event in self.events()
            if event["level"] == "error" and not any(event["event"].startswith(name) for name in self._expected_errors)
        ]
        return found + [{"line": line} for line in self.log().splitlines() if line.startswith("Traceback")]

    def files(self) -> list[str]:
        """Files of daemons at this endpoint: socket, locks, arena, sessions, and their directory."""
        left = [str(path) for path in self.directory.iterdir() if path != self._log]
        if self.arena_directory.exists():
            left += [str(self.arena_directory), *map(str, self.arena_directory.iterdir())]
        return left

    def resources(self) -> Resources:
        """What the daemon uses now."""
        return resources_of(self.pid)

    def connect(self, **options: Any) -> Client:
        """A blocking client."""
        return Client(self.endpoint, **options)


@contextmanager
def script(source: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python child that runs ``source``, with pipes as text; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", source, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
        **options,
    )
    try:
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        process.wait()


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that a child prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the child ended with {process.wait()}"
    return line.strip()
