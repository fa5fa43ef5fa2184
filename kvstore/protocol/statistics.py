"""What ``Stats`` is answered with: one struct a tier and a matter, as MessagePack maps.

Evolution: fields are only added, with defaults, which a daemon that does not know them leaves out.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvstore.protocol.namespace import UNNAMED

Unsigned = Annotated[int, msgspec.Meta(ge=0)]
"""An integer from 0 to 2**64 - 1."""


class NamespaceStats(msgspec.Struct, kw_only=True):
    """One namespace.

    Attributes:
        name, model, codec: of its description.
        digest: the first 8 hexadecimal digits of its digest in this generation.
        generation: the current one.
        blocks, slot_bytes: that are resident.
    """

    name: str
    generation: Unsigned
    blocks: Unsigned
    slot_bytes: Unsigned
    model: str = ""
    codec: str = ""
    digest: str = ""

    @property
    def label(self) -> str:
        """What people call it: its name, or where nobody gave it one its model and codec."""
        model = self.model.rstrip("/").rpartition("/")[2]
        if self.name != UNNAMED or not model:
            return self.name
        return f"{model} {self.codec}"


class SlotClassStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One slot size: slabs cut for it, and slots by state.

    ``cut_slots`` is what the slabs hold, counted slab by slab, adjacent ones that are cut as one together; 0 of a
    daemon that does not say.
    """

    slot_bytes: Unsigned
    slabs: Unsigned
    used_slots: Unsigned
    free_slots: Unsigned
    cut_slots: Unsigned = 0


class DramStats(msgspec.Struct, kw_only=True):
    """The DRAM tier.

    Attributes:
        capacity_bytes: what resident blocks may occupy, in slots.
        arena_bytes, populated_bytes: the slabs, and those of them that have memory.
        resident_bytes, record_bytes: slots of resident records, and the records in them without padding.
        granted_bytes, limbo_bytes: slots lent for writing, and slots that wait for readers to finish.
        index_bytes: the index that clients map, outside the capacity; 0 where they do not.
        max_records: what the index has room for.
        problem: why the tier is smaller than configured, "" where it is not.
    """

    capacity_bytes: Unsigned
    arena_bytes: Unsigned
    populated_bytes: Unsigned
    resident_bytes: Unsigned
    record_bytes: Unsigned
    granted_bytes: Unsigned
    limbo_bytes: Unsigned
    blocks: Unsigned
    records: Unsigned
    slab_bytes: Unsigned
    free_slabs: Unsigned
    problem: str
    classes: list[SlotClassStats]
    index_bytes: Unsigned = 0
    max_records: Unsigned = 0


class SsdStats(msgspec.Struct, kw_only=True):
    """The SSD tier. Counts are since the daemon's start.

    Attributes:
        directory: where its files are.
        state: "ok", "read-only" (nothing is written any more) or "off" (nothing is read either).
        problem: why it is not ok, "" where it is.
        direct: whether it is read and written past the page cache.
        capacity_bytes, file_bytes: what all its files may take together, and what they take.
        formatted_bytes, free_bytes: of slabs that the slab file has, and of free slots and slabs in them.
        resident_bytes, record_bytes: slots of stored records, and the records in them without padding.
        writing_bytes, leaving_bytes: slots that are being written, and those that left and are being read still.
        blocks, records: that are stored.
        demoted_blocks, demoted_bytes: written from DRAM.
        dropped_blocks: that left DRAM without a copy.
        promoted_blocks, promoted_bytes: brought up into DRAM.
        evicted_blocks, evicted_bytes: that had to leave for others.
        removed_blocks: by clients, or because their time was over and they were to be removed then (``retain``).
        hits: blocks served from here, by gets and by promotions.
        refused_loads: that would have been slower than computing the blocks anew.
        not_admitted_blocks: that were not worth writing.
        corrupt_records: found damaged and dropped.
        read_errors, write_errors: of the device or the file system.
        groups: commits, each of several records.
        log_bytes, checkpoints: of the log, and how often it was replaced by a checkpoint.
        recovered_records, recovery_s: found at the start, and how long that took.
        read_bytes_per_s, write_bytes_per_s: as estimated, 0 while unknown.
        waiting_blocks: that are being demoted.
        retired_bytes, clean_bytes: slots of DRAM whose blocks may leave it: all of them, and those that have a copy.
    """

    directory: str
    state: str
    problem: str
    direct: bool
    capacity_bytes: Unsigned
    file_bytes: Unsigned
    formatted_bytes: Unsigned
    resident_bytes: Unsigned
    record_bytes: Unsigned
    writing_bytes: Unsigned
    leaving_bytes: Unsigned
    blocks: Unsigned
    records: Unsigned
    free_bytes: Unsigned
    demoted_blocks: Unsigned
    demoted_bytes: Unsigned
    dropped_blocks: Unsigned
    promoted_blocks: Unsigned
    promoted_bytes: Unsigned
    evicted_blocks: Unsigned
    evicted_bytes: Unsigned
    removed_blocks: Unsigned
    hits: Unsigned
    refused_loads: Unsigned
    not_admitted_blocks: Unsigned
    corrupt_records: Unsigned
    read_errors: Unsigned
    write_errors: Unsigned
    groups: Unsigned
    log_bytes: Unsigned
    checkpoints: Unsigned
    recovered_records: Unsigned
    recovery_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    waiting_blocks: Unsigned
    retired_bytes: Unsigned
    clean_bytes: Unsigned


