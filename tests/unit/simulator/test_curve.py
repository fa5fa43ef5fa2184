"""Curves of LRU, from all blocks and from samples, against the simulator and a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import synthetic_requests

from kvstore.simulator.arrivals import full_block_arrivals
from kvstore.simulator.curve import FIRST_USE, LruStack, lru_curves
from kvstore.simulator.lru_curve import LruCurve
from kvstore.simulator.prefix import simulate
from kvstore.simulator.sampling import Workload

ARRIVALS = full_block_arrivals(synthetic_requests(3000, seed=5))
PATHS = [ids for _, ids in ARRIVALS]
CAPACITIES = (1, 2, 7, 30, 100, 300, 1000, 5000, 100_000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=6, unique=True), max_size=60))
def test_distance_is_how_many_others_were_used_since(requests: list[list[int]]) -> None:
    distances: LruStack[int] = LruStack()
    stack: list[int] = []
    for keys in requests:
        expected = [stack.index(key) if key in stack else FIRST_USE for key in keys]
        assert distances.access(keys) == expected
        stack = keys + [key for key in stack if key not in keys]
        assert len(distances) == len(stack)


def test_distances_stay_right_over_many_renumberings() -> None:
    distances: LruStack[int] = LruStack()
    for _ in range(2000):
        assert distances.access([1, 2, 3]) in ([0, 1, 2], [FIRST_USE] * 3)
    assert len(distances) == 3


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_one_pass_gives_exactly_what_a_simulation_gives(capacity: int) -> None:
    whole, second = lru_curves(PATHS, len(PATHS) // 2)
    outcome = simulate(ARRIVALS, "lru", capacity)
    assert whole.hit_rate(capacity) == pytest.approx(outcome.hit_rate, abs=1e-12)
    assert second.hit_rate(capacity) == pytest.approx(outcome.hit_rate_second_half, abs=1e-12)


def test_curve_of_no_requests_is_zero() -> None:
    assert lru_curves([], 0)[0].hit_rate(10) == 0


def test_curve_of_a_sample_is_near_and_of_all_blocks_exact() -> None:
    workload = Workload(ARRIVALS)
    exact, sampled = LruCurve(workload), LruCurve(workload, 0.5, seed=1)
    for capacity in (200, 500, 1000, 2000):
        assert sampled.hit_rates(capacity).whole == pytest.approx(exact.hit_rates(capacity).whole, abs=0.03)
    assert sampled.hit_rates(10**6) == pytest.approx(workload.unlimited)
    assert exact.hit_rates(10**6) == workload.unlimited
