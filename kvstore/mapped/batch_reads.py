"""Records that others decode in place: held in their slots, their headers copied out and checked, let go of together.

A batch is an array of read items (``kvstore.mapped.context``), one hazard each, in the order of a chain: holding ends
at the first record that is not there. After decoding, ``verify_batch`` says what counts, and
``kvstore.mapped.reads.close_batch`` reports it. Only ``verify_batch`` runs without the interpreter lock.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.atomics import copy, fence_acquire, fence_full, load, shift_right, store, store_release
from kvstore.mapped.checksum import checksum_of
from kvstore.mapped.client_file import HAZARD_OFFSET
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.context import (
    ARENA,
    ARENA_BYTES,
    BUSY,
    CORRUPT,
    FILE,
    HEADER,
    ITEM_BYTES,
    ITEM_CAPACITY,
    ITEM_CHAINED,
    ITEM_KEY,
    ITEM_RESULT,
    ITEM_SEQUENCE,
    ITEM_SLOT,
    ITEM_TARGET,
    LOOK,
    MISS,
    NAMESPACE,
    OVER,
    STALE,
)
from kvstore.mapped.index_file import ENTRY_CHECKSUM, FIDELITY_SHIFT, WHO_MASK, NamespaceWord
from kvstore.mapped.index_reader import is_due, look_up, usable
from kvstore.mapped.system import look_is_due, now_ns, touch
from kvstore.mapped.writes import _HEADER_CHECKSUM, _KEY, _PARENT, _PAYLOAD_CHECKSUM, _RECORD_BYTES

_TRIES: Final = 8
_CURRENT: Final = int(NamespaceWord.CURRENT)
_PART: Final = 8
"""Word of version, header bytes, part and codec in a record's header."""
_PART_SHIFT: Final = 32
_PART_MASK: Final = 0xFFFF
_DIGEST: Final = 88


@inlined
def _same(left: int, right: int, length: int) -> bool:
    different = 0
    for at in range(0, length, 8):
        different |= load(left + at) ^ load(right + at)
    return different == 0


@inlined
def _place_of(context: int, place: int) -> tuple[int, int]:
    """Address and length of an entry's record; address 0 where the daemon wrote an impossible place."""
    length = shift_right(place, 32)
    offset = (place & WHO_MASK) * PAGE_BYTES
    if length <= RECORD_HEADER_BYTES or offset < PAGE_BYTES or offset + length > load(context + ARENA_BYTES):
        return 0, 0
    return load(context + ARENA) + offset, length


@inlined
def _check_header(context: int, header: int, key: int, part: int, length: int, checksum: int) -> bool:
    """Whether a copied header is whole, and is that of the record that the index names."""
    return (
        load(header + _HEADER_CHECKSUM) == checksum_of(header, _HEADER_CHECKSUM)
        and _same(header + _KEY, key, 32)
        and _same(header + _DIGEST, load(context + HEADER) + _DIGEST, 32)
        and load(header + _RECORD_BYTES) == length
        and load(header + _PAYLOAD_CHECKSUM) == checksum
        and (load(header + _PART) >> _PART_SHIFT) & _PART_MASK == part
    )


