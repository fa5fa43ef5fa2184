"""Rates of ``kvstore top``: differences, windows, series, and daemons that start again."""

from __future__ import annotations

import math

import msgspec
import pytest
from sample_stats import MIB, sample_stats

from kvstore.cli.top.history import History
from kvstore.cli.top.rates import Counters, Rates, Sample
from kvstore.protocol.statistics import DaemonStats, PrefetchStats


def stats_at(uptime_s: float, *, steps: int = 0, incarnation: str = "a", ssd: bool = False) -> DaemonStats:
    """The sample daemon at ``uptime_s``, each of whose steps matched 100 blocks and hit 60, 10 of them on the SSD."""
    stats = sample_stats(sessions=3, ssd=ssd)
    stats.uptime_s, stats.incarnation = uptime_s, incarnation
    stats.lookups.match_keys += 100 * steps
    stats.lookups.match_hits += 60 * steps
    stats.lookups.bytes_out += 5 * MIB * steps
    stats.puts.stored += 40 * steps
    for session in stats.sessions:
        session.requests += 7 * steps
    if stats.ssd is not None:
        stats.ssd.hits += 10 * steps
    return stats


def watched(uptimes_s: list[float], **options: object) -> History:
    """A history of one daemon that made one step a second."""
    history = History()
    for uptime_s in uptimes_s:
        history.add(stats_at(uptime_s, steps=round(uptime_s), **options), uptime_s)  # type: ignore[arg-type]
    return history


def test_rates_of_two_samples_are_differences_over_the_daemons_time() -> None:
    older, newer = Sample.of(stats_at(10.0), 0.0), Sample.of(stats_at(12.5, steps=5), 99.0)
    rates = Rates.between(older, newer)
    assert rates is not None
    assert rates.seconds == 2.5
    assert rates.added.match_keys == 500
    assert rates.per_s("match_keys") == 200.0
    assert rates.hit_rate == 0.6
    assert rates.per_s("bytes_out") == 10 * MIB


def test_rates_with_an_ssd_tell_tiers_apart() -> None:
    rates = Rates.between(Sample.of(stats_at(1.0, ssd=True), 0.0), Sample.of(stats_at(2.0, steps=1, ssd=True), 1.0))
    assert rates is not None
    assert (rates.dram_rate, rates.ssd_rate) == (0.5, 0.1)


def test_rates_of_blocks_brought_up_ahead_count_when_they_are_used() -> None:
    numbers = dict.fromkeys((field.name for field in msgspec.structs.fields(PrefetchStats)), 0)
    before, after = stats_at(1.0, ssd=True), stats_at(2.0, steps=1, ssd=True)
    before.prefetch = PrefetchStats(**(numbers | {"wanted": {}, "refused": {}}))  # type: ignore[arg-type]
    after.prefetch = PrefetchStats(**(numbers | {"wanted": {}, "refused": {}, "blocks": 8, "used_blocks": 3}))  # type: ignore[arg-type]
    rates = Rates.between(Sample.of(before, 0.0), Sample.of(after, 1.0))
    assert rates is not None
    assert (rates.dram_rate, rates.ssd_rate) == (0.55, 0.05)


def test_rates_of_misses_are_by_cause_and_add_up() -> None:
    first = Sample("a", 1.0, 1.0, Counters(*[0] * len(Counters._fields)), {"evicted": 5, "expired": 2})
    second = Sample("a", 2.0, 2.0, first.counters, {"evicted": 9, "expired": 2, "quota": 1})
    third = Sample("a", 3.0, 3.0, first.counters, {"evicted": 9, "expired": 3, "quota": 1})
    one, other = Rates.between(first, second), Rates.between(second, third)
    assert one is not None
    assert other is not None
    assert one.misses == {"evicted": 4, "quota": 1}
    assert (one + other).misses == {"evicted": 4, "quota": 1, "expired": 1}


def test_rates_where_nobody_matched_are_those_of_gets() -> None:
    before, after = stats_at(1.0), stats_at(2.0)
    after.lookups.get_keys += 8
    after.lookups.get_hits += 2
    rates = Rates.between(Sample.of(before, 0.0), Sample.of(after, 1.0))
    assert rates is not None
    assert rates.hit_rate == 0.25


