"""One idle client, as a process: connects, says so, and waits until its standard input ends."""

from __future__ import annotations

import sys
from typing import Final

from kvstore.cli.bench.process import READY
from kvstore.errors import KVStoreError
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client

_TIMEOUT_SECONDS: Final = 30.0
"""Generous: sixteen interpreters start at once."""


def stay(endpoint: str) -> None:
    """Hold a connected client until standard input ends."""
    try:
        client = Client(endpoint, namespace=Namespace(name="bench idle"), timeout=_TIMEOUT_SECONDS)
    except KVStoreError as error:
        print(error, flush=True)
        return
    with client:
        client.ping()
        print(READY, flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    stay(sys.argv[1])
