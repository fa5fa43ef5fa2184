"""Access reports: what a mapped client asked for and got, one ring record and the first missing keys behind it."""

from __future__ import annotations

from typing import Final

from kvstore.mapped.atomics import copy, load, store
from kvstore.mapped.client_file import (
    HEAD_OFFSET,
    MAX_MISSING,
    WORD_ACCESS,
    WORD_BYTES,
    WORD_COUNTS,
    WORD_KIND,
    WORD_RUNS,
    WORD_SEQUENCE,
    WORD_SLOT,
    WORD_TIME,
    RingKind,
)
from kvstore.mapped.compiled import inlined
from kvstore.mapped.context import FILE, NAMESPACE_ID
from kvstore.mapped.ring import advance_quietly, place, report_room

NAMED_AT_ONCE: Final = MAX_MISSING
_MATCH: Final = int(RingKind.MATCH)
_GET: Final = int(RingKind.GET)
_SUSPECT: Final = int(RingKind.SUSPECT)


@inlined
def begin_report(file: int, kind: int, part: int, namespace: int, named: int) -> int:
    """Address of a report's record, its first word written; 0 where it is dropped.

    ``named`` missing keys follow, at most ``MAX_MISSING``.
    """
    head = load(file + HEAD_OFFSET)
    following = (named + 1) // 2
    if report_room(file, head, 1 + following) == 0:
        return 0
    record = place(file, head)
    store(record + WORD_KIND, kind | following << 8 | named << 16 | part << 32 | namespace << 48)
    return record


@inlined
def fill_report(
    record: int, asked: int, hits: int, slot: int, sequence: int, access: int, now: int, payload_bytes: int, later: int
) -> None:
    """The other words of a report. ``later``: 1 on all but the first report of one get."""
    store(record + WORD_COUNTS, asked | hits << 32)
    store(record + WORD_SLOT, slot)
    store(record + WORD_SEQUENCE, sequence)
    store(record + WORD_ACCESS, access)
    store(record + WORD_TIME, now)
    store(record + WORD_BYTES, payload_bytes)
    store(record + WORD_RUNS, later)


@inlined
def name_missing(file: int, index: int, key: int) -> None:
    """Write the missing key at an address, the ``index``-th of a report that was begun, behind it."""
    record = place(file, load(file + HEAD_OFFSET) + 1 + index // 2)
    copy(record + 32 * (index & 1), key, 32)


@inlined
def end_report(context: int, named: int) -> None:
    """Publish a report."""
    advance_quietly(context, load(load(context + FILE) + HEAD_OFFSET) + 1 + (named + 1) // 2)


@inlined
def report_suspect(context: int, slot: int, sequence: int, part: int) -> None:
    """Tell the daemon that a record is not what its entry says; it looks for itself."""
    record = begin_report(load(context + FILE), _SUSPECT, part, load(context + NAMESPACE_ID), 0)
    if record != 0:
        fill_report(record, 0, 0, slot, sequence, 0, 0, 0, 0)
        end_report(context, 0)
