"""Prometheus metrics: the daemon's statistics, read when somebody scrapes and not before.

Covers: names, units and labels of everything under ``/metrics``. Does not cover counting, see ``kvstore.server``.
Labels are bounded: no keys, no sessions, and at most 64 namespaces by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.protocol.messages import Reason
from kvstore.protocol.misses import MissCause
from kvstore.protocol.statistics import (
    CurveStats,
    DaemonStats,
    DramStats,
    EventStats,
    EvictionStats,
    LoadingStats,
    LookupStats,
    MissStats,
    NamespaceStats,
    PrefetchStats,
    PutStats,
    RecordStats,
    RetentionStats,
    ServerStats,
    SsdStats,
    TenantStats,
)

__all__ = ["CONTENT_TYPE", "MAX_NAMESPACE_LABELS", "StatsCollector", "make_registry", "render_metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_NAMESPACE_LABELS: Final = 64
_CURVE_FACTORS: Final = (0.25, 0.5, 1, 2, 4, 8)
_SSD_STATES: Final = ("ok", "read-only", "off")
OTHER: Final = "other"
"""Label of all namespaces but the first 64 seen; one that really has this name is counted with them."""


class StatsCollector(Collector):
    """Turns a snapshot of the statistics into metric families.

    Args:
        snapshot: called at each scrape, on the scraper's thread.
    """

    def __init__(self, snapshot: Callable[[], DaemonStats]) -> None:
        self._snapshot = snapshot
        self._namespace_labels: set[str] = set()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registration must not take a snapshot before the daemon runs."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families of one snapshot."""
        stats = self._snapshot()
        yield _gauges("kvstore_build_info", "1, with the daemon's version.", "version", {stats.version: 1})
        yield _gauge("kvstore_uptime_seconds", "Time since the daemon started.", stats.uptime_s)
        yield from _tier(stats.dram)
        if stats.ssd is not None:
            yield from _ssd(stats.ssd)
        yield from _lookups(stats.lookups)
        if stats.misses is not None:
            yield from _misses(stats.misses)
        yield from _puts(stats.puts)
        yield from _evictions(stats.eviction)
        yield from _server(stats.server)
        if stats.retention is not None:
            yield from _retention(stats.retention)
        if stats.tenants:
            yield from _tenants(stats.tenants)
        if stats.events is not None:
            yield from _events(stats.events)
        if stats.curve is not None:
            yield from _curve(stats.curve)
        if stats.recording is not None:
            yield from _recording(stats.recording)
        if stats.prefetch is not None:
            yield from _prefetch(stats.prefetch)
        if stats.loading is not None:
            yield from _loading(stats.loading)
        yield _gauge("kvstore_sessions", "Clients connected.", len(stats.sessions))
        yield _gauge("kvstore_leases", "Leases held by clients.", stats.leases)
        yield from self._namespaces(stats.namespaces)

    def _namespaces(self, namespaces: Iterable[NamespaceStats]) -> Iterator[Metric]:
        # Once given, a label stays: over the daemon's life there are never more than 64 and OTHER.
        blocks: dict[str, int] = {}
        slot_bytes: dict[str, int] = {}
        for namespace in namespaces:
            label = namespace.label
            if label not in self._namespace_labels:
                if len(self._namespace_labels) < MAX_NAMESPACE_LABELS:
                    self._namespace_labels.add(label)
                else:
                    label = OTHER
            blocks[label] = blocks.get(label, 0) + namespace.blocks
            slot_bytes[label] = slot_bytes.get(label, 0) + namespace.slot_bytes
        yield _gauges("kvstore_namespace_blocks", "Resident blocks.", "namespace", blocks)
        yield _gauges("kvstore_namespace_resident_bytes", "Bytes of slots of resident blocks.", "namespace", slot_bytes)


