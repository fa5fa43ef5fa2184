"""Records whose payloads others make: slots are taken out of a lane, filled by whoever encodes, and committed together.

A batch is an array of items that the caller keeps; what stands in an item's slot word is held by this client until
``commit_slots`` or ``return_slots`` has set it to 0, whatever happens in between. Only ``seal_slots`` and
``fill_slots`` run without the interpreter lock.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.atomics import copy, fence_full, fence_streams, fill_zero, load, stack_words, store, store_release
from kvstore.mapped.checksum import checksum_of, copy_checksummed
from kvstore.mapped.client_file import (
    HEAD_OFFSET,
    WORD_ACCESS,
    WORD_COUNTS,
    WORD_KIND,
    WORD_SLOT,
    WORD_TIME,
)
from kvstore.mapped.compiled import compiled
from kvstore.mapped.context import ARENA, FILE, FULL, HEADER, LOOK, NAMESPACE_ID, NO_GRANT, NO_LANE, STALE
from kvstore.mapped.grants import GRANT_PAGES_SHIFT, GRANT_SLOT_MASK, claim
from kvstore.mapped.index_reader import usable
from kvstore.mapped.ring import advance, place, room
from kvstore.mapped.streaming import STREAM_FROM_BYTES
from kvstore.mapped.system import look_is_due, now_ns, touch
from kvstore.mapped.writes import (
    _COMMIT,
    _HEADER_CHECKSUM,
    _KEY,
    _PARENT,
    _PAYLOAD_CHECKSUM,
    _RECORD_BYTES,
    _SECTION_BYTES,
    _lane_for,
    _write_return,
)

ITEM_SLOT: Final = 0
"""The granted slot, 0 for none."""
ITEM_SLOT_BYTES: Final = 8
ITEM_PAYLOAD_BYTES: Final = 16
"""Length of all sections."""
ITEM_CHECKSUM: Final = 24
ITEM_KEY: Final = 32
ITEM_PARENT: Final = 64
ITEM_SECTIONS: Final = 96
"""Four words: length of each section, 0 where there is none."""
ITEM_SOURCE: Final = 128
"""``fill_slots``: address of the encoded payload."""
ITEM_BYTES: Final = 136
ITEM_WORDS: Final = ITEM_BYTES // 8

_DIGEST: Final = 88
"""Of the namespace, in a record's header."""
_HEADER_WORDS: Final = RECORD_HEADER_BYTES // 8


@compiled("int64(int64, int64, int64, int64)")
def claim_slots(context: int, items: int, count: int, record_bytes: int) -> int:
    """Take up to ``count`` granted slots for records of at most ``record_bytes`` into items that hold none.

    Returns:
        How many, at least 1, the first items'; or ``LOOK``, ``OVER``, ``STALE``, ``FULL``, ``NO_LANE``, ``NO_GRANT``.
    """
    if look_is_due(context, now_ns(context)) != 0:
        return LOOK
    refused = usable(context)
    if refused != 0:
        return refused
    file = load(context + FILE)
    # One place more: a slot of another size than expected is given back through the ring.
    if room(file, load(file + HEAD_OFFSET)) <= count:
        return FULL
    lane = _lane_for(context, record_bytes)
    if lane < 0:
        return NO_LANE
    claimed = 0
    while claimed < count:
        grant = claim(file, lane)
        if grant == 0:
            break
        slot, slot_bytes = grant & GRANT_SLOT_MASK, (grant >> GRANT_PAGES_SHIFT) * PAGE_BYTES
        if slot_bytes < record_bytes:
            # The lane was given another size meanwhile.
            store_release(file + HEAD_OFFSET, _write_return(file, slot))
            break
        item = items + claimed * ITEM_BYTES
        store(item + ITEM_SLOT, slot)
        store(item + ITEM_SLOT_BYTES, slot_bytes)
        touch(context, load(context + ARENA) + slot * PAGE_BYTES, slot_bytes)
        claimed += 1
    # Full fence: the slots' old entries were seen withdrawn when the grants were taken; on arm64 what is stored into
    # the slots could otherwise become visible to a reader of an old record before that withdrawal does.
    fence_full()
    return claimed if claimed else NO_GRANT


