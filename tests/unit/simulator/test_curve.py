"""Curves of LRU: from one pass, from samples, in bounded memory; each against the simulator or a plain model."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import synthetic_requests

from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import full_block_arrivals
from kvstore.simulator.curve import FIRST_USE, StackDistances, lru_curves
from kvstore.simulator.lru_curve import LruCurve
from kvstore.simulator.prefix import simulate
from kvstore.simulator.sampled_curve import SampledCurve
from kvstore.simulator.sampling import Workload

ARRIVALS = full_block_arrivals(synthetic_requests(3000, seed=5))
PATHS = [ids for _, ids in ARRIVALS]
CAPACITIES = (1, 2, 7, 30, 100, 300, 1000, 5000, 100_000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=6, unique=True), max_size=60), st.integers(0, 30))
def test_distance_is_how_many_others_were_used_since(requests: list[list[int]], forgotten: int) -> None:
    distances: StackDistances[int] = StackDistances()
    stack: list[int] = []
    for number, keys in enumerate(requests):
        expected = [stack.index(key) if key in stack else FIRST_USE for key in keys]
        assert distances.access(keys) == expected
        stack = keys + [key for key in stack if key not in keys]
        if number % 5 == 4:
            distances.discard(forgotten)
            stack = [key for key in stack if key != forgotten]
        if number % 7 == 6 and stack:
            assert distances.discard_oldest() == stack.pop()
        assert len(distances) == len(stack)


def test_distances_stay_right_over_many_renumberings() -> None:
    distances: StackDistances[int] = StackDistances()
    for _ in range(2000):
        assert distances.access([1, 2, 3]) in ([0, 1, 2], [FIRST_USE] * 3)
    assert (len(distances), 2 in distances, 4 in distances) == (3, True, False)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_one_pass_gives_exactly_what_a_simulation_gives(capacity: int) -> None:
    whole, second = lru_curves(PATHS, len(PATHS) // 2)
    outcome = simulate(ARRIVALS, "lru", capacity)
    assert whole.hit_rate(capacity) == pytest.approx(outcome.hit_rate, abs=1e-12)
    assert second.hit_rate(capacity) == pytest.approx(outcome.hit_rate_second_half, abs=1e-12)


def test_curve_says_which_capacity_a_hit_rate_takes() -> None:
    whole, _ = lru_curves(PATHS, 0)
    for capacity in (3, 40, 700):
        found = whole.capacity_for(whole.hit_rate(capacity))
        assert found is not None
        assert found <= capacity
        assert whole.hit_rate(found) >= whole.hit_rate(capacity) > whole.hit_rate(found - 1)
    assert whole.capacity_for(1.0) is None
    assert lru_curves([], 0)[0].hit_rate(10) == 0


def test_curve_of_a_sample_is_near_and_of_all_blocks_exact() -> None:
    workload = Workload(ARRIVALS)
    exact, sampled = LruCurve(workload), LruCurve(workload, 0.5, seed=1)
    for capacity in (200, 500, 1000, 2000):
        assert sampled.hit_rates(capacity).whole == pytest.approx(exact.hit_rates(capacity).whole, abs=0.03)
    assert sampled.hit_rates(10**6) == pytest.approx(workload.unlimited)
    assert exact.hit_rates(10**6) == workload.unlimited


def keys_of(path: tuple[int, ...]) -> list[bytes]:
    return [sha256(b"%d" % key).digest() for key in path]


def test_online_curve_of_all_blocks_is_exact_where_nothing_is_hot() -> None:
    draw = random.Random(2)
    unused = iter(range(1 << 20))
    paths: list[tuple[int, ...]] = [tuple(next(unused) for _ in range(5)) for _ in range(1500)]
    requests = [keys_of(draw.choice(paths)) for _ in range(4000)]
    curve = SampledCurve(10_000, 10_000, half_life_requests=10**9)
    for keys in requests:
        curve.access(keys)
    assert curve.hot_blocks == 0
    exact, _ = lru_curves(requests, 0)
    capacities = [10, 100, 500, 2500, 10_000]
    assert curve.hit_rates(capacities) == pytest.approx([exact.hit_rate(size) for size in capacities], abs=1e-4)


def test_online_curve_of_a_sample_is_near_and_finds_what_is_hot() -> None:
    requests = [keys_of(path) for path in PATHS]
    curve = SampledCurve(8000, 2000, half_life_requests=10**9)
    for keys in requests:
        curve.access(keys)
    assert curve.rate == 0.25
    assert 3 <= curve.hot_blocks < 40
    exact, _ = lru_curves(requests, 0)
    for capacity in (300, 1000, 4000):
        assert curve.hit_rates([capacity])[0] == pytest.approx(exact.hit_rate(capacity), abs=0.04)


def test_online_curve_keeps_within_its_memory_and_forgets_an_old_load() -> None:
    curve = SampledCurve(500, 250, half_life_requests=200)
    assert curve.hit_rates([100]) == [0.0]
    for number in range(3000):
        curve.access(keys_of((number, 10_000 + number)))
    most = curve.memory_bytes()
    assert curve.hit_rates([500])[0] == 0
    for number in range(3000):
        curve.access(keys_of((number % 50, 10_000 + number % 50)))
    assert curve.hit_rates([500])[0] > 0.99
    assert curve.memory_bytes() <= most + (1 << 20)
    assert curve.uses < 2 * 300


def test_online_curve_takes_what_is_hot_no_longer_for_cold() -> None:
    curve = SampledCurve(1000, 1000, half_life_requests=800)
    for number in range(1000):
        curve.access(keys_of((1, 2, 100 + number)))
    assert curve.hot_blocks == 2
    for number in range(10_000):
        curve.access(keys_of((100_000 + number,)))
    assert curve.hot_blocks == 0


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_online_curve_of_nothing_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidArgument, match="all three must be 1 or more"):
        SampledCurve(*arguments)
