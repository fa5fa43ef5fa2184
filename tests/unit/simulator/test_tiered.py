"""DRAM with an SSD below, simulated: what each tier hits."""

from __future__ import annotations

import os

import pytest
from synthetic_trace import synthetic_requests

from kvstore.errors import InvalidArgument
from kvstore.policy.registry import SIMULATED
from kvstore.simulator.arrivals import Arrival, full_block_arrivals
from kvstore.simulator.prefix import simulate
from kvstore.simulator.tiered import simulate_tiered
from kvstore.simulator.trace_files import read_requests

ARRIVALS = full_block_arrivals(synthetic_requests(2500, seed=8))
TRACE = os.environ.get("KVSTORE_TRACE", "")


def rates(arrivals: list[Arrival], dram_blocks: int, ssd_blocks: int) -> tuple[float, float]:
    hits = simulate_tiered(arrivals, "lru", dram_blocks, ssd_blocks)
    asked = sum(len(ids) for _, ids in arrivals)
    return (sum(hits.dram) + sum(hits.ssd)) / asked, hits.written / (asked - sum(hits.dram) - sum(hits.ssd))


@pytest.mark.parametrize(("dram", "ssd"), [(30, 100), (100, 400), (100, 50), (500, 5000)])
def test_dram_hits_what_it_hits_alone_and_the_ssd_more(dram: int, ssd: int) -> None:
    tiered = simulate_tiered(ARRIVALS, "lru", dram, ssd)
    alone = simulate(ARRIVALS, "lru", dram)
    assert list(tiered.dram) == list(alone.hits)
    both = [above + below for above, below in zip(tiered.dram, tiered.ssd, strict=True)]
    assert all(hit <= len(ids) for hit, (_, ids) in zip(both, ARRIVALS, strict=True))
    # Copies that stay below cost a little against one tier of all blocks, and nothing hits more than that.
    at_most = sum(simulate(ARRIVALS, "lru", dram + ssd).hits)
    at_least = sum(simulate(ARRIVALS, "lru", max(dram, ssd)).hits)
    assert at_least * 0.98 <= sum(both) <= at_most


@pytest.mark.parametrize("policy", SIMULATED)
def test_every_policy_runs_in_both_tiers(policy: str) -> None:
    tiered = simulate_tiered(ARRIVALS, policy, 60, 300)
    assert sum(tiered.ssd) > 0
    assert tiered.written > 300


def test_block_below_counts_only_behind_those_before_it() -> None:
    # The first request fills DRAM; the second has its blocks leave, the deepest first; 3 is below, and 1 is not.
    arrivals = [Arrival(0, (1, 2, 3)), Arrival(1, (7,)), Arrival(2, (1, 2, 3))]
    tiered = simulate_tiered(arrivals, "lru", 3, 1)
    assert (list(tiered.dram), list(tiered.ssd)) == ([0, 0, 2], [0, 0, 1])
    assert tiered.written == 2


def test_progress_is_told_at_the_end() -> None:
    told: list[int] = []
    simulate_tiered(ARRIVALS[:300], "lru", 10, 10, progress=told.append)
    assert told == [256, 300]


def test_tier_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 1"):
        simulate_tiered(ARRIVALS[:3], "lru", 10, 0)


@pytest.mark.skipif(not TRACE, reason="KVSTORE_TRACE does not name a trace (Mooncake's conversation_trace.jsonl)")
def test_production_trace_hits_and_writes_as_measured_before() -> None:
    arrivals = read_requests(TRACE).arrivals
    hit, written = rates(arrivals, 2000, 8000)
    assert (round(100 * hit, 2), round(written, 2)) == (22.09, 0.99)
