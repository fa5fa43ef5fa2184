"""DRAM over an SSD hits as one LRU of both would, and writes each block about once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes.store_replay import StoreReplay
from fakes.tier_replay import TierReplay
from synthetic_trace import synthetic_requests

from kvstore.core.invariants import validate_state
from kvstore.simulator.trace import block_key, read_trace

TRACE = os.environ.get("KVSTORE_TRACE", "")


def keys_of(requests: Sequence[object]) -> list[list[bytes]]:
    return [[block_key(block) for block in request.full_blocks] for request in requests]  # type: ignore[attr-defined]


def lru_hits(requests: list[list[bytes]], capacity_blocks: int) -> int:
    replay = StoreReplay(capacity_blocks, max(map(len, requests)))
    return sum(map(replay.request, requests))


@pytest.mark.parametrize(("dram_blocks", "ssd_blocks"), [(40, 128), (100, 256), (64, 640)])
@pytest.mark.parametrize("seed", [1, 2])
def test_tiers_hit_nearly_as_one_lru_of_both(seed: int, dram_blocks: int, ssd_blocks: int):
    requests = keys_of(synthetic_requests(800, seed=seed))
    replay = TierReplay(dram_blocks, ssd_blocks)
    hits = sum(map(replay.request, requests))
    validate_state(replay.store)
    # Some slots below are always on their way to be free, and what comes up is in both.
    assert hits >= lru_hits(requests, ssd_blocks - ssd_blocks // 8) * 0.97
    assert hits <= lru_hits(requests, dram_blocks + ssd_blocks) * 1.03
    assert hits > lru_hits(requests, dram_blocks)
    assert replay.writes <= replay.inserted * 1.02
    assert replay.store.counters.dropped_blocks == 0
    assert replay.twin.ssd.counters.evicted_blocks > 100


@pytest.mark.parametrize("seed", [1, 2])
def test_predicted_admission_writes_no_more_and_hits_nearly_as_often(seed: int):
    requests = keys_of(synthetic_requests(1500, seed=seed))
    every, some = TierReplay(60, 192), TierReplay(60, 192, "predicted")
    hits = [sum(map(replay.request, requests)) for replay in (every, some)]
    validate_state(some.store)
    assert hits[1] >= hits[0] * 0.9
    assert some.writes <= every.writes * 1.01


@pytest.mark.skipif(not TRACE, reason="KVSTORE_TRACE does not name a trace (Mooncake's conversation_trace.jsonl)")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dram_blocks", "ssd_blocks", "percent", "writes"), [(2000, 8000, 21.9, 0.99), (5000, 20_000, 32.3, 0.98)]
)
def test_tiers_on_the_conversation_trace_hit_as_documented(
    dram_blocks: int, ssd_blocks: int, percent: float, writes: float
):
    requests = keys_of(read_trace(Path(TRACE)))
    replay = TierReplay(dram_blocks, ssd_blocks)
    hits = sum(map(replay.request, requests))
    assert 100 * hits / sum(map(len, requests)) == pytest.approx(percent, abs=0.1)
    assert replay.writes / replay.inserted == pytest.approx(writes, abs=0.01)
