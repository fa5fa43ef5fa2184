"""The baseline: a blocking ROUTER in its own process that sends back the frames it gets.

It does what any server over ZeroMQ must do and nothing else, so its times are what a daemon is measured against.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

import zmq

from kvstore.cli.bench.process import READY, ChildProcess
from kvstore.cli.own_directory import fresh_path, own_directory

__all__ = ["echo_server", "serve"]

_START_SECONDS: Final = 30.0


@contextlib.contextmanager
def echo_server() -> Iterator[str]:
    """Run the echo server in a process of its own, which ends with the block or with us; gives its endpoint.

    Raises:
        DaemonUnavailable: it did not start.
    """
    with own_directory(fresh_path("kvstore-echo-")) as directory:
        endpoint = f"ipc://{directory / 'echo.sock'}"
        with ChildProcess("the echo server", "kvstore.cli.bench.echo", endpoint) as child:
            child.wait_until_ready(time.monotonic() + _START_SECONDS)
            yield endpoint


def serve(endpoint: str) -> None:
    """Echo until standard input ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    print(READY, flush=True)
    threading.Thread(target=_end_with_input, daemon=True).start()
    receive, send = socket.recv_multipart, socket.send_multipart
    while True:
        send(receive())


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
