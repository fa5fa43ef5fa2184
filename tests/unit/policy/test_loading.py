from __future__ import annotations

import itertools
import random

import pytest

from kvstore.policy.loading import LoadCosts, PrefillRates, leading_worth_loading

MIB = 1 << 20


class Time:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def measured(
    bytes_per_s: float = 1e9, latency_s: float = 0.0, prefill: float = 1000.0, *, deep: bool = True
) -> tuple[LoadCosts, Time]:
    """Costs of a device that was seen to read so fast."""
    time = Time()
    costs = LoadCosts(time, prefill)
    for _ in range(40):
        began = [costs.began() for _ in range(8 if deep else 1)]
        for one in began:
            time.ns += int(MIB / bytes_per_s * 1e9 + latency_s * 1e9 / len(began))
            costs.ended(one, MIB, good=True)
    return costs, time


def test_loads_are_all_worth_it_or_none_where_blocks_are_alike() -> None:
    # A second for a block, of which there are four, against 1.5 s to compute it: latency decides.
    assert leading_worth_loading([100] * 4, 1.0, 100.0, 1.5)[0] == 4
    assert leading_worth_loading([100] * 4, 2.1, 100.0, 1.5)[0] == 0
    assert leading_worth_loading([100] * 4, 0.0, 100.0, 0.9)[0] == 0


def test_loads_bring_blocks_in_memory_behind_them_for_nothing() -> None:
    # One slow load makes ten blocks in DRAM of use; what is below behind them is not worth it.
    loads = [0, 300, *[0] * 10, 300, 300]
    blocks, best_s, nothing_s, all_s = leading_worth_loading(loads, 0.5, 100.0, 1.0)
    assert blocks == 12
    assert (best_s, nothing_s, all_s) == (pytest.approx(5.5), pytest.approx(13.0), pytest.approx(9.5))