@compiled("void(int64, int64, int64)", nogil=True)
def seal_slots(context: int, items: int, count: int) -> None:
    """Checksum payloads that were encoded into their slots, and zero what is behind them.

    Without the interpreter lock: the caller keeps mapping and items alive.
    """
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        payload = load(context + ARENA) + load(item + ITEM_SLOT) * PAGE_BYTES + RECORD_HEADER_BYTES
        length = load(item + ITEM_PAYLOAD_BYTES)
        store(item + ITEM_CHECKSUM, checksum_of(payload, length))
        fill_zero(payload + length, load(item + ITEM_SLOT_BYTES) - RECORD_HEADER_BYTES - length)
    # An encoder may have stored past the caches.
    fence_streams()


@compiled("void(int64, int64, int64)", nogil=True)
def fill_slots(context: int, items: int, count: int) -> None:
    """Copy payloads that were encoded elsewhere into their slots, as ``seal_slots``."""
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        payload = load(context + ARENA) + load(item + ITEM_SLOT) * PAGE_BYTES + RECORD_HEADER_BYTES
        length = load(item + ITEM_PAYLOAD_BYTES)
        streaming = 1 if length >= STREAM_FROM_BYTES else 0
        store(item + ITEM_CHECKSUM, copy_checksummed(payload, load(item + ITEM_SOURCE), length, streaming))
        fill_zero(payload + length, load(item + ITEM_SLOT_BYTES) - RECORD_HEADER_BYTES - length)


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def commit_slots(context: int, header: int, items: int, count: int, part: int, access: int) -> int:
    """Write the headers of sealed slots, then their commits into the ring, all of them or none.

    Args:
        context: the client's.
        header: address of 256 bytes, a record's header; key, parent, lengths and checksums are filled in.
        items: sealed, none without a slot.
        count: of items.
        part: as in ``header``.
        access: the engine request.

    Returns:
        Number of the first commit, whose followers have the next ones. ``FULL``; ``STALE``: the header is of another
        generation of the namespace than the one that this client is in. Slots are held on then.
    """
    digest = load(context + HEADER) + _DIGEST
    for at in range(0, 32, 8):
        if load(header + _DIGEST + at) != load(digest + at):
            return STALE
    file = load(context + FILE)
    head = load(file + HEAD_OFFSET)
    if room(file, head) < count:
        return FULL
    now = now_ns(context)
    words = stack_words(_HEADER_WORDS)
    copy(words, header, RECORD_HEADER_BYTES)
    for index in range(count):
        item = items + index * ITEM_BYTES
        record_bytes = RECORD_HEADER_BYTES + load(item + ITEM_PAYLOAD_BYTES)
        slot = load(item + ITEM_SLOT)
        store(words + _RECORD_BYTES, record_bytes)
        copy(words + _KEY, item + ITEM_KEY, 32)
        copy(words + _PARENT, item + ITEM_PARENT, 32)
        copy(words + _SECTION_BYTES, item + ITEM_SECTIONS, 32)
        store(words + _PAYLOAD_CHECKSUM, load(item + ITEM_CHECKSUM))
        store(words + _HEADER_CHECKSUM, checksum_of(words, _HEADER_CHECKSUM))
        copy(load(context + ARENA) + slot * PAGE_BYTES, words, RECORD_HEADER_BYTES)
        record = place(file, head + index)
        store(record + WORD_KIND, _COMMIT | part << 32 | load(context + NAMESPACE_ID) << 48)
        store(record + WORD_COUNTS, record_bytes)
        store(record + WORD_SLOT, slot)
        store(record + WORD_ACCESS, access)
        store(record + WORD_TIME, now)
    advance(context, head + count)
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        store(item + ITEM_SLOT, 0)
    return head


@compiled("int64(int64, int64, int64)")
def return_slots(context: int, items: int, count: int) -> int:
    """Give back the slots that items hold; how many could not be, because the ring is full."""
    file = load(context + FILE)
    left = 0
    head = load(file + HEAD_OFFSET)
    returned = head
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        slot = load(item + ITEM_SLOT)
        if slot == 0:
            continue
        if room(file, load(file + HEAD_OFFSET)) < 1:
            left += 1
            continue
        returned = _write_return(file, slot)
        store_release(file + HEAD_OFFSET, returned)
        store(item + ITEM_SLOT, 0)
    if returned != head:
        advance(context, returned)
    return left
