"""Daemons that start in a tenth of a second: forked from a process that has imported everything.

``Nursery`` is that process, as a test sees it; as a program this module is the process. Daemons are its children, with
the wrapped files of ``killed_daemon``, and end with it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from daemon_process import DaemonProcess, child_environment
from killed_daemon import Control


class ForkedProcess:
    """What of ``subprocess.Popen`` a ``DaemonProcess`` uses, for a child of the nursery."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery
        self._fd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"daemon {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        if self.returncode is None and select.select([self._fd], [], [], timeout_s)[0]:
            self.returncode = int(self._nursery.ask({"reap": self.pid}))
            os.close(self._fd)
        return self.returncode


class Nursery:
    """Makes daemon processes; a context manager."""

    def __enter__(self) -> Self:
        # A library's thread would not live in the children.
        environ = child_environment({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(10)
            finally:
                self._process.kill()

    def ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the nursery ended"
        return answer

    def fork(self, arguments: list[str], environ: dict[str, str], log: Path) -> ForkedProcess:
        pid = self.ask({"arguments": arguments, "environ": environ, "log": str(log)})
        return ForkedProcess(self, int(pid))

    @property
    def pid(self) -> int:
        return self._process.pid


class ForkedDaemon(DaemonProcess):
    """A ``DaemonProcess`` from a nursery, under a test's control."""

    def __init__(self, nursery: Nursery, control: Control, *arguments: str, **options: Any) -> None:
        super().__init__(*arguments, environ=control.environ(), **options)
        self._nursery = nursery

    def spawn(self, *arguments: str) -> Any:
        """Fork one."""
        return self._nursery.fork(
            self.serve_arguments(self._nursery.pid, *arguments), child_environment(self._environ), self._log
        )


# -------------------------------------------------------------- the nursery


def _grow_up(request: dict[str, Any]) -> None:
    """What a child does; it ends here."""
    from killed_daemon import VARIABLE, injector

    from kvstore.cli.main import main

    status = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, at in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, at)
        os.close(log)
        os.close(null)
        os.environ.clear()
        os.environ.update(request["environ"])
        injector.follow(Path(os.environ[VARIABLE]))
        sys.argv[1:] = request["arguments"]
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve_requests() -> None:
    import killed_daemon

    killed_daemon.wrap()
    # What a daemon imports when it serves, with the compiled code.
    for name in ("kvstore.cli.main", "kvstore.server.app"):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a library made threads, which would not live in the children"
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if not pid:
            _grow_up(request)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve_requests()
