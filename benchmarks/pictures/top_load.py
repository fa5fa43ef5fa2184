"""A client that behaves like an engine with chat sessions: matches, gets what hits, puts the rest, at a steady pace.

Started several times by ``top.py``; runs until its parent ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
from hashlib import sha256

from kvstore_client import Client, KVStoreError, Namespace

BLOCK_TOKENS = 64
TURN_GAPS = (4, 20, 120)
"""Requests of others between two turns of a session: a user that is fast, usual, slow."""


def block_key(session: int, at: int, shared: int) -> bytes:
    """Blocks of the first ``shared`` are a system prompt of everybody's."""
    owner = -1 - session % 3 if at < shared else session
    return sha256(f"{owner}/{at}".encode()).digest()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("endpoint")
    arguments.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    arguments.add_argument("--codec", default="raw")
    arguments.add_argument("--tenant", default="default", help="name of the namespace")
    arguments.add_argument("--block-bytes", type=int, default=65536)
    arguments.add_argument("--requests-per-s", type=float, default=20.0)
    arguments.add_argument("--socket", action="store_true", help="everything over the socket, nothing mapped")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()

    draw = random.Random(given.seed)
    parent = os.getppid()
    namespace = Namespace(
        name=given.tenant, model=given.model, revision="main", codec=given.codec, block_tokens=BLOCK_TOKENS
    )
    payload = bytes(given.block_bytes)
    buffers = [bytearray(given.block_bytes) for _ in range(256)]
    waiting: list[tuple[int, int, int]] = []  # when the next turn is due, session, blocks so far
    unused = given.seed * 1_000_000
    mapped = False if given.socket else None
    with Client(given.endpoint, namespace=namespace, mapped=mapped, payload_bytes=(given.block_bytes,)) as client:
        due = time.monotonic()
        turn = 0
        while os.getppid() == parent:
            turn += 1
            waiting.sort()
            if waiting and waiting[0][0] <= turn:
                _, session, blocks = waiting.pop(0)
            else:
                unused += 1
                session, blocks = unused, 4
            blocks = min(blocks + draw.randint(1, 8), len(buffers))
            keys = [block_key(session, at, 4) for at in range(blocks)]
            with contextlib.suppress(KVStoreError):
                match = client.match(keys, prefetch=True)
                hits = len(match)
                client.get_many_into(keys[:hits], buffers[:hits], request=match.request)
                if hits < blocks:
                    above = keys[hits - 1] if hits else None
                    client.put_many(
                        keys[hits:], [payload] * (blocks - hits), parent=above, request=match.request, wait=False
                    )
            with contextlib.suppress(KVStoreError):
                if turn % 50 == 0:
                    client.retain(keys[:blocks], ttl_s=120.0)
            if draw.random() < 0.8:
                gap = draw.choice(TURN_GAPS) * draw.expovariate(1.0)
                waiting.append((turn + 1 + int(gap * 4), session, blocks))
            # Load comes in waves.
            pace = given.requests_per_s * (1.0 + 0.5 * ((turn // 40) % 3 - 1))
            due = max(due + draw.expovariate(pace), time.monotonic() - 1.0)
            time.sleep(max(due - time.monotonic(), 0.0))


if __name__ == "__main__":
    main()
