"""The daemon's store and the simulator are one: the same hits for every request, whatever policy chooses."""

from __future__ import annotations

import pytest
from fakes.store_replay import StoreReplay
from synthetic_trace import synthetic_requests

from kvstore.core.invariants import validate_state
from kvstore.policy.registry import POLICIES
from kvstore.simulator.arrivals import full_block_arrivals
from kvstore.simulator.block import TraceClock
from kvstore.simulator.prefix import simulate
from kvstore.simulator.trace import block_key

LONGEST_BLOCKS = 24


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("seed", "capacity_blocks"), [(1, 1), (2, 7), (3, 40), (4, 100), (5, 250), (6, 10_000)])
def test_store_hits_are_those_of_the_simulator(policy: str, seed: int, capacity_blocks: int):
    arrivals = full_block_arrivals(synthetic_requests(500, seed=seed, longest_blocks=LONGEST_BLOCKS))
    expected = simulate(arrivals, policy, capacity_blocks).hits
    clock = TraceClock()
    replay = StoreReplay(capacity_blocks, LONGEST_BLOCKS, policy, clock)
    hits = []
    for arrival in arrivals:
        clock.now_ns = arrival.time_ns
        hits.append(replay.request([block_key(key) for key in arrival.ids]))
    assert hits == expected
    assert sum(hits) or capacity_blocks < 10
    validate_state(replay.store)
