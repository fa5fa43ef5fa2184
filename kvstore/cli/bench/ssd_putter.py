"""A process that puts chain after chain from the moment it is told to until it is told to stop."""

from __future__ import annotations

import select
import sys

from kvstore.cli.bench.process import READY
from kvstore.cli.bench.ssd_blocks import blocks_of
from kvstore.errors import KVStoreError

__all__ = ["GO", "STOP"]

GO = "go"
STOP = "stop"
"""Answered, when the last chain is stored, by the number of chains that were put so far."""


def put_when_told(codec: str, endpoint: str) -> None:
    """Put until standard input ends; whoever started it reads what went wrong instead of an answer."""
    try:
        blocks = blocks_of(codec, endpoint)
        blocks.client.ping()
        print(READY, flush=True)
        chain = 0
        while sys.stdin.buffer.readline().decode().strip() == GO:
            while not select.select([sys.stdin], [], [], 0)[0]:
                blocks.put(chain)
                chain += 1
            if sys.stdin.buffer.readline().decode().strip() != STOP:
                break
            print(chain, flush=True)
        blocks.close()
    except KVStoreError as error:
        print(error, flush=True)


if __name__ == "__main__":
    put_when_told(*sys.argv[1:3])