class LoadingStats(msgspec.Struct, kw_only=True):
    """What blocks on the SSD cost to load and to compute anew, and what was decided for matches that found some.

    Attributes:
        read_bytes_per_s, latency_s: of loads, measured from asking to verified; 0 while unknown.
        queued_bytes: slots that wait to be loaded, or are being loaded.
        prefill_tokens_per_s: of the engine; 0 while unknown.
        prefill_source: "set", "reported" by the engine, or "".
        decisions: matches by what of their blocks was worth loading: "all", "none", "part", "unknown" (no prefill rate,
            or nothing was measured yet) or "probe" (let through to measure again).
        refused_blocks: that were not worth loading.
        load_saved_s: what loading saved against computing, as estimated.
        refusal_saved_s: what computing saved against loading.
    """

    read_bytes_per_s: float
    latency_s: float
    queued_bytes: Unsigned
    prefill_tokens_per_s: float
    prefill_source: str
    decisions: dict[str, int]
    refused_blocks: Unsigned
    load_saved_s: float
    refusal_saved_s: float


class PrefetchStats(msgspec.Struct, kw_only=True):
    """Blocks that were brought up ahead of their use. Counts are since the daemon's start.

    Attributes:
        wanted: blocks by who wanted them: "arrived" (a match), "ahead" (a prefetch), "hinted" or "warming".
        blocks, bytes: that came up, and their slots.
        used_blocks, used_bytes: of those, used since.
        unused_blocks: of those, in DRAM and not used yet.
        left_blocks, left_bytes: of those, evicted before anybody used them.
        merged: records that were wanted, or on their way, already.
        expired: records whose time was over before they began to come up.
        cancelled: records whose client was gone before.
        refused: blocks by the bound that they met: "bytes", "client_bytes", "no_room" or "hints".
        waiting_bytes, flying_bytes, most_bytes: slots that wait, slots that are being read, and most of both.
        hints: of sessions that come back and have blocks below.
        delayed_hints: of those, begun later: what comes up sooner would have left again by then.
        residence_s: how long blocks stay in DRAM that nobody uses; 0 while unknown.
    """

    wanted: dict[str, int]
    blocks: Unsigned
    bytes: Unsigned
    used_blocks: Unsigned
    used_bytes: Unsigned
    unused_blocks: Unsigned
    left_blocks: Unsigned
    left_bytes: Unsigned
    merged: Unsigned
    expired: Unsigned
    cancelled: Unsigned
    refused: dict[str, int]
    waiting_bytes: Unsigned
    flying_bytes: Unsigned
    most_bytes: Unsigned
    hints: Unsigned
    delayed_hints: Unsigned
    residence_s: float


class LookupStats(msgspec.Struct, kw_only=True):
    """Lookups since the start. A request's match, gets and puts with one access id count each once.

    Attributes:
        mapped_reads: matches and gets that clients served themselves; the other counts include them.
        dropped_reports: of clients that are there now, what they could not tell because their ring was full.
    """

    matches: Unsigned
    match_keys: Unsigned
    match_hits: Unsigned
    gets: Unsigned
    get_keys: Unsigned
    get_hits: Unsigned
    get_throttled: Unsigned
    bytes_out: Unsigned
    mapped_reads: Unsigned = 0
    dropped_reports: Unsigned = 0


class PutStats(msgspec.Struct, kw_only=True):
    """Puts since the start. ``replaced``: of the stored ones, those that took the place of a worse record."""

    stored: Unsigned
    exists: Unsigned
    throttled: Unsigned
    rejected: Unsigned
    bytes_in: Unsigned
    reasons: dict[str, int]
    replaced: Unsigned = 0


class EvictionStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Blocks that left the tier since the start.

    Attributes:
        policy, ssd_policy: of DRAM and of the SSD, "" without one.
        admission: what is written below, "" without an SSD.
        removed_blocks: by clients, or because their time was over and they were to be removed then (``retain``).
        ghost_bytes: memory that the policies take for what they remember of blocks that left.
        switched: how often a policy was changed.
        following, ssd_following: which of its orders a policy that has several follows now, "" of one that has not.
    """

    policy: str
    evicted_blocks: Unsigned
    evicted_bytes: Unsigned
    removed_blocks: Unsigned
    moved_records: Unsigned
    corrupt_records: Unsigned
    ssd_policy: str = ""
    admission: str = ""
    ghost_bytes: Unsigned = 0
    switched: Unsigned = 0
    following: str = ""
    ssd_following: str = ""


class SessionStats(msgspec.Struct, kw_only=True):
    """One client."""

    session: Unsigned
    pid: Unsigned
    idle_s: float
    requests: Unsigned
    leases: Unsigned
    granted_bytes: Unsigned
    outbound_bytes: Unsigned
    version: str
    mapped: bool = False


class ServerStats(msgspec.Struct, kw_only=True):
    """The request path."""

    requests: Unsigned
    bad_requests: Unsigned
    overloaded: Unsigned
    replies_dropped: Unsigned
    sessions_opened: Unsigned
    sessions_died: Unsigned
    sessions_expired: Unsigned
    outbound_bytes: Unsigned
    queue_delay_ms: float


class EventStats(msgspec.Struct, kw_only=True):
    """KV events, since the start.

    Attributes:
        endpoint, replay_endpoint: where they are published and had again.
        sequence: number of the last batch.
        batches, heartbeats: published with events, and without.
        stored_blocks, removed_blocks: blocks that were told to have come, and to have gone one by one.
        waiting_blocks: changes that are not published yet.
        kept_batches, kept_bytes: what can be replayed.
        replays, snapshots: requests for a replay, and for a snapshot's first page.
        bad_requests: that were none.
        dropped_requests: of peers that were too many, asked too much or did not read.
    """

    endpoint: str
    replay_endpoint: str
    sequence: Unsigned
    batches: Unsigned
    heartbeats: Unsigned
    stored_blocks: Unsigned
    removed_blocks: Unsigned
    waiting_blocks: Unsigned
    kept_batches: Unsigned
    kept_bytes: Unsigned
    replays: Unsigned
    snapshots: Unsigned
    bad_requests: Unsigned
    dropped_requests: Unsigned


class RetentionStats(msgspec.Struct, kw_only=True):
    """What may not leave DRAM as the eviction policy would have it. Counts are since the daemon's start.

    Attributes:
        budget_bytes: slots of blocks that may be retained together.
        retained_blocks, retained_bytes: that are retained now, in DRAM.
        low_blocks: in DRAM, of a priority below the normal one: they leave before all others.
        waiting_blocks: with a retention, and not in DRAM now; it holds again when they are back.
        over_budget_blocks: that lost their retention because the budget was used up.
        gave_way_blocks: retained ones that left DRAM, because nothing else could.
        ended_blocks, dropped_blocks: whose time was over: normal again, and removed.
        lease_limit_bytes, leased_bytes: slots in DRAM that leases may hold together, and those that they do.
        leases_cut, leases_refused: leases that were given for the first blocks only, or for none, for want of that.
    """

    budget_bytes: Unsigned
    retained_blocks: Unsigned
    retained_bytes: Unsigned
    low_blocks: Unsigned
    waiting_blocks: Unsigned
    over_budget_blocks: Unsigned
    gave_way_blocks: Unsigned
    ended_blocks: Unsigned
    dropped_blocks: Unsigned
    lease_limit_bytes: Unsigned
    leased_bytes: Unsigned
    leases_cut: Unsigned
    leases_refused: Unsigned


class TenantStats(msgspec.Struct, kw_only=True):
    """A tenant with a quota; a tenant is all namespaces of one name. Counts are since the daemon's start.

    Attributes:
        used_bytes, limit_bytes: slots in DRAM of its blocks, and what they may occupy; limit 0: it has no quota there.
        evicted_blocks: that left DRAM for its quota.
        refused_puts: records that its quota had no room for.
        ssd_used_bytes, ssd_limit_bytes, ssd_evicted_blocks: likewise on the SSD.
    """

    name: str
    used_bytes: Unsigned
    limit_bytes: Unsigned
    evicted_blocks: Unsigned
    refused_puts: Unsigned
    ssd_used_bytes: Unsigned = 0
    ssd_limit_bytes: Unsigned = 0
    ssd_evicted_blocks: Unsigned = 0


class CurveStats(msgspec.Struct, kw_only=True):
    """The hit rate that the load of the last hour or two would have in an LRU of other capacities, from a sample.

    Attributes:
        capacities_bytes, hit_rates: the curve: capacities in slots, ascending, and the share of block accesses, 0 to 1.
        capacity_bytes, hit_rate: at the DRAM tier's capacity.
        ssd_bytes, ssd_hit_rate: with the SSD tier's capacity added, which the curve may not reach; 0 without one.
        reach_bytes: largest capacity that the curve is known for.
        accesses: block accesses that it is about, estimated; each counts half after ``half_life_s``.
        age_s: how long the daemon has been watching.
        sampling_rate, sampled_blocks: share of the blocks that is sampled, and how many that are now.
        hot_blocks, hot_bytes, hot_share: blocks that one request in a hundred uses: how many, their slots, and their
            share of the accesses.
        memory_bytes: most memory that the estimate takes.
    """

    capacities_bytes: list[Unsigned]
    hit_rates: list[float]
    capacity_bytes: Unsigned
    hit_rate: float
    ssd_bytes: Unsigned
    ssd_hit_rate: float
    reach_bytes: Unsigned
    accesses: float
    half_life_s: float
    age_s: float
    sampling_rate: float
    sampled_blocks: Unsigned
    hot_blocks: Unsigned
    hot_bytes: Unsigned
    hot_share: float
    memory_bytes: Unsigned


class CauseStats(msgspec.Struct, kw_only=True):
    """Misses of one cause: engine requests whose first missing block had it, and blocks."""

    requests: Unsigned
    blocks: Unsigned


class MissStats(msgspec.Struct, kw_only=True):
    """Why lookups missed, since the daemon's start.

    Each block that a match asked for and did not find is counted once; so is each that a get did not find, unless it
    belongs to the request of a match. The causes add up to ``requests`` and ``blocks``.

    Attributes:
        requests: engine requests that missed something.
        blocks: that they missed.
        causes: by name of a ``MissCause``, those that occurred.
        multiples: upper bounds of ``extra_blocks``, as multiples of the capacity of the lowest tier.
        extra_blocks: of blocks that were evicted from the lowest tier, how many so much more capacity of it would have
            kept, and last those that would have needed more than the largest.
        ghosts: departures that are remembered.
        ghost_bytes, ghost_limit_bytes: memory that they take, and may take.
        oldest_ghost_s: how long ago the oldest of them was; what left before that counts as never seen.
    """

    requests: Unsigned
    blocks: Unsigned
    causes: dict[str, CauseStats]
    multiples: list[float]
    extra_blocks: list[Unsigned]
    ghosts: Unsigned
    ghost_bytes: Unsigned
    ghost_limit_bytes: Unsigned
    oldest_ghost_s: float


class RecordStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The recording of lookups that goes on, or the last one.

    Attributes:
        state: "on", "off" or "failed" (it ended by itself).
        directory: for recordings.
        max_bytes: that they may take there, all together.
        problem: why it failed, "" where it did not.
        file: its current file, or its last one; "" where nothing was recorded yet, or nothing of it is left.
        started_unix_s: when it began.
        requests, blocks, bytes_written: in its files, those included that are gone.
        open_requests: that are not over yet.
        dropped_requests: because writing could not keep up.
    """

    state: str
    directory: str
    max_bytes: Unsigned
    problem: str = ""
    file: str = ""
    started_unix_s: float = 0.0
    requests: Unsigned = 0
    blocks: Unsigned = 0
    bytes_written: Unsigned = 0
    open_requests: Unsigned = 0
    dropped_requests: Unsigned = 0


class DaemonStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Everything ``kvstore stats`` shows; ``events`` where they are published, ``ssd`` where there is that tier.

    ``retention`` is None of a daemon that does not know of it, ``tenants`` are those with a quota. ``misses`` is None
    where they are not explained, ``recording`` where nothing was recorded.
    """

    version: str
    pid: Unsigned
    incarnation: str
    uptime_s: float
    endpoint: str
    dram: DramStats
    lookups: LookupStats
    puts: PutStats
    eviction: EvictionStats
    server: ServerStats
    namespaces: list[NamespaceStats]
    sessions: list[SessionStats]
    leases: Unsigned
    events: EventStats | None = None
    ssd: SsdStats | None = None
    retention: RetentionStats | None = None
    tenants: list[TenantStats] = []
    curve: CurveStats | None = None
    misses: MissStats | None = None
    recording: RecordStats | None = None
    prefetch: PrefetchStats | None = None
    loading: LoadingStats | None = None