def make_registry(snapshot: Callable[[], DaemonStats]) -> CollectorRegistry:
    """A registry of its own with the daemon's and its process's metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatsCollector(snapshot))
    ProcessCollector(registry=registry)
    return registry


def render_metrics(registry: CollectorRegistry) -> bytes:
    """All metrics in the Prometheus text format (``CONTENT_TYPE``)."""
    return generate_latest(registry)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(name, documentation, value=value)


def _gauges(name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _counters(name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _tier(dram: DramStats) -> Iterator[Metric]:
    for name, documentation, value in (
        ("capacity_bytes", "Most bytes of slots that may hold blocks.", dram.capacity_bytes),
        ("resident_bytes", "Bytes of slots that hold blocks.", dram.resident_bytes),
        ("record_bytes", "Bytes of resident records, without the padding of their slots.", dram.record_bytes),
        ("arena_bytes", "Bytes of the arena, grants included.", dram.arena_bytes),
        ("populated_bytes", "Bytes of the arena whose pages exist.", dram.populated_bytes),
        ("granted_bytes", "Bytes of slots lent to clients for writing.", dram.granted_bytes),
        ("limbo_bytes", "Bytes of freed slots that may still be read.", dram.limbo_bytes),
        ("slab_bytes", "Bytes of one slab.", dram.slab_bytes),
        ("free_slabs", "Slabs that no slot size uses.", dram.free_slabs),
        ("blocks", "Resident blocks.", dram.blocks),
        ("records", "Resident records.", dram.records),
        ("index_bytes", "Bytes of the index that clients map.", dram.index_bytes),
        ("max_records", "Records that the index has room for, 0 without one.", dram.max_records),
        ("degraded", "1 while the tier has a problem, which the logs explain.", 1 if dram.problem else 0),
    ):
        yield _gauges(f"kvstore_tier_{name}", documentation, "tier", {"dram": value})


def _ssd(ssd: SsdStats) -> Iterator[Metric]:
    states = {state: float(state == ssd.state) for state in _SSD_STATES}
    yield _gauges("kvstore_ssd_state", "1 for the SSD tier's state, which the logs explain.", "state", states)
    for name, documentation, value in (
        ("capacity_bytes", "Most bytes that all files of the tier may take.", ssd.capacity_bytes),
        ("file_bytes", "Bytes that they take.", ssd.file_bytes),
        ("formatted_bytes", "Bytes of slabs in the slab file.", ssd.formatted_bytes),
        ("resident_bytes", "Bytes of slots of stored records.", ssd.resident_bytes),
        ("record_bytes", "Bytes of stored records, without the padding of their slots.", ssd.record_bytes),
        ("writing_bytes", "Bytes of slots that are being written.", ssd.writing_bytes),
        ("leaving_bytes", "Bytes of freed slots that are still being read.", ssd.leaving_bytes),
        ("free_bytes", "Bytes of free slots and slabs.", ssd.free_bytes),
        ("log_bytes", "Bytes of the log.", ssd.log_bytes),
        ("blocks", "Stored blocks.", ssd.blocks),
        ("records", "Stored records.", ssd.records),
        ("waiting_blocks", "Blocks that are being demoted.", ssd.waiting_blocks),
        ("retired_bytes", "Bytes of slots in DRAM whose blocks are on their way out.", ssd.retired_bytes),
        ("clean_bytes", "Bytes of those slots whose blocks have a copy on the SSD.", ssd.clean_bytes),
        ("read_bytes_per_second", "Estimated rate of reads, 0 while unknown.", ssd.read_bytes_per_s),
        ("write_bytes_per_second", "Estimated rate of writes, 0 while unknown.", ssd.write_bytes_per_s),
        ("recovered_records", "Records found at the start.", ssd.recovered_records),
        ("recovery_seconds", "Time that it took to find them.", ssd.recovery_s),
    ):
        yield _gauge(f"kvstore_ssd_{name}", documentation, value)
    for name, documentation, value in (
        ("demoted_blocks", "Blocks written from DRAM.", ssd.demoted_blocks),
        ("demoted_bytes", "Slot bytes of demoted blocks.", ssd.demoted_bytes),
        ("dropped_blocks", "Blocks that left DRAM without a copy.", ssd.dropped_blocks),
        ("not_admitted_blocks", "Blocks that were not worth writing.", ssd.not_admitted_blocks),
        ("promoted_blocks", "Blocks brought up into DRAM.", ssd.promoted_blocks),
        ("promoted_bytes", "Slot bytes of promoted blocks.", ssd.promoted_bytes),
        ("hits", "Blocks served, by gets and by promotions.", ssd.hits),
        ("refused_loads", "Loads that would have been slower than computing anew.", ssd.refused_loads),
        ("evicted_blocks", "Blocks that had to leave for others.", ssd.evicted_blocks),
        ("evicted_bytes", "Slot bytes of evicted blocks.", ssd.evicted_bytes),
        ("removed_blocks", "Blocks removed by clients, or because their time was over.", ssd.removed_blocks),
        ("corrupt_records", "Records whose checksum was wrong.", ssd.corrupt_records),
        ("commits", "Groups of records made durable together.", ssd.groups),
        ("checkpoints", "Checkpoints that took the place of a log.", ssd.checkpoints),
    ):
        yield _counter(f"kvstore_ssd_{name}", documentation, value)
    errors = {"read": ssd.read_errors, "write": ssd.write_errors}
    yield _counters("kvstore_ssd_errors", "Reads and writes that failed.", "operation", errors)


def _lookups(lookups: LookupStats) -> Iterator[Metric]:
    requests = {"match": lookups.matches, "get": lookups.gets}
    keys = {"match": lookups.match_keys, "get": lookups.get_keys}
    hits = {"match": lookups.match_hits, "get": lookups.get_hits}
    yield _counters("kvstore_lookups", "Lookups.", "operation", requests)
    yield _counters("kvstore_lookup_keys", "Keys asked for.", "operation", keys)
    yield _counters("kvstore_lookup_hits", "Keys that were hits.", "operation", hits)
    yield _counter("kvstore_get_throttled", "Keys of gets answered throttled.", lookups.get_throttled)
    yield _counter("kvstore_mapped_lookups", "Lookups that clients served from mapped memory.", lookups.mapped_reads)
    yield _gauge(
        "kvstore_dropped_reports", "Accesses that connected clients could not report.", lookups.dropped_reports
    )
    yield _counter("kvstore_read_bytes", "Bytes of records given to clients.", lookups.bytes_out)


def _misses(misses: MissStats) -> Iterator[Metric]:
    requests = {cause.value: 0.0 for cause in MissCause}
    blocks = dict(requests)
    for cause, counted in misses.causes.items():
        requests[cause], blocks[cause] = counted.requests, counted.blocks
    yield _counters("kvstore_missed_requests", "Requests by the cause of their first missing block.", "cause", requests)
    yield _counters("kvstore_missed_blocks", "Blocks that were asked for and not there.", "cause", blocks)
    names = [f"{multiple:g}" for multiple in misses.multiples] + ["more"]
    extra = dict(zip(names, misses.extra_blocks, strict=True))
    documentation = "Evicted blocks that were missed, by the further capacity that would have kept them."
    yield _counters("kvstore_evicted_misses", documentation, "capacity_multiple", extra)
    yield _gauge("kvstore_ghosts", "Departures of blocks that are remembered.", misses.ghosts)
    yield _gauge("kvstore_ghost_bytes", "Memory for what is remembered of them.", misses.ghost_bytes)


def _puts(puts: PutStats) -> Iterator[Metric]:
    statuses = {status: getattr(puts, status) for status in ("stored", "exists", "throttled", "rejected")}
    reasons = {reason.name.lower(): 0 for reason in Reason if reason is not Reason.NONE}
    reasons |= {reason.lower(): number for reason, number in puts.reasons.items()}
    yield _counters("kvstore_puts", "Puts by answer.", "status", statuses)
    yield _counters("kvstore_put_refusals", "Puts throttled or rejected, by reason.", "reason", reasons)
    yield _counter("kvstore_written_bytes", "Bytes of records taken from clients.", puts.bytes_in)


def _evictions(eviction: EvictionStats) -> Iterator[Metric]:
    # Not by policy: it may change while the daemon runs.
    yield _counter("kvstore_evicted_blocks", "Blocks that had to leave DRAM for others.", eviction.evicted_blocks)
    yield _counter("kvstore_evicted_bytes", "Slot bytes of evicted blocks.", eviction.evicted_bytes)
    names = {"dram": eviction.policy, "ssd": eviction.ssd_policy}
    policies = GaugeMetricFamily("kvstore_eviction_policy", "1 for the policy of a tier.", labels=("tier", "policy"))
    for tier, policy in names.items():
        if policy:
            policies.add_metric((tier, policy), 1)
    yield policies
    yield _gauge("kvstore_policy_ghost_bytes", "Memory for what policies remember of others.", eviction.ghost_bytes)
    yield _counter("kvstore_policy_changes", "Changes of policies while the daemon ran.", eviction.switched)
    yield _counter(
        "kvstore_removed_blocks", "Blocks removed by clients, or because their time was over.", eviction.removed_blocks
    )
    yield _counter("kvstore_moved_records", "Records moved to empty a slab.", eviction.moved_records)
    yield _counter("kvstore_corrupt_records", "Records whose checksum was wrong.", eviction.corrupt_records)


def _retention(retention: RetentionStats) -> Iterator[Metric]:
    for name, documentation, value in (
        ("retention_budget_bytes", "Most bytes of slots that are retained.", retention.budget_bytes),
        ("retained_bytes", "Bytes of slots of retained blocks.", retention.retained_bytes),
        ("retained_blocks", "Retained blocks in DRAM.", retention.retained_blocks),
        ("low_priority_blocks", "Blocks in DRAM that leave before all others.", retention.low_blocks),
        ("retention_waiting_blocks", "Blocks with a retention that are not in DRAM.", retention.waiting_blocks),
        ("lease_limit_bytes", "Most bytes of slots that leases hold.", retention.lease_limit_bytes),
        ("leased_bytes", "Bytes of slots of leased blocks.", retention.leased_bytes),
    ):
        yield _gauge(f"kvstore_{name}", documentation, value)
    ends = {
        "budget": retention.over_budget_blocks,
        "room": retention.gave_way_blocks,
        "time": retention.ended_blocks,
        "dropped": retention.dropped_blocks,
    }
    yield _counters("kvstore_retention_ends", "Retentions that ended, by cause.", "cause", ends)
    leases = {"cut": retention.leases_cut, "refused": retention.leases_refused}
    yield _counters("kvstore_leases_limited", "Leases that were given in part, or not.", "answer", leases)


def _tenants(tenants: Iterable[TenantStats]) -> Iterator[Metric]:
    """As many labels as there are quotas in the settings."""
    some = list(tenants)
    for name, documentation, values in (
        ("used_bytes", "Bytes of DRAM slots of a tenant's blocks.", {one.name: one.used_bytes for one in some}),
        ("quota_bytes", "What they may be; 0: no quota.", {one.name: one.limit_bytes for one in some}),
        ("ssd_used_bytes", "Bytes of SSD slots of a tenant's records.", {one.name: one.ssd_used_bytes for one in some}),
        ("ssd_quota_bytes", "What they may be; 0: no quota.", {one.name: one.ssd_limit_bytes for one in some}),
    ):
        yield _gauges(f"kvstore_tenant_{name}", documentation, "tenant", values)
    evicted = {one.name: one.evicted_blocks for one in some}
    yield _counters("kvstore_tenant_evicted_blocks", "Blocks that left DRAM for a quota.", "tenant", evicted)
    refused = {one.name: one.refused_puts for one in some}
    yield _counters("kvstore_tenant_refused_puts", "Records that a quota had no room for.", "tenant", refused)


def _server(server: ServerStats) -> Iterator[Metric]:
    yield _counter("kvstore_requests", "Requests taken from the socket.", server.requests)
    yield _counter("kvstore_bad_requests", "Requests that could not be understood.", server.bad_requests)
    yield _counter("kvstore_overloaded_requests", "Requests refused for overload.", server.overloaded)
    yield _counter("kvstore_dropped_replies", "Replies that no client took.", server.replies_dropped)
    yield _gauge("kvstore_outbound_bytes", "Reply bytes on their way to clients.", server.outbound_bytes)
    yield _gauge("kvstore_queue_delay_seconds", "Wait of requests for their turn.", server.queue_delay_ms / 1000)
    yield _counter("kvstore_sessions_opened", "Clients that connected.", server.sessions_opened)
    lost = {"died": server.sessions_died, "expired": server.sessions_expired}
    yield _counters("kvstore_sessions_lost", "Clients that went without a word.", "cause", lost)


def _events(events: EventStats) -> Iterator[Metric]:
    batches = {"events": events.batches, "heartbeat": events.heartbeats}
    yield _counters("kvstore_event_batches", "Batches of KV events published.", "kind", batches)
    blocks = {"stored": events.stored_blocks, "removed": events.removed_blocks}
    yield _counters("kvstore_event_blocks", "Blocks that KV events told of.", "change", blocks)
    requests = {"replay": events.replays, "snapshot": events.snapshots}
    requests |= {"malformed": events.bad_requests, "dropped": events.dropped_requests}
    yield _counters("kvstore_event_requests", "Requests for missed KV events.", "kind", requests)


def _recording(recording: RecordStats) -> Iterator[Metric]:
    yield _gauge("kvstore_recording_on", "Whether lookups are being recorded.", recording.state == "on")
    yield _gauge("kvstore_recording_failed", "Whether the last recording ended by itself.", recording.state == "failed")
    # Of one recording: a new one begins anew.
    yield _gauge("kvstore_recording_requests", "Requests in the recording.", recording.requests)
    yield _gauge("kvstore_recording_bytes", "Bytes of the recording.", recording.bytes_written)
    yield _gauge("kvstore_recording_dropped_requests", "Requests that it lacks.", recording.dropped_requests)


def _curve(curve: CurveStats) -> Iterator[Metric]:
    rates: dict[str, float] = {}
    for factor in _CURVE_FACTORS:
        # The curve's points are not always to the byte what is asked for.
        wanted = factor * curve.capacity_bytes
        nearest = min(range(len(curve.hit_rates)), key=lambda at: abs(curve.capacities_bytes[at] - wanted))
        rates[f"{factor:g}"] = curve.hit_rates[nearest]
    yield _gauges(
        "kvstore_curve_hit_ratio", "Hit ratio that the load would have with so many times the DRAM.", "times", rates
    )
    yield _gauge("kvstore_curve_accesses", "Block accesses that the curve is about, faded.", curve.accesses)
    yield _gauge("kvstore_curve_sampled_blocks", "Blocks in the sample.", curve.sampled_blocks)
    if curve.ssd_bytes:
        yield _gauge("kvstore_curve_ssd_hit_ratio", "The same with the SSD's capacity added.", curve.ssd_hit_rate)


def _prefetch(prefetch: PrefetchStats) -> Iterator[Metric]:
    blocks = {
        "brought": prefetch.blocks,
        "used": prefetch.used_blocks,
        "left_unused": prefetch.left_blocks,
    }
    size_bytes = {
        "brought": prefetch.bytes,
        "used": prefetch.used_bytes,
        "left_unused": prefetch.left_bytes,
    }
    yield _counters("kvstore_prefetch_blocks", "Blocks brought up ahead of their use, by what became.", "what", blocks)
    yield _counters("kvstore_prefetch_bytes", "Slot bytes of those blocks.", "what", size_bytes)
    yield _counters("kvstore_prefetch_wanted", "Blocks wanted ahead of their use.", "by", prefetch.wanted)
    dropped = {"expired": prefetch.expired, "cancelled": prefetch.cancelled}
    yield _counters("kvstore_prefetch_dropped", "Records that did not begin to come up in time.", "why", dropped)
    yield _counters("kvstore_prefetch_refused", "Blocks that were not taken on, by bound.", "bound", prefetch.refused)
    yield _counter("kvstore_prefetch_merged", "Records that were on their way already.", prefetch.merged)
    hints = {"all": prefetch.hints, "delayed": prefetch.delayed_hints}
    yield _counters("kvstore_hints", "Hints of sessions that come back.", "kind", hints)
    yield _gauge("kvstore_prefetch_unused_blocks", "Blocks brought up and not used yet.", prefetch.unused_blocks)
    yield _gauge("kvstore_load_waiting_bytes", "Slot bytes that wait to be loaded.", prefetch.waiting_bytes)
    yield _gauge("kvstore_load_flying_bytes", "Slot bytes that are being loaded.", prefetch.flying_bytes)
    yield _gauge("kvstore_residence_seconds", "How long unused blocks stay in DRAM, 0 unknown.", prefetch.residence_s)


def _loading(loading: LoadingStats) -> Iterator[Metric]:
    yield _gauge("kvstore_load_bytes_per_second", "Rate of loads, 0 while unknown.", loading.read_bytes_per_s)
    yield _gauge("kvstore_load_latency_seconds", "Latency of a load.", loading.latency_s)
    yield _gauge(
        "kvstore_prefill_tokens_per_second", "Rate of the engine, 0 while unknown.", loading.prefill_tokens_per_s
    )
    yield _counters("kvstore_load_decisions", "Matches by what was worth loading.", "kind", loading.decisions)
    saved = {"loading": loading.load_saved_s, "computing": loading.refusal_saved_s}
    yield _counters("kvstore_load_saved_seconds", "Estimated seconds saved by deciding so.", "by", saved)
