"""The tables of ``kvstore stats``, at most 80 columns wide for usual names and numbers.

The client that asked is left out of the clients, where it would be noise.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.retention_tables import quota_table, retention_facts
from kvstore.cli.stats_ahead import ahead_tables
from kvstore.protocol.statistics import (
    DaemonStats,
    DramStats,
    EventStats,
    EvictionStats,
    NamespaceStats,
    PutStats,
    RecordStats,
    SessionStats,
    SsdStats,
)

__all__ = ["policy_words", "stats_tables", "waiting"]

_MOST_UNFILLED: Final = 1 / 8
"""Share of the memory that slots may leave unused before it is said to be too much."""
_MOST_ROWS: Final = 16
_LABEL_CELLS: Final = 38
_BAR_CELLS: Final = 16
_FOLLOWING: Final = {"lru": "as LRU for now", "learned": "by learned returns"}
"""What ``adaptive`` does: its own order only where that clearly hits more."""


def stats_tables(stats: DaemonStats, since: DaemonStats | None = None) -> RenderableType:
    """All tables of one snapshot.

    Args:
        stats: the snapshot.
        since: an earlier one, for rates; of no use if the daemon was restarted in between.
    """
    if since is not None and since.incarnation != stats.incarnation:
        since = None
    tables = (
        _daemon(stats),
        _tiers(stats),
        _lookups(stats, since),
        _puts(stats, since),
        _evictions(stats.eviction),
        retention_facts(stats.retention),
        quota_table(stats.tenants),
        _memory(stats.dram),
        *(_ssd(stats.ssd) if stats.ssd is not None else ()),
        *ahead_tables(stats),
        _slots(stats.dram),
        _namespaces(stats.namespaces),
        _clients(stats.sessions),
    )
    parts = [part for made in tables if made is not None for part in (made, "")]
    return Group(*parts[:-1])


def waiting(reason: str) -> RenderableType:
    """What a watch shows while nobody answers."""
    return Group(Text("waiting for the daemon ...", style="yellow"), Text(reason, style="dim"))


def _daemon(stats: DaemonStats) -> Table:
    return render.facts(
        f"kvstore {stats.version}",
        [
            ("endpoint", stats.endpoint),
            ("daemon", f"pid {stats.pid}, up {render.duration(stats.uptime_s)}, incarnation {stats.incarnation}"),
            ("requests", ", ".join(_requests(stats))),
            *([("events", ", ".join(_events(stats.events)))] if stats.events is not None else []),
            *([("recording", ", ".join(_recording(stats.recording)))] if stats.recording is not None else []),
        ],
    )


def _events(events: EventStats) -> Iterator[str]:
    yield f"{render.count(events.batches)} batches"
    yield f"{render.blocks(events.stored_blocks)} stored, {render.count(events.removed_blocks)} removed"
    for number, what in (
        (events.replays, "replays"),
        (events.snapshots, "snapshots"),
        (events.bad_requests, "malformed requests"),
        (events.dropped_requests, "requests dropped"),
    ):
        if number:
            yield f"{render.count(number)} {what}"


def _recording(recording: RecordStats) -> Iterator[str]:
    yield recording.state if not recording.problem else f"{recording.state}: {recording.problem}"
    yield f"{render.count(recording.requests)} requests in {render.size(recording.bytes_written)}"
    if recording.dropped_requests:
        yield f"{render.count(recording.dropped_requests)} dropped"


def _requests(stats: DaemonStats) -> Iterator[str]:
    server = stats.server
    yield f"{render.count(server.requests)}, queue delay {render.latency(server.queue_delay_ms / 1000)}"
    for number, what in (
        (server.bad_requests, "malformed"),
        (server.overloaded, "refused for overload"),
        (server.replies_dropped, "replies dropped"),
    ):
        if number:
            yield f"{render.count(number)} {what}"


def _tiers(stats: DaemonStats) -> RenderableType:
    dram = stats.dram
    made = render.table("Tiers", ["tier", "used", "capacity", render.text_column(""), "full", "blocks", "records"])
    full = dram.resident_bytes / dram.capacity_bytes if dram.capacity_bytes else 0.0
    made.add_row(
        "dram",
        render.size(dram.resident_bytes),
        render.size(dram.capacity_bytes),
        render.Bar(full, _BAR_CELLS),
        render.percent(full),
        render.count(dram.blocks),
        render.count(dram.records),
    )
    problems = [f"problem: {dram.problem}"] if dram.problem else []
    ssd = stats.ssd
    if ssd is not None:
        # As kvstore top has it: slots in use, and the log. Slabs that are formatted and empty are room.
        used_bytes = ssd.resident_bytes + ssd.writing_bytes + ssd.leaving_bytes + ssd.log_bytes
        full = used_bytes / ssd.capacity_bytes if ssd.capacity_bytes else 0.0
        made.add_row(
            "ssd",
            render.size(used_bytes),
            render.size(ssd.capacity_bytes),
            render.Bar(full, _BAR_CELLS),
            render.percent(full),
            render.count(ssd.blocks),
            render.count(ssd.records),
        )
        if ssd.state != "ok" or ssd.problem:
            problems.append(f"the SSD tier is {ssd.state}: {ssd.problem or 'see the log of the daemon'}")
    return Group(made, *(Text(problem, style="bold red") for problem in problems)) if problems else made


def _unfilled_bytes(dram: DramStats) -> int:
    """Bytes of slabs that slots of their size do not fill."""
    filled = sum((one.used_slots + one.free_slots) * one.slot_bytes for one in dram.classes)
    return max(sum(one.slabs for one in dram.classes) * dram.slab_bytes - filled, 0)


def _memory(dram: DramStats) -> RenderableType:
    unfilled = _unfilled_bytes(dram)
    slabs = f"{render.size(dram.slab_bytes)} each, {render.count(dram.free_slabs)} free"
    arena = render.size(dram.arena_bytes)
    if dram.populated_bytes < dram.arena_bytes:
        arena += f", {render.ratio(dram.populated_bytes, dram.arena_bytes)} populated"
    made = render.facts(
        "DRAM memory",
        [
            ("arena", arena),
            ("records", f"{render.size(dram.record_bytes)} ({_share(dram.record_bytes, dram.resident_bytes)})"),
            ("granted", f"{render.size(dram.granted_bytes)} lent for writing"),
            ("limbo", f"{render.size(dram.limbo_bytes)} freed but perhaps still read"),
            ("slabs", slabs),
            ("unfilled", f"{render.size(unfilled)} of slabs, by slots of their size"),
            ("index", _index(dram)),
        ],
    )
    if unfilled <= dram.arena_bytes * _MOST_UNFILLED:
        return made
    advice = (
        f"{render.ratio(unfilled, dram.arena_bytes)} of the memory is in slabs that slots do not fill: restart the "
        "daemon, or set dram.slab_bytes to a multiple of the most frequent slot size"
    )
    return Group(made, Text(advice, style="bold red"))


def _index(dram: DramStats) -> str:
    if not dram.index_bytes:
        return "none, clients do not map"
    return f"{render.size(dram.index_bytes)}, for {render.count(dram.max_records)} records"


def _share(part: int, whole: int) -> str:
    return f"{render.ratio(part, whole)} of used" if whole else "nothing used"


def _lookups(stats: DaemonStats, since: DaemonStats | None) -> RenderableType:
    lookups = stats.lookups
    columns = ["operation", "requests", "blocks asked", "hits", "hit rate"]
    made = render.table("Lookups", columns if since is None else [*columns, "asked now"])
    earlier = (since or stats).lookups
    for operation, requests, asked, hits, asked_before in (
        ("match", lookups.matches, lookups.match_keys, lookups.match_hits, earlier.match_keys),
        ("get", lookups.gets, lookups.get_keys, lookups.get_hits, earlier.get_keys),
    ):
        cells = [operation, *map(render.count, (requests, asked, hits)), render.ratio(hits, asked)]
        if since is not None:
            cells.append(render.rate(asked - asked_before, stats.uptime_s - since.uptime_s))
        made.add_row(*cells)
    note = f"read {render.size(lookups.bytes_out)}"
    if since is not None:
        read_bytes = lookups.bytes_out - earlier.bytes_out
        note += f", now {render.throughput(read_bytes, stats.uptime_s - since.uptime_s)}"
    if lookups.mapped_reads:
        note += f"; {render.ratio(lookups.mapped_reads, lookups.matches + lookups.gets)} mapped"
    if lookups.dropped_reports:
        note += f"; {render.count(lookups.dropped_reports)} reports dropped"
    if lookups.get_throttled:
        note += f"; {render.count(lookups.get_throttled)} throttled"
    return Group(made, Text(note, style="dim"))


def _puts(stats: DaemonStats, since: DaemonStats | None) -> RenderableType:
    puts = stats.puts
    made = render.table("Puts", ["", "stored", "exists", "throttled", "rejected"])
    numbers = _answers(puts)
    made.add_row("records", *map(render.count, numbers))
    note = f"written {render.size(puts.bytes_in)}"
    if since is not None:
        seconds = stats.uptime_s - since.uptime_s
        changes = (new - old for new, old in zip(numbers, _answers(since.puts), strict=True))
        made.add_row("now", *(render.rate(change, seconds) for change in changes))
        note += f", now {render.throughput(puts.bytes_in - since.puts.bytes_in, seconds)}"
    if puts.reasons:
        reasons = sorted(puts.reasons.items(), key=lambda item: -item[1])
        note += f"; refused: {', '.join(f'{render.count(number)} {_words(reason)}' for reason, number in reasons)}"
    return Group(made, Text(note, style="dim"))


def _answers(puts: PutStats) -> tuple[int, int, int, int]:
    return puts.stored, puts.exists, puts.throttled, puts.rejected


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


def policy_words(name: str, following: str) -> str:
    """A policy, and which of its orders it follows where it has several."""
    return f"{name}, {_FOLLOWING.get(following, following)}" if following else name


def _evictions(eviction: EvictionStats) -> Table:
    facts = [("policy", policy_words(eviction.policy, eviction.following))]
    if eviction.ssd_policy:
        below = policy_words(eviction.ssd_policy, eviction.ssd_following)
        facts.append(("of the SSD", f"{below}; admits {eviction.admission}"))
    facts += [
        ("evicted", f"{render.blocks(eviction.evicted_blocks)}, {render.size(eviction.evicted_bytes)}"),
        ("removed", f"{render.blocks(eviction.removed_blocks)}, by clients or expired"),
        ("moved", f"{render.count(eviction.moved_records)} records, to empty slabs"),
        ("corrupt", f"{render.count(eviction.corrupt_records)} records, turned into misses"),
    ]
    if eviction.ghost_bytes:
        facts.append(("ghosts", f"{render.size(eviction.ghost_bytes)} of memory, for blocks that left"))
    if eviction.switched:
        facts.append(("switched", f"{render.count(eviction.switched)} times, while running"))
    return render.facts("Eviction", facts)


def _ssd(ssd: SsdStats) -> tuple[RenderableType, ...]:
    made = render.table("SSD", ["", "blocks", "bytes"])
    for name, blocks, size_bytes in (
        ("demoted", ssd.demoted_blocks, ssd.demoted_bytes),
        ("promoted", ssd.promoted_blocks, ssd.promoted_bytes),
        ("evicted", ssd.evicted_blocks, ssd.evicted_bytes),
    ):
        made.add_row(name, render.count(blocks), render.size(size_bytes))
    waiting = f"{render.blocks(ssd.waiting_blocks)} to be demoted, {render.size(ssd.writing_bytes)} being written"
    facts = [
        ("directory", f"{ssd.directory}, {'direct I/O' if ssd.direct else 'through the page cache'}"),
        ("records", f"{render.size(ssd.record_bytes)} ({_share(ssd.record_bytes, ssd.resident_bytes)})"),
        ("slabs", f"{render.size(ssd.formatted_bytes)}, {render.size(ssd.free_bytes)} free"),
        ("waiting", waiting),
        ("retired", f"{render.size(ssd.retired_bytes)} of DRAM, {render.size(ssd.clean_bytes)} with a copy"),
        ("rates", f"read {_estimate(ssd.read_bytes_per_s)}, write {_estimate(ssd.write_bytes_per_s)}"),
        ("log", f"{render.size(ssd.log_bytes)}, {render.count(ssd.checkpoints)} checkpoints"),
        ("commits", f"{render.count(ssd.groups)} groups of records"),
        ("recovered", f"{render.count(ssd.recovered_records)} records in {render.duration(ssd.recovery_s)}"),
    ]
    for name, numbers in (
        ("not kept", {"dropped": ssd.dropped_blocks, "not admitted": ssd.not_admitted_blocks}),
        ("not loaded", {"slower than computing anew": ssd.refused_loads}),
        ("damaged", {"records": ssd.corrupt_records}),
        ("errors", {"reads": ssd.read_errors, "writes": ssd.write_errors}),
    ):
        told = ", ".join(f"{render.count(number)} {what}" for what, number in numbers.items() if number)
        if told:
            facts.append((name, told))
    return Group(made, Text(f"{render.blocks(ssd.hits)} served", style="dim")), render.facts("SSD files", facts)


def _estimate(bytes_per_s: float) -> str:
    return render.throughput(bytes_per_s, 1.0) if bytes_per_s else "unknown"


def _slots(dram: DramStats) -> RenderableType | None:
    if not dram.classes:
        return None
    made = render.table("Slots", ["slot", "slabs", "used", "free", render.text_column(""), "in use"])
    for one in dram.classes[:_MOST_ROWS]:
        slots = one.used_slots + one.free_slots
        made.add_row(
            render.size(one.slot_bytes),
            render.count(one.slabs),
            render.count(one.used_slots),
            render.count(one.free_slots),
            render.Bar(one.used_slots / slots if slots else 0.0, _BAR_CELLS),
            render.ratio(one.used_slots, slots),
        )
    return _with_more(made, len(dram.classes))


def _namespaces(namespaces: Sequence[NamespaceStats]) -> RenderableType | None:
    if not namespaces:
        return None
    labels = Counter(one.label for one in namespaces)
    made = render.table("Namespaces", ["namespace", "generation", "blocks", "used"])
    for one in sorted(namespaces, key=lambda one: -one.slot_bytes)[:_MOST_ROWS]:
        cells = (str(one.generation), render.count(one.blocks), render.size(one.slot_bytes))
        # What differs in something else, such as the revision or a tenant's salt, is told apart by its digest.
        label = render.shortened(one.label, _LABEL_CELLS)
        made.add_row(render.plain(label if labels[one.label] == 1 else f"{label} {one.digest}"), *cells)
    return _with_more(made, len(namespaces))


def _clients(sessions: Sequence[SessionStats]) -> RenderableType | None:
    others = sorted((one for one in sessions if one.pid != os.getpid()), key=lambda one: one.idle_s)
    if not others:
        return None
    columns: list[str | render.Column] = [
        "pid",
        "idle",
        "requests",
        "leases",
        "granted",
        "outbound",
        render.text_column("by"),
        render.text_column("version"),
    ]
    made = render.table("Clients", columns)
    for one in others[:_MOST_ROWS]:
        made.add_row(
            str(one.pid),
            render.duration(one.idle_s),
            render.count(one.requests),
            render.count(one.leases),
            render.size(one.granted_bytes),
            render.size(one.outbound_bytes),
            "mapped" if one.mapped else "socket",
            render.plain(one.version),
        )
    return _with_more(made, len(others))


def _with_more(made: Table, rows: int) -> RenderableType:
    if rows <= _MOST_ROWS:
        return made
    return Group(made, Text(f"... {render.count(rows - _MOST_ROWS)} more, --json has them all", style="dim"))
