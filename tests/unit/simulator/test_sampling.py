"""Simulations of a sample of the blocks: what they estimate, and what is left of a request."""

from __future__ import annotations

import os

import pytest
from synthetic_trace import synthetic_requests

from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import Arrival, full_block_arrivals
from kvstore.simulator.clairvoyant import simulate_clairvoyant
from kvstore.simulator.lru_curve import LruCurve
from kvstore.simulator.prefix import simulate
from kvstore.simulator.sampling import Workload
from kvstore.simulator.trace_files import read_requests

ARRIVALS = full_block_arrivals(synthetic_requests(4000, seed=3))
TRACE = os.environ.get("KVSTORE_TRACE", "")


def test_hot_blocks_are_those_in_a_hundredth_of_the_requests_and_are_not_sampled() -> None:
    workload = Workload(ARRIVALS)
    uses = [sum(key in ids for _, ids in ARRIVALS) for key in workload.hot]
    assert uses
    assert min(uses) >= 0.01 * len(ARRIVALS)
    assert workload.hot_uses == sum(uses)
    sample = workload.sample(1.0)
    for (_, all_ids), (_, ids) in zip(ARRIVALS, sample.arrivals, strict=True):
        assert ids == tuple(key for key in all_ids if key not in workload.hot)
    assert sample.capacity_blocks(len(workload.hot) + 7) == 7


def test_sample_keeps_times_and_order_and_about_its_share() -> None:
    workload = Workload(ARRIVALS)
    sample = workload.sample(0.25, seed=4)
    kept = {key for _, ids in sample.arrivals for key in ids}
    assert len(kept) == pytest.approx(0.25 * (workload.distinct_blocks - len(workload.hot)), rel=0.1)
    for (time_ns, all_ids), (sampled_ns, ids) in zip(ARRIVALS, sample.arrivals, strict=True):
        assert time_ns == sampled_ns
        assert ids == tuple(key for key in all_ids if key in kept)
    assert kept != {key for _, ids in workload.sample(0.25, seed=5).arrivals for key in ids}


def test_unlimited_cache_is_estimated_exactly_from_any_sample() -> None:
    workload = Workload(ARRIVALS)
    for rate in (1.0, 0.3, 0.1):
        sample = workload.sample(rate)
        outcome = simulate(sample.arrivals, "lru", 10**6)
        assert sample.hit_rates(outcome.hits) == pytest.approx(workload.unlimited, abs=1e-12)
    everything = simulate(ARRIVALS, "lru", 10**6)
    assert workload.unlimited == (everything.hit_rate, everything.hit_rate_second_half)


@pytest.mark.parametrize("policy", ["lru", "clock", "opt"])
def test_estimates_of_a_sample_are_near(policy: str) -> None:
    workload = Workload(ARRIVALS)

    def outcome(arrivals: list[Arrival], capacity: int) -> list[int]:
        if policy == "opt":
            return list(simulate_clairvoyant(arrivals, capacity).hits)
        return list(simulate(arrivals, policy, capacity).hits)

    errors = []
    for capacity in (500, 1000, 2000):
        exact = workload.hit_rates(outcome(ARRIVALS, capacity)).whole
        for seed in range(3):
            sample = workload.sample(0.4, seed)
            estimated = sample.hit_rates(outcome(list(sample.arrivals), sample.capacity_blocks(capacity)))
            errors.append(abs(estimated.whole - exact))
    assert sum(errors) / len(errors) < 0.015


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(InvalidArgument, match="a share above 0 and at most 1"):
        Workload(ARRIVALS[:10]).sample(rate)


def test_trace_without_a_block_is_no_trouble() -> None:
    workload = Workload([Arrival(0, ()), Arrival(1, ())])
    assert workload.unlimited == (0.0, 0.0)
    assert workload.sample(0.5).hit_rates([0, 0]) == (0.0, 0.0)


@pytest.mark.skipif(not TRACE, reason="KVSTORE_TRACE does not name a trace (Mooncake's conversation_trace.jsonl)")
def test_estimates_on_a_production_trace_are_within_half_a_point() -> None:
    workload = Workload(read_requests(TRACE).arrivals)
    exact = LruCurve(workload)
    known = {1000: 4.70, 2000: 5.77, 5000: 12.37, 10_000: 22.43, 20_000: 30.63, 50_000: 37.15, 100_000: 37.95}
    assert {size: round(100 * exact.hit_rates(size).whole, 2) for size in known} == known
    sampled = LruCurve(workload, 0.125)
    errors = [abs(sampled.hit_rates(size).whole - exact.hit_rates(size).whole) for size in known]
    assert sum(errors) / len(errors) < 0.005
