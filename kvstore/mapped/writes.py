"""Writing a record into a granted slot and committing it through the ring: compiled, for clients.

``put_one`` does all of it under the interpreter lock. Large payloads take three calls, of which the middle one, the
copy, runs without it: ``begin_put``, ``fill_slot``, ``end_put``.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import MAX_RECORD_BYTES, PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.atomics import copy, fence_full, fill_zero, load, stack_words, store, store_release
from kvstore.mapped.checksum import checksum_of, copy_checksummed
from kvstore.mapped.client_file import (
    HEAD_OFFSET,
    LANE_COUNT,
    WORD_ACCESS,
    WORD_COUNTS,
    WORD_KIND,
    WORD_SLOT,
    WORD_TIME,
    RingKind,
)
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.context import (
    ARENA,
    BAD_ARGUMENT,
    FILE,
    FULL,
    HEADER,
    ITEM_BUFFER,
    ITEM_CAPACITY,
    ITEM_CHAINED,
    ITEM_KEY,
    ITEM_RESULT,
    ITEM_SEQUENCE,
    ITEM_SLOT,
    ITEM_TARGET,
    ITEM_WORDS,
    LANE_PAGES,
    LARGE,
    LOOK,
    NAMESPACE_ID,
    NO_GRANT,
    NO_LANE,
    PAIR,
    STALE,
)
from kvstore.mapped.grants import GRANT_PAGES_SHIFT, GRANT_SLOT_MASK, claim
from kvstore.mapped.index_reader import usable
from kvstore.mapped.python_objects import (
    buffer_address,
    buffer_is_open,
    buffer_length,
    close_buffer,
    key_address,
    open_buffer,
)
from kvstore.mapped.reads import LARGE_BYTES
from kvstore.mapped.ring import advance, place, room
from kvstore.mapped.streaming import STREAM_FROM_BYTES
from kvstore.mapped.system import look_is_due, now_ns, touch

ITEM_SLOT_BYTES: Final = ITEM_CHAINED
"""Puts: size of the granted slot, where gets keep whether a block is chained."""
ITEM_NAMESPACE: Final = ITEM_RESULT
"""Puts: id of the namespace that the put began in."""
ITEM_CHECKSUM: Final = ITEM_SEQUENCE
"""Puts: the payload's checksum, where gets keep a sequence."""

_COMMIT: Final = int(RingKind.COMMIT)
_RETURN: Final = int(RingKind.RETURN)

# Fields of a record's header that differ from put to put, by offset (``docs/record.md``).
_VERSION_PART_CODEC: Final = 8
_RECORD_BYTES: Final = 16
_KEY: Final = 24
_PARENT: Final = 56
_SHAPE: Final = 160
_SECTION_BYTES: Final = 192
_PAYLOAD_CHECKSUM: Final = 224
_HEADER_CHECKSUM: Final = RECORD_HEADER_BYTES - 8
_PART_MASK: Final = 0xFFFF << 32


@inlined
def _lane_for(context: int, record_bytes: int) -> int:
    """The lane whose slots are for records of this size, -1 for none."""
    pages = (record_bytes + PAGE_BYTES - 1) // PAGE_BYTES
    for lane in range(LANE_COUNT):
        if load(context + LANE_PAGES + 8 * lane) == pages:
            return lane
    return -1


@inlined
def _write_return(file: int, slot: int) -> int:
    """Write, where the ring has room, that a slot comes back unwritten; the head that publishes it."""
    head = load(file + HEAD_OFFSET)
    record = place(file, head)
    store(record + WORD_KIND, _RETURN)
    store(record + WORD_SLOT, slot)
    return head + 1


@inlined
def _begin(context: int, item: int, key_id: int, data_id: int, limit: int) -> int:
    key = key_address(key_id, context + PAIR)
    if key == 0 or (load(key) | load(key + 8) | load(key + 16) | load(key + 24)) == 0:
        return BAD_ARGUMENT
    if open_buffer(data_id, item + ITEM_BUFFER, 0) == 0:
        return BAD_ARGUMENT
    # From here on nothing runs Python before the buffer is given back: what is found now stays so.
    file = load(context + FILE)
    length = buffer_length(item + ITEM_BUFFER)
    lane = _lane_for(context, RECORD_HEADER_BYTES + length)
    result = usable(context)
    if length == 0:
        result = BAD_ARGUMENT
    elif result != 0:
        pass
    elif room(file, load(file + HEAD_OFFSET)) < 1:
        result = FULL
    elif length >= limit:
        result = LARGE
    elif lane < 0:
        result = NO_LANE
    else:
        grant = claim(file, lane)
        slot, slot_bytes = grant & GRANT_SLOT_MASK, (grant >> GRANT_PAGES_SHIFT) * PAGE_BYTES
        if grant == 0:
            result = NO_GRANT
        elif slot_bytes < RECORD_HEADER_BYTES + length:
            # The lane was given another size meanwhile. No bell: whoever has no lane sends a request next.
            store_release(file + HEAD_OFFSET, _write_return(file, slot))
            result = NO_LANE
        store(item + ITEM_SLOT, slot)
        store(item + ITEM_SLOT_BYTES, slot_bytes)
    if result != 0:
        close_buffer(item + ITEM_BUFFER)
        return result
    copy(item + ITEM_KEY, key, 32)
    store(item + ITEM_TARGET, buffer_address(item + ITEM_BUFFER))
    store(item + ITEM_CAPACITY, length)
    store(item + ITEM_NAMESPACE, load(context + NAMESPACE_ID))
    return 0