@inlined
def _hold(context: int, item: int, part: int, hazard: int, header: int, limit_bytes: int) -> int:
    """Hold one record and copy its header out; length of its payload, or why not, and then nothing is held."""
    word = load(context + FILE) + HAZARD_OFFSET + 8 * hazard
    for _ in range(_TRIES):
        refused = usable(context)
        if refused != 0:
            return refused
        entry, sequence, where, _ = look_up(context, item + ITEM_KEY, part)
        if entry <= 0:
            return MISS if entry == 0 else BUSY
        record, length = _place_of(context, where)
        expected = load(entry + ENTRY_CHECKSUM)
        store(item + ITEM_SLOT, where & WHO_MASK)
        store(item + ITEM_SEQUENCE, sequence)
        if record == 0:
            if load(entry) != sequence:
                continue
            return CORRUPT
        if length - RECORD_HEADER_BYTES > limit_bytes:
            return BUSY
        store(word, (where & WHO_MASK) + 1)
        # Full fence, as in ``index_reader.pin_entry``: the hazard must be in memory before the sequence is read again.
        fence_full()
        if load(entry) == sequence:
            result = length - RECORD_HEADER_BYTES
            touch(context, record, length)
            copy(header, record, RECORD_HEADER_BYTES)
            if load(load(context + NAMESPACE)) != _CURRENT:
                result = STALE
            elif not _check_header(context, header, item + ITEM_KEY, part, length, expected):
                result = CORRUPT
            if result < 0:
                store_release(word, 0)
            store(item + ITEM_TARGET, record + RECORD_HEADER_BYTES)
            store(item + ITEM_CAPACITY, length - RECORD_HEADER_BYTES)
            return result
        store_release(word, 0)
    return BUSY


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def hold_batch(
    context: int, items: int, count: int, part: int, hazards: int, headers: int, limit_bytes: int, unsure: int
) -> int:
    """Hold the records of leading keys, up to the first that is not there; how many are held, or ``LOOK``.

    Args:
        context: the client's.
        items: their keys are set. Slot, sequence, target (address of the payload), capacity and result (its length, or
            why it is not held; ``BUSY`` for all behind the first that is not) are set here.
        count: of items, hazards and headers.
        part: of the blocks.
        hazards: address of as many words, each the number of a free hazard word.
        headers: address of 256 bytes each, into which the headers are copied.
        limit_bytes: payload bytes that may be held.
        unsure: not 0: what is not here may be on its way; then ``BUSY`` instead of a miss.
    """
    if look_is_due(context, now_ns(context)) != 0:
        return LOOK
    held = 0
    going = True
    for index in range(count):
        item = items + index * ITEM_BYTES
        store(item + ITEM_CHAINED, 0)
        result = BUSY
        if going:
            header = headers + index * RECORD_HEADER_BYTES
            result = _hold(context, item, part, load(hazards + 8 * index), header, limit_bytes)
            if result >= 0:
                held += 1
                limit_bytes -= result
                if index > 0 and _same(header + _PARENT, item - ITEM_BYTES + ITEM_KEY, 32):
                    store(item + ITEM_CHAINED, 1)
            else:
                going = False
                if result == MISS and unsure != 0:
                    result = BUSY
        store(item + ITEM_RESULT, result)
    return held


@compiled("int64(int64, int64, int64, int64)", nogil=True)
def verify_batch(context: int, items: int, count: int, headers: int) -> int:
    """What was decoded counts only now: how many leading records are still what their headers said.

    A record's header must be unchanged, and its payload's checksum right where it is its turn to be verified, or where
    the session ended meanwhile: the daemon may not have heeded the hazards since. The result of one that is not, and of
    all behind it, is set. Without the interpreter lock: the caller keeps mapping, items and headers alive.
    """
    # Acquire fence: what was decoded was read before what is looked at here.
    fence_acquire()
    over = usable(context) == OVER
    good = 0
    for index in range(count):
        item = items + index * ITEM_BYTES
        header = headers + index * RECORD_HEADER_BYTES
        if good < index:
            store(item + ITEM_RESULT, BUSY)
            continue
        payload, length = load(item + ITEM_TARGET), load(item + ITEM_CAPACITY)
        due = is_due(context) != 0
        if _same(header, payload - RECORD_HEADER_BYTES, RECORD_HEADER_BYTES) and (
            not (due or over) or checksum_of(payload, length) == load(header + _PAYLOAD_CHECKSUM)
        ):
            good += 1
        else:
            store(item + ITEM_RESULT, CORRUPT)
    return good


@compiled("void(int64, int64, int64)")
def release_batch(context: int, hazards: int, count: int) -> None:
    """Let go of held slots. Release: everything that was read of them was read before."""
    for at in range(hazards, hazards + 8 * count, 8):
        store_release(load(context + FILE) + HAZARD_OFFSET + 8 * load(at), 0)


@compiled("void(int64, int64, int64, int64, int64)")
def find_batch(context: int, keys: int, count: int, part: int, out: int) -> None:
    """What the index says of keys: the effective fidelity of each record, -1 where there is none or it cannot be seen.

    ``keys`` is the address of 32 bytes each, ``out`` of a word each. Nothing is held or reported.
    """
    for index in range(count):
        found = -1
        if usable(context) == 0:
            entry, _, _, identity = look_up(context, keys + 32 * index, part)
            if entry > 0:
                found = (identity >> FIDELITY_SHIFT) & 0xFF
        store(out + 8 * index, found)
