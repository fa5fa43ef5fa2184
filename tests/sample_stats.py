"""Statistics of a daemon that does not exist, for tests of what shows them."""

from __future__ import annotations

from kvstore.protocol.statistics import (
    CurveStats,
    DaemonStats,
    DramStats,
    EventStats,
    EvictionStats,
    LoadingStats,
    LookupStats,
    NamespaceStats,
    PrefetchStats,
    PutStats,
    RetentionStats,
    ServerStats,
    SessionStats,
    SlotClassStats,
    SsdStats,
    TenantStats,
)

MIB = 1 << 20


def sample_stats(
    *,
    namespaces: int = 2,
    sessions: int = 1,
    problem: str = "",
    fresh: bool = False,
    events: bool = False,
    ssd: bool = False,
    curve: bool = False,
    ahead: bool = False,
) -> DaemonStats:
    """A busy daemon's statistics, or with ``fresh`` those of one that nobody has asked anything."""
    used = 0 if fresh else 1
    return DaemonStats(
        version="0.1.0",
        pid=4242,
        incarnation="5f3a9c0012345678",
        uptime_s=11_220.5,
        endpoint="ipc:///run/user/1000/kvstore/default.sock",
        dram=DramStats(
            capacity_bytes=8192 * MIB,
            arena_bytes=8256 * MIB,
            populated_bytes=8256 * MIB,
            resident_bytes=used * 3000 * MIB,
            record_bytes=used * 2990 * MIB,
            granted_bytes=used * 3 * MIB,
            limbo_bytes=0,
            blocks=used * 12_000,
            records=used * 24_000,
            slab_bytes=4 * MIB,
            free_slabs=1234,
            problem=problem,
            classes=[SlotClassStats(slot_bytes=266_240, slabs=750, used_slots=11_000, free_slots=250)] * used,
            index_bytes=81 * MIB,
            max_records=524_288,
        ),
        lookups=LookupStats(
            matches=used * 1000,
            match_keys=used * 64_000,
            match_hits=used * 32_000,
            gets=used * 2000,
            get_keys=used * 32_000,
            get_hits=used * 31_999,
            get_throttled=used * 7,
            bytes_out=used * 7_812 * MIB,
            mapped_reads=used * 2500,
            dropped_reports=used * 3,
        ),
        puts=PutStats(
            stored=used * 24_000,
            exists=used * 100,
            throttled=used * 5,
            rejected=used * 2,
            bytes_in=used * 6_000 * MIB,
            reasons={"overloaded": 5, "too_large": 2} if used else {},
        ),
        eviction=EvictionStats(
            policy="lru",
            evicted_blocks=used * 300,
            evicted_bytes=used * 75 * MIB,
            removed_blocks=used * 4,
            moved_records=used * 12,
            corrupt_records=0,
        ),
        server=ServerStats(
            requests=used * 29_000,
            bad_requests=used * 3,
            overloaded=used * 5,
            replies_dropped=0,
            sessions_opened=used * 9,
            sessions_died=used * 2,
            sessions_expired=0,
            outbound_bytes=used * 2 * MIB,
            queue_delay_ms=0.25,
        ),
        namespaces=[
            NamespaceStats(name=f"model-{index}", generation=index, blocks=index + 1, slot_bytes=(index + 1) * MIB)
            for index in range(namespaces)
        ],
        sessions=[
            SessionStats(
                session=index + 1,
                pid=5000 + index,
                idle_s=0.4,
                requests=12_000,
                leases=1,
                granted_bytes=3 * MIB,
                outbound_bytes=2 * MIB,
                version="0.1.0",
                mapped=index % 2 == 0,
            )
            for index in range(sessions)
        ],
        leases=used * 1,
        events=EventStats(
            endpoint="ipc:///run/kvstore/default.sock.events",
            replay_endpoint="ipc:///run/kvstore/default.sock.replay",
            sequence=1_795_655_053_617_998,
            batches=1500,
            heartbeats=40,
            stored_blocks=90_000,
            removed_blocks=78_000,
            waiting_blocks=3,
            kept_batches=1500,
            kept_bytes=7 * MIB,
            replays=12,
            snapshots=2,
            bad_requests=0,
            dropped_requests=1,
        )
        if events
        else None,
        ssd=sample_ssd() if ssd else None,
        curve=sample_curve(ssd=ssd) if curve else None,
        prefetch=sample_prefetch() if ahead else None,
        loading=sample_loading() if ahead else None,
    )


