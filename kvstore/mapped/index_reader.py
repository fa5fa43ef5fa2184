"""Reading records out of the arena without asking anybody: compiled, for clients.

Every function takes the address of a client's context (``context``) first. Those that read Python objects or write the
ring hold the interpreter lock, which also keeps two threads of one client from each other; ``copy_batch`` alone runs
without it and does neither.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES, CodecId
from kvstore.mapped.atomics import (
    copy,
    fence_acquire,
    fence_full,
    load,
    load_acquire,
    shift_right,
    store,
    store_release,
)
from kvstore.mapped.bucket import find_entry, hash_key
from kvstore.mapped.checksum import checksum_of, copy_checksummed
from kvstore.mapped.client_file import HAZARD_OFFSET, STATE_OFFSET, ClientState
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.context import (
    ARENA,
    ARENA_BYTES,
    BUCKET_COUNT,
    BUCKETS,
    BUSY,
    CORRUPT,
    EPOCH,
    FILE,
    ITEM_BYTES,
    ITEM_CAPACITY,
    ITEM_CHAINED,
    ITEM_KEY,
    ITEM_RESULT,
    ITEM_SEQUENCE,
    ITEM_SLOT,
    ITEM_TARGET,
    MISS,
    NAMESPACE,
    NAMESPACE_ID,
    OTHER_CODEC,
    OVER,
    READS,
    SEED,
    STALE,
    TOO_SMALL,
    VERIFY_EVERY,
)
from kvstore.mapped.index_file import (
    CODEC_SHIFT,
    ENTRY_CHECKSUM,
    PART_SHIFT,
    WHO_MASK,
    IndexState,
    NamespaceWord,
)
from kvstore.mapped.streaming import AHEAD_FROM_BYTES, copy_ahead, copy_streaming, goes_past_cache
from kvstore.mapped.system import touch

_TRIES: Final = 8
_RAW: Final = int(CodecId.RAW)
_LIVE: Final = int(IndexState.LIVE)
_CURRENT: Final = int(NamespaceWord.CURRENT)
_SERVED: Final = int(ClientState.LIVE)
_PARENT_OFFSET: Final = 56
"""Of the parent's key in a record's header."""


@inlined
def usable(context: int) -> int:
    """0, or why nothing may be read: ``OVER`` or ``STALE``."""
    if load(load(context + EPOCH)) != _LIVE or load(load(context + FILE) + STATE_OFFSET) != _SERVED:
        return OVER
    # Acquire: a namespace is marked before its entries go, so whoever sees the mark reads nothing of it.
    return 0 if load_acquire(load(context + NAMESPACE)) == _CURRENT else STALE


@inlined
def look_up(context: int, key: int, part: int) -> tuple[int, int, int, int]:
    """``find_entry`` for the key at an address, in the client's namespace."""
    word0, word1, word2, word3 = load(key), load(key + 8), load(key + 16), load(key + 24)
    who = load(context + NAMESPACE_ID) | part << PART_SHIFT
    tag = hash_key(load(context + SEED), word0, word1, word2, word3, who)
    return find_entry(load(context + BUCKETS), load(context + BUCKET_COUNT), tag, word0, word1, word2, word3, who)


@inlined
def payload_of(context: int, place: int, identity: int) -> tuple[int, int]:
    """Address and length of an entry's payload; address 0 and a result where it cannot be served from here.

    The bounds are checked although the daemon wrote them: a wrong entry must not become a fault in an engine.
    """
    length = shift_right(place, 32)
    offset = (place & WHO_MASK) * PAGE_BYTES
    if length <= RECORD_HEADER_BYTES or offset < PAGE_BYTES or offset + length > load(context + ARENA_BYTES):
        return 0, CORRUPT
    if (identity >> CODEC_SHIFT) & 0xFFFF != _RAW:
        return 0, OTHER_CODEC
    return load(context + ARENA) + offset + RECORD_HEADER_BYTES, length - RECORD_HEADER_BYTES


@inlined
def is_due(context: int) -> int:
    """Whether this read's checksum is to be verified."""
    every = load(context + VERIFY_EVERY)
    if every == 0:
        return 0
    reads = load(context + READS) + 1
    store(context + READS, reads)
    return 1 if reads % every == 0 else 0