@inlined
def _fill(context: int, item: int) -> None:
    """Copy the payload into the slot behind the place of its header, and zero what is behind it."""
    length = load(item + ITEM_CAPACITY)
    target = load(context + ARENA) + load(item + ITEM_SLOT) * PAGE_BYTES + RECORD_HEADER_BYTES
    touch(context, target - RECORD_HEADER_BYTES, load(item + ITEM_SLOT_BYTES))
    # Full fence: the slot's old entry was seen withdrawn when the grant was taken; on arm64 a plain or non-temporal
    # store could otherwise become visible to a reader of the old record before that withdrawal does.
    fence_full()
    # A slot that comes free was not used for long: it is not in the cache, and need not be.
    streaming = 1 if length >= STREAM_FROM_BYTES else 0
    store(item + ITEM_CHECKSUM, copy_checksummed(target, load(item + ITEM_TARGET), length, streaming))
    fill_zero(target + length, load(item + ITEM_SLOT_BYTES) - RECORD_HEADER_BYTES - length)


@inlined
def _end(context: int, item: int, parent_id: int, part: int, access: int, now: int) -> int:
    """Write the header, then the ring's record: number of the commit."""
    file = load(context + FILE)
    length = load(item + ITEM_CAPACITY)
    slot = load(item + ITEM_SLOT)
    header = load(context + HEADER)
    store(header + _VERSION_PART_CODEC, (load(header + _VERSION_PART_CODEC) & ~_PART_MASK) | part << 32)
    store(header + _RECORD_BYTES, RECORD_HEADER_BYTES + length)
    copy(header + _KEY, item + ITEM_KEY, 32)
    copy(header + _PARENT, key_address(parent_id, context + PAIR), 32)
    store(header + _SHAPE, length)
    store(header + _SECTION_BYTES, length)
    store(header + _PAYLOAD_CHECKSUM, load(item + ITEM_CHECKSUM))
    store(header + _HEADER_CHECKSUM, checksum_of(header, _HEADER_CHECKSUM))
    copy(load(context + ARENA) + slot * PAGE_BYTES, header, RECORD_HEADER_BYTES)
    head = load(file + HEAD_OFFSET)
    record = place(file, head)
    store(record + WORD_KIND, _COMMIT | part << 32 | load(context + NAMESPACE_ID) << 48)
    store(record + WORD_COUNTS, RECORD_HEADER_BYTES + length)
    store(record + WORD_SLOT, slot)
    store(record + WORD_ACCESS, access)
    store(record + WORD_TIME, now)
    advance(context, head + 1)
    # Last: giving a buffer back may run Python, and with it other threads.
    close_buffer(item + ITEM_BUFFER)
    return head


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def put_one(context: int, key_id: int, parent_id: int, data_id: int, part: int, access: int) -> int:
    """Store a payload under a key; its commit's number.

    Args:
        context: the client's.
        key_id: id of the key.
        parent_id: id of 32 ``bytes``, which the caller has checked.
        data_id: id of an object with a buffer.
        part: of the block.
        access: the engine request.

    Returns:
        Also ``LARGE`` (use the three calls), ``LOOK``, ``NO_LANE``, ``NO_GRANT``, ``FULL``, ``OVER``, ``STALE``,
        ``BAD_ARGUMENT``: nothing was done.
    """
    now = now_ns(context)
    if look_is_due(context, now) != 0:
        return LOOK
    item = stack_words(ITEM_WORDS)
    result = _begin(context, item, key_id, data_id, LARGE_BYTES)
    if result != 0:
        return result
    _fill(context, item)
    return _end(context, item, parent_id, part, access, now)


@compiled("int64(int64, int64, int64, int64)")
def begin_put(context: int, item: int, key_id: int, data_id: int) -> int:
    """Hold the data's buffer and take a slot; 0, and then ``fill_slot`` and ``end_put`` must follow."""
    return _begin(context, item, key_id, data_id, MAX_RECORD_BYTES)


@compiled("void(int64, int64)", nogil=True)
def fill_slot(context: int, item: int) -> None:
    """Copy the payload, without the interpreter lock: the caller keeps mapping and item alive."""
    _fill(context, item)


@compiled("int64(int64, int64, int64, int64, int64)")
def end_put(context: int, item: int, parent_id: int, part: int, access: int) -> int:
    """As ``put_one``'s result. ``FULL`` or ``STALE``: nothing was committed, and the item is for ``cancel_put``.

    Another thread may have filled the ring since ``begin_put``, or joined another generation of the namespace.
    """
    file = load(context + FILE)
    result = 0
    if load(item + ITEM_NAMESPACE) != load(context + NAMESPACE_ID):
        result = STALE
    elif room(file, load(file + HEAD_OFFSET)) < 1:
        result = FULL
    if result != 0:
        return result
    return _end(context, item, parent_id, part, access, now_ns(context))


@compiled("int64(int64)")
def cancel_put(item: int) -> int:
    """Let go of what an item holds that was not committed, and was zero at first; a slot to be given back, or 0."""
    if not buffer_is_open(item + ITEM_BUFFER):
        return 0
    close_buffer(item + ITEM_BUFFER)
    return load(item + ITEM_SLOT)


@compiled("int64(int64, int64)")
def give_back(context: int, slot: int) -> int:
    """Return a granted slot unwritten; 0, or ``FULL``."""
    file = load(context + FILE)
    if room(file, load(file + HEAD_OFFSET)) < 1:
        return FULL
    advance(context, _write_return(file, slot))
    return 0
