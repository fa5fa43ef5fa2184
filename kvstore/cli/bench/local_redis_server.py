"""A ``redis-server`` of our own: on a unix socket in a temporary folder, without persistence, gone with us.

Left out, with a row that says so, where the server or the package ``redis`` is not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from kvstore.cli.bench.process import READY, ChildProcess
from kvstore.cli.own_directory import fresh_path, own_directory

__all__ = ["Redis", "redis_server", "why_not"]

_SERVER: Final = "redis-server"
_START_SECONDS: Final = 20.0


class Redis(Protocol):
    """What is used of ``redis.Redis``."""

    def ping(self) -> bool:
        """Ask whether it answers."""

    def get(self, name: bytes) -> bytes | None:
        """Ask for one value."""

    def mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Ask for several."""

    def set(self, name: bytes, value: object) -> bool:
        """Store one; a value has a buffer."""

    def flushall(self) -> bool:
        """Remove all."""

    def close(self) -> None:
        """Close the connection."""


def why_not() -> str:
    """Why Redis cannot be measured here, "" where it can."""
    if shutil.which(_SERVER) is None:
        return f"{_SERVER} is not installed"
    if importlib.util.find_spec("redis") is None:
        return "the Python package redis is not installed"
    return ""


@contextlib.contextmanager
def redis_server() -> Iterator[Redis]:
    """Run a server of our own, which ends with the block or with us; gives a connected client.

    Raises:
        DaemonUnavailable: it did not start.
    """
    with (
        own_directory(fresh_path("kvstore-redis-")) as directory,
        ChildProcess("redis", "kvstore.cli.bench.local_redis_server", str(directory)) as child,
    ):
        child.wait_until_ready(time.monotonic() + _START_SECONDS)
        redis = _connect(str(directory))
        try:
            yield redis
        finally:
            redis.close()


def _connect(directory: str) -> Redis:
    redis: Redis = importlib.import_module("redis").Redis(unix_socket_path=str(Path(directory) / "redis.sock"))
    return redis


def serve(directory: str) -> None:
    """Run the server until standard input ends."""
    command = [_SERVER, "--port", "0", "--unixsocket", "redis.sock", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
        end = time.monotonic() + _START_SECONDS
        errors = importlib.import_module("redis").exceptions
        while server.poll() is None and time.monotonic() < end:
            redis = _connect(directory)
            try:
                redis.ping()
            except errors.ConnectionError:
                time.sleep(0.02)
            else:
                print(READY, flush=True)
                break
            finally:
                redis.close()


def _end_with_input(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    server.kill()
    server.wait()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
