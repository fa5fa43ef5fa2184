"""Writing the index: publishing, replacing, withdrawing, moving records, and finding out whether a slot is being read.

Only the daemon's one thread calls these. ``entries`` maps a slot to its entry's number: an int64 array with a word for
each page of the arena, private to the daemon.
"""

from __future__ import annotations

from typing import Final

from kvstore.mapped.atomics import fence_acquire, fence_full, fence_release, load, store, store_release
from kvstore.mapped.bucket import first_bucket, hash_key, second_bucket
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.index_file import (
    BUCKET_BYTES,
    BUCKET_ENTRIES,
    ENTRY_BYTES,
    ENTRY_CHECKSUM,
    ENTRY_IDENTITY,
    ENTRY_KEY,
    ENTRY_PLACE,
    WHO_MASK,
)

NO_ENTRY: Final = 0
"""A slot without an entry. Entries are numbered from 1: the entry's offset from the first bucket / 64."""

WITHDRAWN: Final = -1
HAZARDED: Final = -2
"""Marks in ``entries`` while a batch of slots is withdrawn."""

HAZARD_WORDS: Final = 64
"""Slots that one client can read in place at a time."""

PUBLISH_WORDS: Final = 8
"""Words of one record to publish: key 4, place, identity, checksum, result."""


