from __future__ import annotations

import re

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sample_stats import MIB, sample_retention, sample_stats, sample_tenants

from kvstore.observability.metrics import MAX_NAMESPACE_LABELS, make_registry, render_metrics
from kvstore.protocol.statistics import DaemonStats, RecordStats


def scrape(stats: DaemonStats) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = render_metrics(make_registry(lambda: stats)).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_of_a_busy_daemon_hold_its_numbers() -> None:
    samples = scrape(sample_stats())
    assert samples["kvstore_tier_resident_bytes", (("tier", "dram"),)] == 3000 * MIB
    assert samples["kvstore_lookup_hits_total", (("operation", "match"),)] == 32_000
    assert samples["kvstore_puts_total", (("status", "stored"),)] == 24_000
    assert samples["kvstore_put_refusals_total", (("reason", "too_large"),)] == 2
    assert samples["kvstore_evicted_blocks_total", ()] == 300
    assert samples["kvstore_eviction_policy", (("policy", "lru"), ("tier", "dram"))] == 1
    assert samples["kvstore_queue_delay_seconds", ()] == 0.00025
    assert samples["kvstore_namespace_blocks", (("namespace", "model-1"),)] == 2
    assert samples["kvstore_build_info", (("version", "0.1.0"),)] == 1


def test_metrics_of_events_are_there_where_they_are_published() -> None:
    samples = scrape(sample_stats(events=True))
    assert samples["kvstore_event_blocks_total", (("change", "removed"),)] == 78_000
    assert samples["kvstore_event_requests_total", (("kind", "replay"),)] == 12
    assert not [name for name, _ in scrape(sample_stats()) if name.startswith("kvstore_event")]


def test_metrics_of_an_ssd_tier_are_there_where_there_is_one() -> None:
    samples = scrape(sample_stats(ssd=True))
    assert samples["kvstore_ssd_resident_bytes", ()] == 20 << 30
    assert samples["kvstore_ssd_demoted_blocks_total", ()] == 90_000
    assert samples["kvstore_ssd_errors_total", (("operation", "write"),)] == 3
    assert samples["kvstore_ssd_read_bytes_per_second", ()] == 3.1e9
    assert samples["kvstore_ssd_state", (("state", "ok"),)] == 1
    assert samples["kvstore_ssd_state", (("state", "read-only"),)] == 0
    assert not [name for name, _ in scrape(sample_stats()) if name.startswith("kvstore_ssd")]


def test_metrics_of_an_ssd_tier_hold_each_of_its_numbers() -> None:
    stats = sample_stats(ssd=True)
    assert stats.ssd is not None
    numbers = [name for name in stats.ssd.__struct_fields__ if name not in ("directory", "state", "problem", "direct")]
    for at, name in enumerate(numbers):
        setattr(stats.ssd, name, 1_000_001 + at)
    told = [value for (name, _), value in scrape(stats).items() if name.startswith("kvstore_ssd")]
    assert sorted(value for value in told if value > 1) == [1_000_001 + at for at in range(len(numbers))]


def test_metrics_of_retention_and_quotas_hold_their_numbers() -> None:
    stats = sample_stats()
    stats.retention, stats.tenants = sample_retention(), sample_tenants()
    samples = scrape(stats)
    assert samples["kvstore_retained_bytes", ()] == samples["kvstore_leased_bytes", ()] == 1 << 30
    assert samples["kvstore_lease_limit_bytes", ()] == 4 << 30
    ends = {labels[0][1]: value for (name, labels), value in samples.items() if name == "kvstore_retention_ends_total"}
    assert ends == {"budget": 300, "room": 5, "time": 900, "dropped": 60}
    assert samples["kvstore_leases_limited_total", (("answer", "refused"),)] == 2
    assert samples["kvstore_tenant_used_bytes", (("tenant", "chat"),)] == 900 * MIB
    assert samples["kvstore_tenant_quota_bytes", (("tenant", "archive"),)] == 0
    assert samples["kvstore_tenant_ssd_used_bytes", (("tenant", "archive"),)] == 10 << 30
    assert samples["kvstore_tenant_refused_puts_total", (("tenant", "chat"),)] == 4


def test_metrics_of_the_curve_are_its_hit_ratios() -> None:
    samples = scrape(sample_stats(curve=True, ssd=True))
    for times, ratio in (("0.25", 0.1), ("1", 0.3), ("8", 0.6)):
        assert samples["kvstore_curve_hit_ratio", (("times", times),)] == pytest.approx(ratio)
    assert samples["kvstore_curve_ssd_hit_ratio", ()] == 0.62
    assert not [name for name, _ in scrape(sample_stats()) if name.startswith("kvstore_curve")]


