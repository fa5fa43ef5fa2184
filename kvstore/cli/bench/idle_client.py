"""One idle client, as a process: connects, does what its kind does, says so, and waits until its input ends."""

from __future__ import annotations

import os
import sys
from typing import Final

from kvstore.cli.bench.process import READY
from kvstore.errors import ErrorCode, KVStoreError, RemoteError
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client

_TIMEOUT_SECONDS: Final = 30.0
"""Generous: sixteen interpreters start at once."""

_BLOCKS: Final = 32
_PAYLOAD_BYTES: Final = 3000
"""With its header in one page: sixteen clients' blocks fit into any daemon."""


def stay(endpoint: str, kind: str) -> None:
    """Hold a connected client until standard input ends."""
    namespace = Namespace(name="bench idle")
    try:
        with Client(endpoint, namespace=namespace, timeout=_TIMEOUT_SECONDS, mapped=kind == "mapped") as client:
            client.ping()
            if kind == "mapped":
                use(client)
            print(READY, flush=True)
            sys.stdin.buffer.read()
    except KVStoreError as error:
        print(error, flush=True)


def use(client: Client) -> None:
    """Put and read a chain of blocks through the mapping, by every kind of call.

    Raises:
        RemoteError: what was read is not what was put.
    """
    keys = chain_keys(range(_BLOCKS), 1, salt=str(os.getpid()).encode())
    payloads = [key * (_PAYLOAD_BYTES // len(key)) for key in keys]
    parent = None
    for key, payload in zip(keys, payloads, strict=True):
        client.put(key, payload, parent=parent, wait=False)
        parent = key
    client.flush()
    outs = [bytearray(len(payload)) for payload in payloads]
    hits = client.match(keys).hits
    client.get_into(keys[0], outs[0])
    client.get_many_into(keys[1:], outs[1:])
    with client.view(keys[-1]) as data:
        same = data is not None and bytes(data) == payloads[-1]
    if hits != len(keys) or outs != payloads or not same:
        raise RemoteError(ErrorCode.INTERNAL, f"an idle client found {hits} of its {len(keys)} blocks, or wrong bytes")


if __name__ == "__main__":
    stay(*sys.argv[1:3])
