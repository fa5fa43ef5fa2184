"""The ring through which a client tells the daemon what it did: one producer, one consumer, 64-byte records.

Lamport's queue ("Proving the correctness of multiprocess programs", 1977): the producer alone advances the head, the
consumer alone advances ``consumed``, each with a release store behind what it covers. The consumer advances only after
everything it took is published, so a producer that sees ``consumed`` pass a commit finds it in the index.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.atomics import copy, fence_full, load, load_acquire, store, store_release
from kvstore.mapped.checksum import checksum_of
from kvstore.mapped.client_file import (
    AWAKE_OFFSET,
    CONSUMED_OFFSET,
    DROPPED_REPORTS_OFFSET,
    HEAD_OFFSET,
    RING_OFFSET,
    RING_RECORD_BYTES,
    RING_RECORDS,
    WORD_SLOT,
    RingKind,
)
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.context import FILE
from kvstore.mapped.system import ring_bell

_MASK: Final = RING_RECORDS - 1
_COMMIT: Final = int(RingKind.COMMIT)
_MATCH: Final = int(RingKind.MATCH)
_GET: Final = int(RingKind.GET)
_KEPT_FOR_COMMITS: Final = 512
"""Places that reports leave free: a report can be dropped, a commit must not wait for one."""

TAKEN_WORDS: Final = 8
HEADER_CHECKED_BYTES: Final = RECORD_HEADER_BYTES - 8


# ---------------------------------------------------------------- the client's side


@inlined
def room(file: int, head: int) -> int:
    """Places that are free. Acquire: what the daemon read out of them it has read before."""
    return RING_RECORDS - (head - load_acquire(file + CONSUMED_OFFSET))


@inlined
def place(file: int, head: int) -> int:
    """Address of the record with that number."""
    return file + RING_OFFSET + (head & _MASK) * RING_RECORD_BYTES


@inlined
def advance(context: int, head: int) -> None:
    """Publish the records before ``head``, and ring where the daemon sleeps.

    The doorbell is Dekker's pattern: here the head is stored, then a full fence, then the bell is read; the daemon
    stores the bell, then a full fence, then reads heads. One of the two sees the other's store, so no commit is left
    lying while both sleep.
    """
    # Release: the daemon that acquires this head sees the records, and the bytes of the slots they commit. Bytes that
    # were stored non-temporally were fenced by the copy (atomics.fence_streams).
    file = load(context + FILE)
    store_release(file + HEAD_OFFSET, head)
    fence_full()
    if load(file + AWAKE_OFFSET) == 0:
        # Up: of several records written before the daemon wakes, one rings.
        store(file + AWAKE_OFFSET, 1)
        ring_bell(context)


@inlined
def report_room(file: int, head: int, records: int) -> int:
    """Whether a report of so many records fits; one that does not is dropped and counted."""
    if room(file, head) - _KEPT_FOR_COMMITS >= records:
        return 1
    store(file + DROPPED_REPORTS_OFFSET, load(file + DROPPED_REPORTS_OFFSET) + 1)
    return 0


@inlined
def advance_quietly(context: int, head: int) -> None:
    """Publish reports, and ring only where the ring fills up: the daemon looks each second anyway."""
    file = load(context + FILE)
    if room(file, head) > RING_RECORDS // 2:
        store_release(file + HEAD_OFFSET, head)
    else:
        advance(context, head)


@compiled("int64(int64)")
def consumed(file: int) -> int:
    """Records that the daemon has dealt with. Acquire: their answers, read afterwards, are there."""
    return load_acquire(file + CONSUMED_OFFSET)


# ---------------------------------------------------------------- the daemon's side


@compiled("int64(int64, int64, int64, int64, int64, int64, int64)")
def take(file: int, taken: int, out: int, limit: int, arena: int, arena_bytes: int, headers: int) -> int:
    """Copy waiting records out, and the record headers in the slots that they commit.

    Nothing in the file is believed: the head is bounded, and what was copied out is what is looked at from then on.

    Args:
        file: the client's file.
        taken: records taken so far, by the daemon's own count.
        out: room for ``limit`` records.
        limit: most records to take.
        arena: address of the memory that slots lie in.
        arena_bytes: its size.
        headers: room for ``limit`` times 256 bytes: the header of each committed slot. The first word of it is 0 where
            the slot lies outside the arena or the header's checksum is wrong.

    Returns:
        How many records were taken; -1: the head is impossible, the client is not to be believed any more.
    """
    # Acquire: see ``advance``.
    waiting = load_acquire(file + HEAD_OFFSET) - taken
    if waiting < 0 or waiting > RING_RECORDS:
        return -1
    count = min(waiting, limit)
    keys = 0
    for index in range(count):
        record = out + index * RING_RECORD_BYTES
        copy(record, place(file, taken + index), RING_RECORD_BYTES)
        if keys > 0:
            # A continuation: nothing but keys, which may look like anything.
            keys -= 1
            continue
        kind = load(record) & 0xFF
        if kind != _COMMIT:
            keys = (load(record) >> 8) & 0xFF if kind in (_MATCH, _GET) else 0
            continue
        header = headers + index * RECORD_HEADER_BYTES
        slot = load(record + WORD_SLOT)
        # Compared as a page: multiplied, a wild number would wrap, and compiled arithmetic takes for granted that none
        # does.
        if slot < 1 or slot >= arena_bytes // PAGE_BYTES:
            store(header, 0)
            continue
        copy(header, arena + slot * PAGE_BYTES, RECORD_HEADER_BYTES)
        if checksum_of(header, HEADER_CHECKED_BYTES) != load(header + HEADER_CHECKED_BYTES):
            store(header, 0)
    return count


@compiled("int64(int64, int64, int64)")
def waiting(files: int, count: int, out: int) -> int:
    """In how many rings something waits; their numbers go to ``out``.

    ``files`` is the address of ``count`` pairs of words: a file's address and what was taken from its ring.
    """
    found = 0
    for number in range(count):
        at = files + 16 * number
        if load(load(at) + HEAD_OFFSET) != load(at + 8):
            store(out + 8 * found, number)
            found += 1
    return found


@compiled("int64(int64, int64)")
def lower_bells(files: int, count: int) -> int:
    """Let every client ring from now on; in how many rings something waits nevertheless (see ``advance``)."""
    for at in range(files, files + 16 * count, 16):
        store(load(at) + AWAKE_OFFSET, 0)
    fence_full()
    found = 0
    for at in range(files, files + 16 * count, 16):
        if load(load(at) + HEAD_OFFSET) != load(at + 8):
            found += 1
    return found


@compiled("void(int64, int64)")
def consume(file: int, taken: int) -> None:
    """Say that records up to here are dealt with. Release: what they brought about is seen by who sees this."""
    store_release(file + CONSUMED_OFFSET, taken)