@inlined
def _free_entry(bucket: int) -> tuple[int, int]:
    """Free entries of a bucket, and the last of them."""
    count = 0
    last = -1
    for index in range(BUCKET_ENTRIES):
        if load(bucket + 8 * index) == 0:
            count += 1
            last = index
    return count, last


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def publish(buckets: int, bucket_count: int, seed: int, entries: int, records: int, count: int) -> int:
    """Make records readable.

    Args:
        buckets: address of the index's first bucket.
        bucket_count: of the index.
        seed: of the index.
        entries: address of the map from slots to entries.
        records: ``count`` times ``PUBLISH_WORDS`` words, as they will stand in the entry. The last of each is set to 1
            where it was published, 0 where both buckets are full.
        count: how many.

    Returns:
        How many found no room.
    """
    full = 0
    for at in range(records, records + count * PUBLISH_WORDS * 8, PUBLISH_WORDS * 8):
        word0, word1, word2, word3 = load(at), load(at + 8), load(at + 16), load(at + 24)
        place, identity = load(at + 32), load(at + 40)
        tag = hash_key(seed, word0, word1, word2, word3, identity & WHO_MASK)
        number = first_bucket(tag, bucket_count)
        bucket = buckets + number * BUCKET_BYTES
        free, index = _free_entry(bucket)
        other = buckets + second_bucket(tag, bucket_count, number) * BUCKET_BYTES
        other_free, other_index = _free_entry(other)
        if other_free > free:
            bucket, free, index = other, other_free, other_index
        if free == 0:
            store(at + 56, 0)
            full += 1
            continue
        entry = bucket + ENTRY_BYTES * (index + 1)
        sequence = load(entry)
        store(entry, sequence + 1)
        # Release fence: whoever sees one of the fields below also sees the odd sequence, or a later one.
        fence_release()
        store(entry + ENTRY_KEY, word0)
        store(entry + ENTRY_KEY + 8, word1)
        store(entry + ENTRY_KEY + 16, word2)
        store(entry + ENTRY_KEY + 24, word3)
        store(entry + ENTRY_PLACE, place)
        store(entry + ENTRY_IDENTITY, identity)
        store(entry + ENTRY_CHECKSUM, load(at + 48))
        # Release: whoever sees this sequence sees the fields, and the bytes of the slot: the daemon acquired the ring's
        # head that the writing client released behind them, or wrote them itself.
        store_release(entry, sequence + 2)
        store_release(bucket + 8 * index, tag)
        store(entries + 8 * (place & WHO_MASK), (entry - buckets) // ENTRY_BYTES)
        store(at + 56, 1)
    return full


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def candidates(
    buckets: int, bucket_count: int, seed: int, word0: int, word1: int, word2: int, word3: int, who: int, out: int
) -> int:
    """The slots in both buckets of a key, of which one has to leave when both are full; how many were written."""
    tag = hash_key(seed, word0, word1, word2, word3, who)
    number = first_bucket(tag, bucket_count)
    found = 0
    for choice in range(2):
        if choice == 1:
            number = second_bucket(tag, bucket_count, number)
        bucket = buckets + number * BUCKET_BYTES
        for index in range(BUCKET_ENTRIES):
            if load(bucket + 8 * index) != 0:
                store(out + 8 * found, load(bucket + ENTRY_BYTES * (index + 1) + ENTRY_PLACE) & WHO_MASK)
                found += 1
    return found


@inlined
def invalidate(buckets: int, entries: int, slot: int) -> None:
    """Make a slot's entry unfindable, if it has one, and mark the slot as withdrawn."""
    number = load(entries + 8 * slot)
    if number > NO_ENTRY:
        entry = buckets + number * ENTRY_BYTES
        sequence = load(entry)
        store(entry, sequence + 1)
        fence_release()
        store(entry + ENTRY_IDENTITY, 0)
        store_release(entry, sequence + 2)
        bucket = entry - (entry - buckets) % BUCKET_BYTES
        store_release(bucket + 8 * ((entry - bucket) // ENTRY_BYTES - 1), 0)
    store(entries + 8 * slot, WITHDRAWN)


@inlined
def mark_hazards(entries: int, slot_count: int, clients: int, client_count: int) -> None:
    """Mark withdrawn slots that some client's hazard word names. Words come from clients: anything may stand there."""
    for number in range(client_count):
        words = load(clients + 8 * number)
        for index in range(HAZARD_WORDS):
            named = load(words + 8 * index)
            if 0 < named <= slot_count and load(entries + 8 * (named - 1)) == WITHDRAWN:
                store(entries + 8 * (named - 1), HAZARDED)


@inlined
def take_marks(entries: int, slots: int, count: int) -> int:
    """Replace each slot by -slot - 1 where it is hazarded, and remove all marks; how many are."""
    held = 0
    for at in range(slots, slots + 8 * count, 8):
        slot = load(at)
        if load(entries + 8 * slot) == HAZARDED:
            store(at, -slot - 1)
            held += 1
        store(entries + 8 * slot, NO_ENTRY)
    return held


@compiled("int64(int64, int64, int64, int64, int64, int64, int64)")
def withdraw(
    buckets: int, entries: int, slot_count: int, clients: int, client_count: int, slots: int, count: int
) -> int:
    """Make slots unreadable, all of them before looking once whether any is being read.

    Args:
        buckets: the index.
        entries: address of the map from slots to entries; ``slot_count`` words.
        slot_count: pages of the arena.
        clients: addresses of ``client_count`` clients' hazard words.
        client_count: how many.
        slots: ``count`` words, which must lie inside the arena; a slot that a hazard names comes back as -slot - 1.
        count: how many.

    Returns:
        How many are hazarded.
    """
    for at in range(slots, slots + 8 * count, 8):
        invalidate(buckets, entries, load(at))
    # Full fence, the daemon's half of the hazard protocol (Michael: "Hazard pointers", 2004). A reader stores its
    # hazard, fences, and reads the entry's sequence again; here sequences are stored, then a fence, then hazards are
    # read. Without a full fence on both sides each could miss the other's store: both processors keep a store in a
    # buffer while a later load of another address already has its value (x86-64's one reordering; arm64 has it too).
    fence_full()
    mark_hazards(entries, slot_count, clients, client_count)
    # Acquire fence: a hazard that was read as let go was stored with a release behind the last read of its slot, so
    # those reads are over before the slot is given to a writer.
    fence_acquire()
    return take_marks(entries, slots, count)


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def rescan(entries: int, slot_count: int, clients: int, client_count: int, slots: int, count: int) -> int:
    """Look again whether withdrawn slots are being read; as ``withdraw``, for slots whose entries are gone already."""
    for at in range(slots, slots + 8 * count, 8):
        store(entries + 8 * load(at), WITHDRAWN)
    # No hazard can be new: its holder would have found the entry changed. So there is nothing to fence before, and
    # behind it what ``withdraw`` has behind it.
    mark_hazards(entries, slot_count, clients, client_count)
    fence_acquire()
    return take_marks(entries, slots, count)


@compiled("int64(int64, int64, int64, int64)")
def replace(buckets: int, entries: int, source: int, record: int) -> int:
    """Let an entry name another record of its block and part, in another slot; 0 where the source has no entry.

    A reader finds the one or the other: at no time is neither there. What reads the source finds the sequence changed.
    ``record`` is the address of ``PUBLISH_WORDS`` words as of ``publish``.
    """
    number = load(entries + 8 * source)
    if number <= NO_ENTRY:
        return 0
    entry = buckets + number * ENTRY_BYTES
    sequence = load(entry)
    store(entry, sequence + 1)
    # Release fence, as in ``publish``: namespace, part and key stay what they are, and with them the tag.
    fence_release()
    place = load(record + 32)
    store(entry + ENTRY_PLACE, place)
    store(entry + ENTRY_IDENTITY, load(record + 40))
    store(entry + ENTRY_CHECKSUM, load(record + 48))
    # Release: the new record's bytes are seen by whoever sees its place.
    store_release(entry, sequence + 2)
    store(entries + 8 * (place & WHO_MASK), number)
    store(entries + 8 * source, NO_ENTRY)
    return 1


@compiled("int64(int64, int64, int64, int64)")
def move(buckets: int, entries: int, source: int, target: int) -> int:
    """Let a record's entry name another slot, to which its bytes were copied; 0 where it has no entry.

    Readers of the source find the sequence changed and try again: at no time is the record missing.
    """
    number = load(entries + 8 * source)
    if number <= NO_ENTRY:
        return 0
    entry = buckets + number * ENTRY_BYTES
    sequence = load(entry)
    store(entry, sequence + 1)
    fence_release()
    place = load(entry + ENTRY_PLACE)
    store(entry + ENTRY_PLACE, (place & ~WHO_MASK) | target)
    # Release: the copied bytes are seen by whoever sees the new place.
    store_release(entry, sequence + 2)
    store(entries + 8 * target, number)
    store(entries + 8 * source, NO_ENTRY)
    return 1