def test_loads_of_a_chain_in_memory_cost_nothing() -> None:
    assert leading_worth_loading([0, 0], 5.0, 1.0, 1.0) == (2, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_loads_that_are_taken_are_the_cheapest_of_all_prefixes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        loads = [rng.choice([0, 0, rng.randrange(1, 400)]) for _ in range(rng.randrange(1, 12))]
        start_s, compute_s = rng.random() * 3, rng.random() * 3
        first = next((index for index, size in enumerate(loads) if size), len(loads))

        def seconds(taken: int, loads: list[int] = loads, start: float = start_s, each: float = compute_s) -> float:
            loaded = sum(loads[:taken])
            return (start + loaded / 100.0 if loaded else 0.0) + (len(loads) - taken) * each

        taken, best_s, *_ = leading_worth_loading(loads, start_s, 100.0, compute_s)
        assert best_s == pytest.approx(seconds(taken))
        assert best_s == pytest.approx(min(seconds(one) for one in range(first, len(loads) + 1)))


def test_costs_measure_bandwidth_of_a_busy_device_and_latency_of_an_idle_one() -> None:
    costs, time = measured(5e8)
    assert costs.bytes_per_s == pytest.approx(5e8, rel=0.01)
    for _ in range(200):
        began = costs.began()
        time.ns += int(MIB / 5e8 * 1e9) + 3_000_000
        costs.ended(began, MIB, good=True)
        time.ns += 10**9
    # Single reads leave the device idle: they say nothing about its bandwidth once that is known.
    assert costs.bytes_per_s == pytest.approx(5e8, rel=0.01)
    assert costs.latency_s == pytest.approx(0.003, rel=0.05)


def test_costs_go_by_single_reads_as_long_as_there_are_no_others() -> None:
    costs, _ = measured(1e8, 0.001, deep=False)
    assert costs.bytes_per_s == pytest.approx(MIB / (MIB / 1e8 + 0.001), rel=0.01)


def test_costs_of_reads_that_fail_are_not_measured() -> None:
    costs, time = measured(1e9)
    before = costs.bytes_per_s
    for _ in range(50):
        began = costs.began()
        time.ns += 10
        costs.ended(began, MIB, good=False)
    assert costs.bytes_per_s == before


def test_decision_is_unknown_before_anything_is_known() -> None:
    costs, _ = measured(prefill=0.0)
    assert (costs.decide(1, [10], 64, 0).kind, costs.prefill_source) == ("unknown", "")
    fresh = LoadCosts(Time(), 1000.0)
    assert fresh.decide(1, [10, 0], 64, 0).blocks == 2
    assert costs.decide(1, [10], 0, 0).kind == "unknown"


def test_decision_counts_what_it_saves() -> None:
    # A block of 64 tokens takes 64 ms to compute and 1 ms to load.
    costs, _ = measured(1e9, prefill=1000.0)
    found = costs.decide(1, [10**6] * 10, 64, 0)
    assert (found.kind, found.blocks) == ("all", 10)
    assert costs.load_saved_s == pytest.approx(0.64 - 0.01, rel=0.02)
    # Behind two gigabytes of others it is not worth it.
    found = costs.decide(1, [10**6] * 10, 64, 2 * 10**9)
    assert (found.kind, found.blocks, costs.refused_blocks) == ("none", 0, 10)
    assert costs.refusal_saved_s == pytest.approx(2.01 - 0.64, rel=0.02)
    assert found.queue_s == pytest.approx(2.0, rel=0.01)
    found = costs.decide(1, [10**6, 0, 0, 10**9], 64, 0)
    assert (found.kind, found.blocks) == ("part", 3)
    assert costs.decisions == {"all": 1, "none": 1, "part": 1}
    assert costs.refused_blocks == 11


def test_decision_lets_one_through_now_and_then_where_all_are_refused() -> None:
    costs, time = measured(1e6, prefill=1000.0)
    assert costs.decide(1, [10**6], 64, 0).kind == "none"
    time.ns += 21 * 10**9
    assert costs.decide(1, [10**6], 64, 0).kind == "probe"
    costs.ended(costs.began(), MIB, good=True)
    assert costs.decide(1, [10**6], 64, 0).kind == "none"


def test_rates_are_what_engines_report_lately_and_of_each_namespace() -> None:
    rates = PrefillRates()
    assert (rates.of(1), rates.last()) == (0.0, 0.0)
    rates.report(1, 1000, 1.0)
    rates.report(2, 500, 1.0)
    assert (rates.of(1), rates.of(2), rates.last()) == (1000.0, 500.0, 500.0)
    for _ in range(100):
        rates.report(1, 4000, 2.0)
    assert rates.of(1) == pytest.approx(2000.0, rel=0.02)
    for namespace in itertools.chain(range(10, 1200)):
        rates.report(namespace, 1, 1.0)
    assert rates.of(2) == 0.0


def test_rate_that_is_set_comes_before_what_is_reported() -> None:
    costs, _ = measured(prefill=0.0)
    costs.rates.report(7, 300, 1.0)
    assert (costs.prefill_tokens_per_s(7), costs.prefill_source, costs.shown_tokens_per_s) == (300.0, "reported", 300.0)
    fixed, _ = measured(prefill=50.0)
    fixed.rates.report(7, 300, 1.0)
    assert (fixed.prefill_tokens_per_s(7), fixed.prefill_source) == (50.0, "set")


def test_costs_say_what_would_be_taken_without_counting_it() -> None:
    costs, _ = measured(bytes_per_s=1e9, prefill=1000.0)
    for block_tokens in (1, 4, 64):
        told = costs.would_take(1, [0, MIB, MIB], block_tokens, 0)
        assert costs.decisions.total() == 0
        assert told == costs.decide(1, [0, MIB, MIB], block_tokens, 0).blocks
        costs.decisions.clear()
    assert LoadCosts(Time()).would_take(1, [MIB], 64, 0) == 1