def test_rates_where_nothing_was_asked_are_unknown_not_zero() -> None:
    rates = Rates.between(Sample.of(stats_at(1.0), 0.0), Sample.of(stats_at(2.0), 1.0))
    assert rates is not None
    assert rates.hit_rate is None
    assert rates.dram_rate is None
    assert rates.ssd_rate is None


def test_rates_of_another_incarnation_are_none() -> None:
    older = Sample.of(stats_at(100.0, steps=9), 0.0)
    assert Rates.between(older, Sample.of(stats_at(101.0, incarnation="b"), 1.0)) is None


def test_rates_without_time_between_are_none() -> None:
    assert Rates.between(Sample.of(stats_at(5.0), 0.0), Sample.of(stats_at(5.0), 1.0)) is None


def test_rates_of_a_count_that_shrank_are_never_negative() -> None:
    rates = Rates.between(Sample.of(stats_at(1.0, steps=3), 0.0), Sample.of(stats_at(2.0, steps=1), 1.0))
    assert rates is not None
    assert min(rates.added) == 0


def test_counters_cover_every_field() -> None:
    """Each is read from a field of its own: none was forgotten, or taken twice."""
    stats = sample_stats(ssd=True)
    for number, one in enumerate((stats.server, stats.lookups, stats.puts, stats.eviction, stats.ssd), 1):
        for place, field in enumerate(msgspec.structs.fields(one)):
            if isinstance(getattr(one, field.name), int) and not isinstance(getattr(one, field.name), bool):
                setattr(one, field.name, 1000 * number + place)
    values = list(Counters.of(stats))
    assert len(set(values)) == len(values)
    assert min(values) >= 1000


def test_history_windows_begin_when_they_are_full() -> None:
    history = watched([float(second) for second in range(1, 8)])
    assert history.over(10.0) is None
    short = history.over(5.0)
    assert short is not None
    assert short.seconds == 5.0
    latest = history.latest()
    assert latest is not None
    assert latest.seconds == 1.0


def test_history_after_a_restart_has_no_window_across_it() -> None:
    history = watched([float(second) for second in range(1, 100)])
    history.add(stats_at(0.5, incarnation="b"), 100.0)
    assert history.latest() is None
    assert history.over(1.0) is None
    history.add(stats_at(1.5, steps=1, incarnation="b"), 101.0)
    rates = history.latest()
    assert rates is not None
    assert rates.added.match_keys == 100
    series = [rates.hit_rate if rates else None for rates in history.series(5, 1.0)]
    assert series == [0.6, 0.6, 0.6, None, 0.6]


def test_history_series_moves_by_whole_columns_and_marks_gaps() -> None:
    history = watched([1.0, 2.0, 3.0, 9.0, 10.0])
    series = history.series(12, 1.0)
    known = [None if rates is None else round(rates.seconds) for rates in series]
    assert known == [None, None, None, 1, 1, None, None, None, None, None, 6, 1]
    wide = history.series(2, 10.0)
    assert [rates.added.match_keys if rates else None for rates in wide] == [800, 100]


def test_history_is_bounded() -> None:
    history = History(most_samples=10)
    for second in range(1, 100):
        history.add(stats_at(float(second), steps=second), float(second))
    assert len(history) == 10
    assert history.over(9.0) is not None
    assert history.over(20.0) is None


def test_history_copy_stays_as_it_was() -> None:
    history = watched([1.0, 2.0])
    copied = history.copy()
    history.add(stats_at(3.0, steps=3), 3.0)
    assert (len(copied), len(history)) == (2, 3)


def test_history_ignores_a_snapshot_that_is_not_later() -> None:
    history = watched([1.0, 2.0])
    history.add(stats_at(2.0, steps=2), 2.5)
    assert len(history) == 2


def test_requests_of_sessions_are_rates_and_new_ones_unknown() -> None:
    history = watched([1.0, 2.0, 3.0])
    stats = stats_at(4.0, steps=4)
    stats.sessions[2].session = 77
    history.add(stats, 4.0)
    rates = history.requests_per_s(stats.sessions)
    assert rates == {1: pytest.approx(7.0), 2: pytest.approx(7.0)}
    assert all(math.isfinite(rate) for rate in rates.values())
