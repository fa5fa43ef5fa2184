"""The replay anchor: the store's hits on a trace are those of a plain tail-first LRU, to the last block."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import pytest
from fakes.store_replay import StoreReplay
from synthetic_trace import synthetic_requests

from kvstore.core.invariants import validate_state
from kvstore.simulator.trace import TraceRequest, block_key, read_trace

TRACE = os.environ.get("KVSTORE_TRACE", "")
needs_trace = pytest.mark.skipif(
    not TRACE, reason="KVSTORE_TRACE does not name a trace (Mooncake's conversation_trace.jsonl)"
)


def heap_hits(requests: Iterable[TraceRequest], capacity_blocks: int) -> list[int]:
    """Hits of each request: a heap of (last request, -position), stale entries skipped, trimmed after each request."""
    last: dict[int, tuple[int, int]] = {}
    heap: list[tuple[int, int, int]] = []
    hits = []
    for now, request in enumerate(requests):
        blocks = request.full_blocks
        hits.append(sum(1 for _ in takewhile(last.__contains__, blocks)))
        for position, block in enumerate(blocks):
            last[block] = (now, -position)
            heapq.heappush(heap, (now, -position, block))
        while len(last) > capacity_blocks:
            used, position, block = heapq.heappop(heap)
            if last.get(block) == (used, position):
                del last[block]
    return hits


def replay_hits(requests: Sequence[TraceRequest], capacity_blocks: int) -> list[int]:
    longest = max(len(request.full_blocks) for request in requests)
    replay = StoreReplay(capacity_blocks, longest)
    hits = [replay.request([block_key(block) for block in request.full_blocks]) for request in requests]
    validate_state(replay.store)
    return hits


@pytest.mark.parametrize("capacity_blocks", [1, 7, 60, 200, 100_000])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_replay_synthetic_trace_hits_equal_the_heap_model(seed: int, capacity_blocks: int):
    requests = synthetic_requests(400, seed=seed)
    hits = replay_hits(requests, capacity_blocks)
    assert hits == heap_hits(requests, capacity_blocks)
    assert sum(hits) or capacity_blocks < 60


@needs_trace
@pytest.mark.parametrize(("capacity_blocks", "expected"), [(1000, 2266), (2000, 2673), (5000, 6765)])
def test_replay_conversation_trace_beginning_has_the_known_hits(capacity_blocks: int, expected: int):
    requests = read_trace(Path(TRACE), 2000)
    assert sum(len(request.full_blocks) for request in requests) == 52_562
    assert sum(replay_hits(requests, capacity_blocks)) == expected


@needs_trace
@pytest.mark.slow
@pytest.mark.parametrize(("capacity_blocks", "expected"), [(5000, 34_193), (10_000, 62_005)])
def test_replay_conversation_trace_whole_has_the_known_hits(capacity_blocks: int, expected: int):
    requests = read_trace(Path(TRACE))
    assert sum(len(request.full_blocks) for request in requests) == 276_491
    assert sum(replay_hits(requests, capacity_blocks)) == expected
