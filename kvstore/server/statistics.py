"""Everything ``kvstore stats`` and ``/metrics`` show, taken at one moment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import kvstore
from kvstore.core.misses import Misses
from kvstore.core.store import Store
from kvstore.format.constants import PAGE_BYTES
from kvstore.policy.base import following
from kvstore.policy.curve import LiveCurve
from kvstore.protocol.statistics import (
    CurveStats,
    DaemonStats,
    DramStats,
    EvictionStats,
    LookupStats,
    NamespaceStats,
    PutStats,
    RecordStats,
    RetentionStats,
    ServerStats,
    SessionStats,
    SlotClassStats,
    TenantStats,
)
from kvstore.server.below import Below
from kvstore.server.counters import RequestCounters
from kvstore.server.events import EventPublisher
from kvstore.server.mapping import Mapping
from kvstore.server.outbound import Outbound
from kvstore.server.overload import Overload
from kvstore.server.recorder import Recorder
from kvstore.server.sessions import Sessions
from kvstore.server.ssd import SsdTier
from kvstore.server.transport import RouterTransport
from kvstore.tiers.dram import Arena
from kvstore.tiers.index import Index

_MOST: Final = (1 << 63) - 1
_CURVE_OCTAVES: Final = (-2, 3)
_CURVE_STEPS: Final = 8
"""Points of the curve for each doubling, from a quarter of the capacity to eight times as much."""


@dataclass(slots=True)
class Statistics:
    """Where the numbers are."""

    endpoint: str
    incarnation: int
    started_ns: int
    store: Store
    arena: Arena
    sessions: Sessions
    outbound: Outbound
    overload: Overload
    transport: RouterTransport
    counters: RequestCounters
    mapping: Mapping
    index: Index | None = None
    events: EventPublisher | None = None
    ssd: SsdTier | None = None
    misses: Misses | None = None
    recorder: Recorder | None = None
    problem: str = ""
    curve: LiveCurve | None = None
    below: Below | None = None

    def snapshot(self, now_ns: int) -> DaemonStats:
        """All statistics; costs microseconds and changes nothing."""
        counters = self.counters
        return DaemonStats(
            version=kvstore.__version__,
            pid=os.getpid(),
            incarnation=f"{self.incarnation:016x}",
            uptime_s=(now_ns - self.started_ns) / 1e9,
            endpoint=self.endpoint,
            dram=self._dram(),
            lookups=LookupStats(
                matches=counters.matches,
                match_keys=_told(counters.match_keys),
                match_hits=_told(counters.match_hits),
                gets=counters.gets,
                get_keys=_told(counters.get_keys),
                get_hits=_told(counters.get_hits),
                get_throttled=counters.get_throttled,
                bytes_out=_told(counters.bytes_out),
                mapped_reads=counters.mapped_reads,
                dropped_reports=_told(self.mapping.dropped_reports()),
            ),
            puts=PutStats(
                stored=counters.stored,
                exists=counters.exists,
                throttled=counters.throttled,
                rejected=counters.rejected,
                bytes_in=counters.bytes_in,
                reasons=dict(counters.reasons),
                replaced=self.store.counters.replaced_records,
            ),
            eviction=self._eviction(),
            server=self._server(),
            namespaces=[
                NamespaceStats(
                    name=state.description.name,
                    generation=state.generation,
                    blocks=len(state.blocks),
                    slot_bytes=state.slot_bytes,
                    model=state.description.model,
                    codec=state.description.codec,
                    digest=state.digest.hex()[:8],
                )
                for state in self.store.namespaces.by_id.values()
                if state.current
            ],
            sessions=self._sessions(now_ns),
            leases=len(self.store.leases),
            events=None if self.events is None else self.events.statistics(),
            recording=self._recording(),
            ssd=None if self.ssd is None else self.ssd.statistics(),
            curve=None if self.curve is None else self._curve(self.curve),
            misses=None if self.misses is None else self.misses.statistics(now_ns),
            retention=self._retention(),
            tenants=self._tenants(),
            prefetch=None if self.below is None else self.below.prefetch_statistics(),
            loading=None if self.below is None else self.below.loading_statistics(),
        )

    def _curve(self, curve: LiveCurve) -> CurveStats:
        capacity_bytes = self.store.limits.capacity_bytes
        first, last = (octave * _CURVE_STEPS for octave in _CURVE_OCTAVES)
        capacities = [int(capacity_bytes * 2 ** (step / _CURVE_STEPS)) for step in range(first, last + 1)]
        ssd_bytes = 0 if self.ssd is None else capacity_bytes + (self.ssd.settings.capacity_bytes or 0)
        *rates, here, with_ssd = curve.hit_rates([*capacities, capacity_bytes, min(ssd_bytes, curve.reach_bytes)])
        return CurveStats(
            capacities_bytes=capacities,
            hit_rates=rates,
            capacity_bytes=capacity_bytes,
            hit_rate=here,
            ssd_bytes=ssd_bytes,
            ssd_hit_rate=with_ssd,
            reach_bytes=curve.reach_bytes,
            accesses=curve.accesses,
            half_life_s=curve.half_life_s,
            age_s=curve.age_s,
            sampling_rate=curve.sampling_rate,
            sampled_blocks=curve.sampled_blocks,
            hot_blocks=curve.hot_blocks,
            hot_bytes=curve.hot_bytes,
            hot_share=curve.hot_share,
            memory_bytes=curve.memory_bytes,
        )

    def _dram(self) -> DramStats:
        store, slabs = self.store, self.store.slabs
        return DramStats(
            capacity_bytes=store.limits.capacity_bytes,
            arena_bytes=slabs.slab_bytes * len(slabs.slabs),
            populated_bytes=slabs.slab_bytes * slabs.usable_slabs,
            resident_bytes=store.resident_bytes,
            record_bytes=store.resident_record_bytes,
            granted_bytes=store.granted_bytes,
            limbo_bytes=store.limbo_bytes,
            blocks=store.block_count,
            records=store.record_count,
            slab_bytes=slabs.slab_bytes,
            free_slabs=slabs.free_slabs,
            problem=self.problem,
            index_bytes=0 if self.index is None else self.index.header.index_bytes,
            max_records=0 if self.index is None else store.limits.max_records,
            classes=[
                SlotClassStats(
                    slot_bytes=slots.slot_pages * PAGE_BYTES,
                    slabs=slots.joined,
                    used_slots=slots.used_slots,
                    free_slots=slots.free_slots,
                    cut_slots=sum(slab.slots for slab in slots.slabs.values()),
                )
                for slots in sorted(slabs.classes.values(), key=lambda slots: slots.slot_pages)
            ],
        )

    def _recording(self) -> RecordStats | None:
        """Of a recording that goes on, or went on since the start."""
        recording = None if self.recorder is None else self.recorder.statistics()
        return recording if recording is not None and recording.started_unix_s else None

    def _eviction(self) -> EvictionStats:
        counters, ssd = self.store.counters, self.store.ssd
        return EvictionStats(
            policy=self.store.policy.name,
            evicted_blocks=counters.evicted_blocks,
            evicted_bytes=counters.evicted_bytes,
            removed_blocks=counters.removed_blocks,
            moved_records=counters.moved_records,
            corrupt_records=counters.corrupt_records,
            ssd_policy="" if ssd is None else ssd.policy.name,
            admission="" if ssd is None else self.store.admission.name,
            ghost_bytes=self.store.policy.ghost_bytes() + (0 if ssd is None else ssd.policy.ghost_bytes()),
            switched=counters.switched_policies,
            following=following(self.store.policy),
            ssd_following="" if ssd is None else following(ssd.policy),
        )

    def _retention(self) -> RetentionStats:
        retention, leases = self.store.retention, self.store.leases
        return RetentionStats(
            budget_bytes=retention.budget_bytes,
            retained_blocks=retention.held_blocks,
            retained_bytes=retention.held_bytes,
            low_blocks=retention.low_blocks,
            waiting_blocks=retention.waiting_blocks,
            over_budget_blocks=retention.over_budget_blocks,
            gave_way_blocks=retention.gave_way_blocks,
            ended_blocks=retention.ended_blocks,
            dropped_blocks=retention.dropped_blocks,
            lease_limit_bytes=leases.limit_bytes,
            leased_bytes=leases.held_bytes,
            leases_cut=leases.cut,
            leases_refused=leases.refused,
        )

    def _tenants(self) -> list[TenantStats]:
        here = self.store.tenants
        below = {} if self.store.ssd is None else self.store.ssd.tenants
        stats = []
        for name in sorted({*here, *below}):
            tenant, copy = here.get(name), below.get(name)
            # One with a quota on the SSD only has none to keep to here.
            spaces = [state for state in self.store.namespaces.by_id.values() if state.description.name == name]
            stats.append(
                TenantStats(
                    name=name,
                    used_bytes=sum(state.slot_bytes for state in spaces),
                    limit_bytes=0 if tenant is None else tenant.limit_bytes,
                    evicted_blocks=0 if tenant is None else tenant.evicted_blocks,
                    refused_puts=0 if tenant is None else tenant.refused_puts,
                    ssd_used_bytes=0 if copy is None else copy.slot_bytes,
                    ssd_limit_bytes=0 if copy is None else copy.limit_bytes,
                    ssd_evicted_blocks=0 if copy is None else copy.evicted_blocks,
                )
            )
        return stats

    def _server(self) -> ServerStats:
        return ServerStats(
            requests=self.counters.requests,
            bad_requests=self.counters.bad_requests + self.transport.malformed,
            overloaded=self.overload.throttled,
            replies_dropped=self.transport.dropped_replies,
            sessions_opened=self.sessions.opened,
            sessions_died=self.sessions.died,
            sessions_expired=self.sessions.expired,
            outbound_bytes=self.outbound.total_bytes,
            queue_delay_ms=self.overload.delay_ns / 1e6,
        )

    def _sessions(self, now_ns: int) -> list[SessionStats]:
        store = self.store
        return [
            SessionStats(
                session=session.id,
                pid=session.pid,
                idle_s=(now_ns - session.last_ns) / 1e9,
                requests=session.requests,
                leases=store.leases.count_of(session.id),
                granted_bytes=store.sessions[session.id].granted_bytes,
                outbound_bytes=self.outbound.bytes_of(session.id),
                version=session.version,
                mapped=self.mapping.is_mapped(session),
            )
            for session in self.sessions.all()
        ]


def _told(count: int) -> int:
    """A sum of what clients say of themselves, which may be anything; on the wire it has 64 bits."""
    return min(count, _MOST)