def sample_prefetch() -> PrefetchStats:
    """What came up ahead of its use."""
    return PrefetchStats(
        wanted={"arrived": 3000, "hinted": 500, "warming": 1000},
        blocks=4000,
        bytes=1 << 30,
        used_blocks=3000,
        used_bytes=768 * MIB,
        unused_blocks=600,
        left_blocks=400,
        left_bytes=100 * MIB,
        merged=70,
        expired=12,
        cancelled=5,
        refused={"client_bytes": 90, "no_room": 33},
        waiting_bytes=2 * MIB,
        flying_bytes=4 * MIB,
        most_bytes=4 << 30,
        hints=40,
        delayed_hints=7,
        residence_s=95.0,
    )


def sample_loading() -> LoadingStats:
    """What was loaded and what was computed instead."""
    return LoadingStats(
        read_bytes_per_s=3.1e9,
        latency_s=0.0004,
        queued_bytes=6 * MIB,
        prefill_tokens_per_s=8000.0,
        prefill_source="reported",
        decisions={"all": 900, "none": 40, "part": 8},
        refused_blocks=1200,
        load_saved_s=812.5,
        refusal_saved_s=30.25,
    )


def sample_curve(*, ssd: bool = False) -> CurveStats:
    """A curve that gives ten points for each doubling, of 8 GiB."""
    steps = range(-16, 25)
    return CurveStats(
        capacities_bytes=[int((8 << 30) * 2 ** (step / 8)) for step in steps],
        hit_rates=[0.30 + 0.10 * step / 8 for step in steps],
        capacity_bytes=8 << 30,
        hit_rate=0.30,
        ssd_bytes=108 << 30 if ssd else 0,
        ssd_hit_rate=0.62 if ssd else 0.0,
        reach_bytes=108 << 30 if ssd else 64 << 30,
        accesses=120_000.4,
        half_life_s=3600.0,
        age_s=11_220.5,
        sampling_rate=0.125,
        sampled_blocks=8100,
        hot_blocks=12,
        hot_bytes=3 << 20,
        hot_share=0.04,
        memory_bytes=5 << 20,
    )


def sample_retention() -> RetentionStats:
    """Of a daemon whose clients retain and lease much."""
    return RetentionStats(
        budget_bytes=2 << 30,
        retained_blocks=1_200,
        retained_bytes=1 << 30,
        low_blocks=40,
        waiting_blocks=7,
        over_budget_blocks=300,
        gave_way_blocks=5,
        ended_blocks=900,
        dropped_blocks=60,
        lease_limit_bytes=4 << 30,
        leased_bytes=1 << 30,
        leases_cut=3,
        leases_refused=2,
    )


def sample_tenants() -> list[TenantStats]:
    """One that is nearly full in memory, and one with a quota on the SSD only."""
    archive = TenantStats(
        name="archive",
        used_bytes=5 * MIB,
        limit_bytes=0,
        evicted_blocks=0,
        refused_puts=0,
        ssd_used_bytes=10 << 30,
        ssd_limit_bytes=40 << 30,
        ssd_evicted_blocks=11,
    )
    chat = TenantStats(name="chat", used_bytes=900 * MIB, limit_bytes=1000 * MIB, evicted_blocks=70, refused_puts=4)
    return [archive, chat]


def sample_ssd() -> SsdStats:
    """The SSD tier of a busy daemon."""
    return SsdStats(
        directory="/var/lib/kvstore/default",
        state="ok",
        problem="",
        direct=True,
        capacity_bytes=100 << 30,
        file_bytes=25 << 30,
        formatted_bytes=24 << 30,
        resident_bytes=20 << 30,
        record_bytes=19 << 30,
        writing_bytes=16 * MIB,
        leaving_bytes=MIB,
        blocks=81_000,
        records=162_000,
        free_bytes=4 << 30,
        demoted_blocks=90_000,
        demoted_bytes=22 << 30,
        dropped_blocks=12,
        promoted_blocks=40_000,
        promoted_bytes=10 << 30,
        evicted_blocks=9_000,
        evicted_bytes=2 << 30,
        removed_blocks=5,
        hits=41_000,
        refused_loads=17,
        not_admitted_blocks=0,
        corrupt_records=1,
        read_errors=2,
        write_errors=3,
        groups=2_812,
        log_bytes=6 * MIB,
        checkpoints=3,
        recovered_records=70_000,
        recovery_s=0.75,
        read_bytes_per_s=3.1e9,
        write_bytes_per_s=0.0,
        waiting_blocks=64,
        retired_bytes=96 * MIB,
        clean_bytes=80 * MIB,
    )
