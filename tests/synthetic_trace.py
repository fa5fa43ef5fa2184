"""A small trace in the Mooncake format and the hits that a tail-first LRU must have on it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from kvstore.simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest


def synthetic_requests(
    count: int, *, seed: int = 1, longest_blocks: int = 24, system_prompts: int = 3
) -> list[TraceRequest]:
    """Conversations that share system prompts and grow turn by turn; some prompts are shorter than one block."""
    draw = random.Random(seed)
    unused = iter(range(1 << 32))
    systems = [[next(unused) for _ in range(draw.randint(1, 3))] for _ in range(system_prompts)]
    sessions: list[list[int]] = []
    requests = []
    for turn in range(count):
        if not sessions or draw.random() < 0.3:
            sessions.append(list(draw.choice(systems)) if draw.random() < 0.8 else [])
        # Recent conversations go on more often than old ones.
        session = sessions[-1 - min(int(draw.expovariate(0.15)), len(sessions) - 1)]
        for _ in range(min(draw.randint(0, 5), longest_blocks - len(session))):
            session.append(next(unused))
        tail_tokens = draw.choice([0, draw.randint(1, TRACE_BLOCK_TOKENS - 1)])
        tail = [next(unused)] if tail_tokens else []
        requests.append(
            TraceRequest(
                timestamp_ms=1000 * turn,
                input_tokens=len(session) * TRACE_BLOCK_TOKENS + tail_tokens,
                output_tokens=draw.randint(1, 500),
                hash_ids=(*session, *tail),
            )
        )
    return requests


def write_trace(path: Path, requests: Sequence[TraceRequest]) -> Path:
    """The requests as a file."""
    with path.open("w") as out:
        for request in requests:
            line = {
                "timestamp": request.timestamp_ms,
                "input_length": request.input_tokens,
                "output_length": request.output_tokens,
                "hash_ids": list(request.hash_ids),
            }
            out.write(json.dumps(line) + "\n")
    return path


def lru_hits(requests: Sequence[TraceRequest], capacity_blocks: int) -> list[int]:
    """Blocks hit by each request: blocks of one request are as old as each other, its tail leaves first."""
    seen: dict[int, tuple[int, int]] = {}
    hits = []
    for now, request in enumerate(requests):
        blocks = request.full_blocks
        hits.append(sum(1 for _ in takewhile(seen.__contains__, blocks)))
        seen.update((block, (now, -position)) for position, block in enumerate(blocks))
        for block in sorted(seen, key=seen.__getitem__)[: max(0, len(seen) - capacity_blocks)]:
            del seen[block]
    return hits