def test_metrics_of_prefetches_and_loads_are_there_where_there_is_a_tier_below() -> None:
    samples = scrape(sample_stats(ahead=True, ssd=True))
    assert samples["kvstore_prefetch_blocks_total", (("what", "used"),)] == 3000
    assert samples["kvstore_prefetch_refused_total", (("bound", "no_room"),)] == 33
    assert samples["kvstore_prefetch_dropped_total", (("why", "expired"),)] == 12
    assert samples["kvstore_hints_total", (("kind", "delayed"),)] == 7
    assert samples["kvstore_load_decisions_total", (("kind", "part"),)] == 8
    assert samples["kvstore_load_saved_seconds_total", (("by", "computing"),)] == 30.25
    assert samples["kvstore_residence_seconds", ()] == 95
    assert not [name for name, _ in scrape(sample_stats()) if "prefetch" in name or "load_" in name]


def test_metrics_include_the_process() -> None:
    samples = scrape(sample_stats())
    assert samples["process_resident_memory_bytes", ()] > 0
    assert samples["process_open_fds", ()] > 0


def test_metrics_of_a_fresh_daemon_are_complete_zeros() -> None:
    samples = scrape(sample_stats(fresh=True, namespaces=0, sessions=0))
    assert samples["kvstore_puts_total", (("status", "rejected"),)] == 0
    assert samples["kvstore_tier_degraded", (("tier", "dram"),)] == 0


def test_metrics_of_a_tier_with_a_problem_say_degraded() -> None:
    assert scrape(sample_stats(problem="/dev/shm is full"))["kvstore_tier_degraded", (("tier", "dram"),)] == 1


def test_metrics_names_carry_the_prefix_and_a_help_text() -> None:
    text = render_metrics(make_registry(lambda: sample_stats(events=True, ssd=True, curve=True, ahead=True))).decode()
    names = re.findall(r"^# TYPE (\S+) (counter|gauge)$", text, re.MULTILINE)
    assert all(name.startswith(("kvstore_", "process_")) for name, _ in names)
    assert all(name.endswith("_total") for name, kind in names if kind == "counter")
    assert all(re.search(rf"^# HELP {name} \S.*\.$", text, re.MULTILINE) for name, _ in names)


def test_metrics_of_many_namespaces_are_bounded_and_lose_nothing() -> None:
    count = MAX_NAMESPACE_LABELS + 36
    stats = sample_stats(namespaces=count)
    blocks = {labels: value for (name, labels), value in scrape(stats).items() if name == "kvstore_namespace_blocks"}
    assert len(blocks) == MAX_NAMESPACE_LABELS + 1
    assert sum(blocks.values()) == sum(namespace.blocks for namespace in stats.namespaces)
    assert blocks[(("namespace", "other"),)] == sum(range(MAX_NAMESPACE_LABELS + 1, count + 1))


def test_metrics_of_namespaces_that_come_and_go_stay_bounded() -> None:
    current = sample_stats(namespaces=0)
    registry = make_registry(lambda: current)
    seen: set[str] = set()
    for start in range(0, 300, 50):
        current = sample_stats(namespaces=start + 50)
        del current.namespaces[:start]
        seen |= set(re.findall(r'kvstore_namespace_blocks\{namespace="(\S+)"\}', render_metrics(registry).decode()))
    assert len(seen) == MAX_NAMESPACE_LABELS + 1


@pytest.mark.parametrize("sessions", [0, 50])
def test_metrics_do_not_grow_with_sessions(sessions: int) -> None:
    assert len(scrape(sample_stats(sessions=sessions))) == len(scrape(sample_stats(sessions=1)))


def test_metrics_with_awkward_namespace_names_still_parse() -> None:
    stats = sample_stats(namespaces=1)
    stats.namespaces[0].name = 'a"b\\c\nd'
    assert scrape(stats)["kvstore_namespace_blocks", (("namespace", 'a"b\\c\nd'),)] == 1


def test_registry_made_takes_no_snapshot() -> None:
    def snapshot() -> DaemonStats:
        raise AssertionError("too early")

    make_registry(snapshot)


def test_metrics_of_a_recording_are_there_where_there_was_one() -> None:
    recording = RecordStats(state="failed", directory="/r", max_bytes=MIB, file="a", requests=7, bytes_written=900)
    samples = scrape(msgspec.structs.replace(sample_stats(), recording=recording))
    assert samples["kvstore_recording_on", ()] == 0
    assert samples["kvstore_recording_failed", ()] == 1
    assert samples["kvstore_recording_requests", ()] == 7
    assert samples["kvstore_recording_bytes", ()] == 900
    assert samples["kvstore_recording_dropped_requests", ()] == 0
    assert not [name for name, _ in scrape(sample_stats()) if name.startswith("kvstore_recording")]
