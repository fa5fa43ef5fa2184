"""The processes of the stress, seen from the command: started, given roles, watched, reaped."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import IO, Any, Final, Self

import msgspec

from kvstore.cli.stress.worker import load_roles
from kvstore.errors import DeadlineExceeded, KVStoreError

__all__ = ["Crew", "Worker", "WorkerDied", "wait_for_any"]

_START_S: Final = 120.0
"""For machines without a cache, where each process compiles everything."""

LIMIT_SLACK_S: Final = 30.0
"""Seconds that a role may take beyond its time until it counts as hanging and is killed, by itself."""

_TAIL_BYTES: Final = 2000


class WorkerDied(KVStoreError):
    """A process of the stress ended although nobody ended it; the message says how."""


class Worker:
    """One process. Not for several threads."""

    def __init__(self) -> None:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
        if "KVSTORE_CACHE_DIR" in os.environ:
            environ["KVSTORE_CACHE_DIR"] = os.environ["KVSTORE_CACHE_DIR"]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvstore.cli.stress.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a terminal's Ctrl+C is for the command, which then ends its processes
        )
        self._input = b""
        self._messages: list[tuple[str, Any]] = []
        self.busy = False
        self.killed = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def begin(self, role: str, seconds: float, /, **arguments: object) -> None:
        """Have it play a role for about so many seconds."""
        self.busy = True
        self._tell({"role": role, "limit_s": seconds + LIMIT_SLACK_S, "arguments": arguments})

    def stop(self) -> None:
        """Have it end its role."""
        self._tell({"stop": True})

    def _tell(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # found out where its answer is awaited
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; one that ends it is expected to."""
        self.killed = self.killed or number is signal.SIGKILL
        self._process.send_signal(number)

    def fileno(self) -> int:
        """Readable when it says something."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def poll(self) -> list[tuple[str, Any]]:
        """What it said since the last call; to be called when it is readable."""
        data = os.read(self.fileno(), 1 << 16)
        if not data:
            raise WorkerDied(self._death())
        *lines, self._input = (self._input + data).split(b"\n")
        said = [next(iter(msgspec.json.decode(line).items())) for line in lines]
        if any(kind in ("done", "failed") for kind, _ in said):
            self.busy = False
        return said

    def wait(self, kind: str, deadline: float) -> Any:
        """The content of its next message of that kind.

        Raises:
            WorkerDied: it ended, or its role failed.
            DeadlineExceeded: it did not say it in time.
        """
        while True:
            while self._messages:
                said, content = self._messages.pop(0)
                if said == "failed":
                    raise WorkerDied(str(content))
                if said == kind:
                    return content
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self], [], [], left_s)[0]:
                raise DeadlineExceeded(f"process {self.pid} of the stress did not say {kind!r} in time")
            self._messages += self.poll()

    def _death(self) -> str:
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return f"process {self.pid} closed its output"
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        end = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _TAIL_BYTES, max(end - _TAIL_BYTES, 0)).decode("utf-8", "replace")
        return f"process {self.pid} {how}: {tail.strip() or 'it said nothing'}"

    def close(self) -> None:
        """End it, however it is, and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()


class Crew:
    """A number of processes that are used again for one stage after the other. A context manager."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def hire(self, count: int) -> list[Worker]:
        """So many idle processes; what is missing, dead or busy with an old role is replaced, all at once.

        Raises:
            WorkerDied, DeadlineExceeded: one did not start.
        """
        for worker in list(self.workers):
            if worker.busy or not worker.alive:
                self.dismiss(worker)
        # Compiled here first, where that was not done on this machine yet, and not by all of them at once.
        load_roles()
        fresh = [Worker() for _ in range(count - len(self.workers))]
        self.workers += fresh
        deadline = time.monotonic() + _START_S
        for worker in fresh:
            worker.wait("ready", deadline)
        return self.workers[:count]

    def recruit(self) -> Worker:
        """One more, which plays the role that it is given as soon as it has started."""
        self.workers.append(Worker())
        return self.workers[-1]

    def dismiss(self, worker: Worker) -> None:
        """End one."""
        self.workers.remove(worker)
        worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self.workers:
            self.dismiss(self.workers[0])


def wait_for_any(workers: list[Worker], timeout_s: float) -> list[Worker]:
    """Those of the workers that have something to say, after at most so many seconds."""
    return select.select(workers, [], [], max(timeout_s, 0.0))[0]