@inlined
def read_item(context: int, item: int, part: int, previous: int) -> None:
    """Copy one record's payload to the item's target; its length or why not goes to the item's result.

    Args:
        context: the client's.
        item: an item whose key, target and capacity are set.
        part: of the block.
        previous: address of the key of the hit before it in the batch, 0 for none.
    """
    for _ in range(_TRIES):
        refused = usable(context)
        if refused != 0:
            store(item + ITEM_RESULT, refused)
            return
        entry, sequence, where, identity = look_up(context, item + ITEM_KEY, part)
        if entry <= 0:
            store(item + ITEM_RESULT, MISS if entry == 0 else BUSY)
            return
        source, length = payload_of(context, where, identity)
        expected = load(entry + ENTRY_CHECKSUM)
        chained = 0
        if source == 0:
            result = length
        elif length > load(item + ITEM_CAPACITY):
            result = TOO_SMALL
        else:
            result = length
            touch(context, source, length)
            target = load(item + ITEM_TARGET)
            streaming = goes_past_cache(context, target, length)
            if is_due(context) != 0:
                if copy_checksummed(target, source, length, streaming) != expected:
                    result = CORRUPT
            elif streaming != 0:
                copy_streaming(target, source, length)
            elif length >= AHEAD_FROM_BYTES:
                copy_ahead(target, source, length)
            else:
                copy(target, source, length)
            if previous != 0:
                parent = source - RECORD_HEADER_BYTES + _PARENT_OFFSET
                chained = 1
                for at in range(0, 32, 8):
                    if load(parent + at) != load(previous + at):
                        chained = 0
        # Acquire fence: the bytes above were read before the sequence below. Whoever writes a slot again got it after
        # its entry's sequence was changed and a full fence; had a byte of that been copied, the change is seen here.
        fence_acquire()
        if load(entry) == sequence:
            if load(load(context + NAMESPACE)) != _CURRENT:
                result = STALE
            store(item + ITEM_SLOT, where & WHO_MASK)
            store(item + ITEM_SEQUENCE, sequence)
            store(item + ITEM_CHAINED, chained)
            store(item + ITEM_RESULT, result)
            return
    store(item + ITEM_RESULT, BUSY)


@compiled("void(int64, int64, int64, int64)", nogil=True)
def copy_batch(context: int, items: int, count: int, part: int) -> None:
    """``read_item`` for a batch, without the interpreter lock: the caller keeps mapping, items and targets alive."""
    previous = 0
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        read_item(context, item, part, previous)
        if load(item + ITEM_RESULT) >= 0:
            previous = item + ITEM_KEY


@inlined
def pin_entry(context: int, key: int, part: int, hazard: int, item: int) -> int:
    """Hold a record's slot with a hazard and tell where its payload is; 0, or why not.

    Args:
        context: the client's.
        key: address of 32 bytes.
        part: of the block.
        hazard: number of a free hazard word of this client's.
        item: its slot, sequence, target (address of the payload) and capacity (its length) are set.
    """
    word = load(context + FILE) + HAZARD_OFFSET + 8 * hazard
    for _ in range(_TRIES):
        refused = usable(context)
        if refused != 0:
            return refused
        entry, sequence, where, identity = look_up(context, key, part)
        if entry <= 0:
            return MISS if entry == 0 else BUSY
        source, length = payload_of(context, where, identity)
        if source == 0:
            if load(entry) != sequence:
                continue
            store(item + ITEM_SLOT, where & WHO_MASK)
            store(item + ITEM_SEQUENCE, sequence)
            return length
        expected = load(entry + ENTRY_CHECKSUM)
        store(word, (where & WHO_MASK) + 1)
        # Full fence, the reader's half of the hazard protocol: the hazard must be in memory before the sequence is read
        # again. The daemon changes the sequence, fences, and reads hazards: either it sees ours and does not reuse the
        # slot, or we see its change and do not read. An acquire or release fence does not order a store before a load.
        fence_full()
        if load(entry) == sequence:
            result = 0
            if load(load(context + NAMESPACE)) != _CURRENT:
                result = STALE
            elif is_due(context) != 0 and checksum_of(source, length) != expected:
                result = CORRUPT
            store(item + ITEM_SLOT, where & WHO_MASK)
            store(item + ITEM_SEQUENCE, sequence)
            store(item + ITEM_TARGET, source)
            store(item + ITEM_CAPACITY, length)
            if result != 0:
                store_release(word, 0)
            return result
        store_release(word, 0)
    return BUSY


@compiled("int64(int64, int64)")
def unpin(context: int, hazard: int) -> int:
    """Let go of a pinned slot. Release: everything that was read of it was read before."""
    store_release(load(context + FILE) + HAZARD_OFFSET + 8 * hazard, 0)
    return 0
