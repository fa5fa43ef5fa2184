"""A daemon of a command's own: started as a subprocess, gone with it, no files left.

Covers: ``replay``, ``demo``, ``bench`` and tests, which need a daemon with known settings that nobody else
uses. Does not cover daemons that outlive the command, see ``kvstore serve``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from kvstore.cli.own_directory import fresh_path, own_directory
from kvstore.errors import DaemonUnavailable, DeadlineExceeded, InvalidArgument, KVStoreError
from kvstore.protocol.endpoint import IPC_PREFIX, check_endpoint, default_arena_directory, ipc_path

__all__ = ["PrivateDaemon"]

_POLL_S: Final = 0.02
_ANSWER_TIMEOUT_S: Final = 5.0
_STOP_TIMEOUT_S: Final = 15.0
_SLOWEST_POPULATION_BYTES_PER_S: Final = 100e6
_TAIL_BYTES: Final = 4096
_ERROR_PREFIX: Final = "kvstore: error: "


class PrivateDaemon:
    """Context manager around ``kvstore serve`` on a fresh endpoint, with its memory already populated.

    The daemon watches this process and ends when it dies, however it dies. Variables ``KVSTORE_*`` of the environment
    do not reach it: its settings are the arguments here and the defaults. Not for several threads.

    Args:
        capacity_bytes: capacity of the DRAM tier.
        grant_bytes: slots outside the capacity, lent for writing and in limbo.
        slab_bytes: slab size, None for automatic.
        arguments: more arguments of ``kvstore serve``, for example ``("--verify", "always")``.
        timeout_s: how long start and population may take; by default 60 s and what 100 MB/s would need.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int = 1 << 30,
        grant_bytes: int = 64 << 20,
        slab_bytes: int | None = None,
        arguments: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        self._arguments = ["--http", "off", "--capacity", str(capacity_bytes), "--grant", str(grant_bytes)]
        if slab_bytes is not None:
            self._arguments += ["--slab", str(slab_bytes)]
        self._arguments += arguments
        population_s = (capacity_bytes + grant_bytes) / _SLOWEST_POPULATION_BYTES_PER_S
        self._timeout_s = 60.0 + population_s if timeout_s is None else timeout_s
        self._files = contextlib.ExitStack()
        self._endpoint = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._stuck = False

    @property
    def endpoint(self) -> str:
        """Where the daemon answers."""
        return self._endpoint

    @property
    def pid(self) -> int:
        """The daemon's process id.

        Raises:
            KVStoreError: it was not started.
        """
        if self._process is None:
            raise KVStoreError("the private daemon is not running; use it in a 'with' statement")
        return self._process.pid

    def stderr_tail(self) -> str:
        """The last 4 KiB of what the daemon logged."""
        if self._log is None:
            return ""
        end = os.fstat(self._log.fileno()).st_size
        begin = max(0, end - _TAIL_BYTES)
        return os.pread(self._log.fileno(), end - begin, begin).decode("utf-8", "replace").strip()

    def start(self) -> None:
        """Start the daemon and wait until it answers and its arena is populated.

        Raises:
            DaemonUnavailable: it ended instead; the message is its last line, the tail of its log a note.
            DeadlineExceeded: it was not ready in time.
        """
        if self._process is not None:
            raise KVStoreError("a private daemon starts once; make another")
        directory, self._endpoint = _fresh_endpoint()
        try:
            self._files.enter_context(own_directory(directory))
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
            self._launch()
        except BaseException:
            self.close()
            raise

    def _launch(self) -> None:
        """Start a process at the endpoint and wait for it, as ``start`` does."""
        command = [sys.executable, "-P", "-m", "kvstore", "serve", "--endpoint", self._endpoint]
        command += ["--parent-pid", str(os.getpid()), *self._arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=_environment(),
            start_new_session=True,  # a terminal's Ctrl+C is for the command, which then ends the daemon
        )
        self._wait_until_populated(time.monotonic() + self._timeout_s)

    def close(self) -> None:
        """End the daemon (SIGTERM, then SIGKILL) and remove what it left; a second call does nothing."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._stuck = True
                process.kill()
                process.wait()
        self._files.close()
        if self._endpoint:
            shutil.rmtree(default_arena_directory(self._endpoint), ignore_errors=True)
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, tail = self._process, self.stderr_tail()
        self.close()
        if process is None or error is not None:
            return
        if self._stuck:
            raise KVStoreError(f"the private daemon did not end within {_STOP_TIMEOUT_S:g} s of SIGTERM")
        if process.returncode not in (0, -signal.SIGKILL, -signal.SIGTERM):
            raise self._ended_error(process.returncode, tail)

    def _wait_until_populated(self, deadline: float) -> None:
        from kvstore_client import Client

        socket = ipc_path(self._endpoint)
        while not socket.exists():
            self._wait_a_little(deadline, "opened its socket")
        while True:
            try:
                with Client(self._endpoint, timeout=_ANSWER_TIMEOUT_S) as client:
                    client.ping()
                    while True:
                        dram = client.stats().dram
                        if dram.populated_bytes >= dram.arena_bytes > 0:
                            return
                        if dram.problem:
                            raise KVStoreError(f"the private daemon's memory: {dram.problem}")
                        self._wait_a_little(deadline, "populated its memory")
            except (DaemonUnavailable, DeadlineExceeded):
                self._wait_a_little(deadline, "answered")

    def _wait_a_little(self, deadline: float, what: str) -> None:
        process = self._process
        assert process is not None
        left_s = deadline - time.monotonic()
        try:
            code = process.wait(min(_POLL_S, max(left_s, 0)))
        except subprocess.TimeoutExpired:
            if left_s <= 0:
                error = DeadlineExceeded(f"the private daemon has not {what} within {self._timeout_s:g} s")
                error.add_note(self.stderr_tail())
                raise error from None
        else:
            raise self._ended_error(code, self.stderr_tail())

    def _ended_error(self, code: int, tail: str) -> KVStoreError:
        last = tail.splitlines()[-1].removeprefix(_ERROR_PREFIX) if tail else "it said nothing"
        error = DaemonUnavailable(f"the private daemon ended with code {code}: {last}")
        error.add_note(tail)
        return error


def _fresh_endpoint() -> tuple[Path, str]:
    """A path for a directory and the endpoint in it, short enough for a unix socket."""
    for parent in (None, "/tmp"):
        directory = fresh_path("kvstore-", parent)
        with contextlib.suppress(InvalidArgument):
            return directory, check_endpoint(f"{IPC_PREFIX}{directory}/kv.sock")
    raise KVStoreError("no temporary directory is short enough for a socket; set TMPDIR to a shorter path")


def _environment() -> dict[str, str]:
    """This process's environment without kvstore's settings, and with this very package importable."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    root = str(Path(__file__).resolve().parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environ.get("PYTHONPATH", ""))))
    return environ
