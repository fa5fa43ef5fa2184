"""The reads that a client calls: Python objects in, one access report out. All hold the interpreter lock.

Results of 0 and more are lengths, hits or addresses; what is below 0 stands in ``context``.
"""

from __future__ import annotations

from typing import Final

from kvstore.format.constants import FIDELITY_EXACT
from kvstore.mapped.atomics import copy, load, prefetch, shift_right, stack_words, store
from kvstore.mapped.bucket import first_bucket, hash_key, second_bucket
from kvstore.mapped.client_file import MAX_MISSING
from kvstore.mapped.compiled import compiled, inlined
from kvstore.mapped.context import (
    BAD_ARGUMENT,
    BUCKET_COUNT,
    BUCKETS,
    BUSY,
    CORRUPT,
    FILE,
    ITEM_BUFFER,
    ITEM_BYTES,
    ITEM_CAPACITY,
    ITEM_CHAINED,
    ITEM_KEY,
    ITEM_RESULT,
    ITEM_SEQUENCE,
    ITEM_SLOT,
    ITEM_TARGET,
    ITEM_WORDS,
    KEYS,
    LARGE,
    LOOK,
    MISS,
    NAMESPACE_ID,
    PAIR,
    PARTS,
    SEED,
    STALE,
    TOO_SMALL,
    WINDOW,
    WINDOW_WORDS,
)
from kvstore.mapped.index_file import BUCKET_BYTES, BUCKET_ENTRIES, ENTRY_BYTES, FIDELITY_SHIFT, WHO_MASK
from kvstore.mapped.index_reader import look_up, payload_of, pin_entry, read_item, usable
from kvstore.mapped.python_objects import (
    buffer_address,
    buffer_is_open,
    buffer_length,
    close_buffer,
    key_address,
    list_item,
    open_buffer,
)
from kvstore.mapped.reports import (
    _GET,
    _MATCH,
    begin_report,
    end_report,
    fill_report,
    name_missing,
    report_suspect,
)
from kvstore.mapped.system import look_is_due, now_ns

LARGE_BYTES: Final = 1 << 20
"""From here on the interpreter lock is released while copying: it would be kept for 100 us and more."""

_WINDOW_BYTES: Final = 8 * WINDOW_WORDS


@inlined
def _is_zero(key: int) -> bool:
    return (load(key) | load(key + 8) | load(key + 16) | load(key + 24)) == 0


@inlined
def _is_miss(result: int) -> bool:
    """Whether a read is over without data; what is no hit and no miss either is asked for over ZeroMQ."""
    return result in (MISS, STALE, CORRUPT)


@inlined
def _report_one(context: int, part: int, result: int, item: int, key: int, access: int, now: int) -> None:
    """Report a read of one key. A result that is neither hit nor miss is asked for again, and reported then."""
    if result == CORRUPT:
        report_suspect(context, load(item + ITEM_SLOT), load(item + ITEM_SEQUENCE), part)
    if result >= 0 or _is_miss(result):
        file = load(context + FILE)
        named = 0 if result >= 0 else 1
        record = begin_report(file, _GET, part, load(context + NAMESPACE_ID), named)
        if record != 0:
            if named != 0:
                name_missing(file, 0, key)
                fill_report(record, 1, 0, 0, 0, access, now, 0, 0)
            else:
                slot, sequence = load(item + ITEM_SLOT), load(item + ITEM_SEQUENCE)
                fill_report(record, 1, 1, slot, sequence, access, now, result, 0)
            end_report(context, named)


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def get_one(context: int, key_id: int, out_id: int, part: int, access: int, unsure: int) -> int:
    """Copy one record's payload into a Python buffer; its length.

    Returns ``LARGE`` where it should be done by a batch, ``TOO_SMALL`` without having copied anything. ``unsure`` != 0:
    what is not here may be on its way; then ``BUSY`` instead of a miss, and no report of it.
    """
    now = now_ns(context)
    if look_is_due(context, now) != 0:
        return LOOK
    key = key_address(key_id, context + PAIR)
    if key == 0 or _is_zero(key):
        return BAD_ARGUMENT
    item = stack_words(ITEM_WORDS)
    if open_buffer(out_id, item + ITEM_BUFFER, 1) == 0:
        return BAD_ARGUMENT
    capacity = buffer_length(item + ITEM_BUFFER)
    result = LARGE
    if capacity < LARGE_BYTES:
        copy(item + ITEM_KEY, key, 32)
        store(item + ITEM_TARGET, buffer_address(item + ITEM_BUFFER))
        store(item + ITEM_CAPACITY, capacity)
        read_item(context, item, part, 0)
        result = load(item + ITEM_RESULT) if capacity else BAD_ARGUMENT
    if result == MISS and unsure != 0:
        result = BUSY
    if result != LARGE:
        _report_one(context, part, result, item, key, access, now)
    # Last: giving a buffer back may run Python, and with it other threads.
    close_buffer(item + ITEM_BUFFER)
    return result


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def pin_one(context: int, key_id: int, hazard: int, part: int, access: int, unsure: int) -> int:
    """Hold a record in place; slot << 32 | length of its payload, which begins 256 bytes into the slot.

    ``unsure`` as for ``get_one``.
    """
    now = now_ns(context)
    if look_is_due(context, now) != 0:
        return LOOK
    key = key_address(key_id, context + PAIR)
    if key == 0 or _is_zero(key):
        return BAD_ARGUMENT
    item = stack_words(ITEM_WORDS)
    result = pin_entry(context, key, part, hazard, item)
    if result == MISS and unsure != 0:
        result = BUSY
    length = load(item + ITEM_CAPACITY)
    _report_one(context, part, length if result == 0 else result, item, key, access, now)
    if result != 0:
        return result
    return load(item + ITEM_SLOT) << 32 | length


@inlined
def _key_at(context: int, keys_id: int, index: int) -> int:
    """Address of the list's key, 0 where it is none."""
    key = key_address(list_item(keys_id, index), context + PAIR)
    return 0 if key == 0 or _is_zero(key) else key


@inlined
def _prepare_window(context: int, keys_id: int, begin: int, count: int) -> int:
    """Hash the next keys and begin to fetch their buckets, then their entries; how many are keys."""
    seed, bucket_count, buckets = load(context + SEED), load(context + BUCKET_COUNT), load(context + BUCKETS)
    who = load(context + NAMESPACE_ID)
    window = load(context + KEYS)
    good = 0
    for index in range(count):
        key = _key_at(context, keys_id, begin + index)
        if key == 0:
            break
        good += 1
        at = window + index * _WINDOW_BYTES
        copy(at, key, 32)
        tag = hash_key(seed, load(key), load(key + 8), load(key + 16), load(key + 24), who)
        store(at + 32, tag)
        first = first_bucket(tag, bucket_count)
        prefetch(buckets + first * BUCKET_BYTES)
        prefetch(buckets + second_bucket(tag, bucket_count, first) * BUCKET_BYTES)
    for index in range(good):
        tag = load(window + index * _WINDOW_BYTES + 32)
        number = first_bucket(tag, bucket_count)
        for choice in range(2):
            if choice == 1:
                number = second_bucket(tag, bucket_count, number)
            bucket = buckets + number * BUCKET_BYTES
            for entry in range(BUCKET_ENTRIES):
                if load(bucket + 8 * entry) == tag:
                    prefetch(bucket + ENTRY_BYTES * (entry + 1))
    return good


@compiled("int64(int64, int64, int64, int64, int64)")
def match(context: int, keys_id: int, count: int, access: int, unsure: int) -> int:
    """How many leading keys of a list have all their parts, and how far their records are from exact.

    The report goes out for what a chain of keys means: its deepest hit was used, and with it all above.

    Returns:
        The hits, and 255 less the lowest effective fidelity of their records times 2**32; ``BAD_ARGUMENT`` where one of
        the list is no key. ``BUSY`` where not all are there and ``unsure`` is not 0, and then nothing is reported.
    """
    now = now_ns(context)
    if look_is_due(context, now) != 0:
        return LOOK
    parts = load(context + PARTS)
    refused = usable(context)
    if refused != 0 and refused != STALE:
        return refused
    hits = 0
    lowest = FIDELITY_EXACT
    next_lowest = FIDELITY_EXACT
    slot = 0
    sequence = 0
    next_slot = 0
    next_sequence = 0
    going = refused == 0
    begin = 0
    while begin < count:
        size = min(count - begin, WINDOW)
        if not going:
            # The answer is known; what is no key is still an error.
            for index in range(begin, begin + size):
                if _key_at(context, keys_id, index) == 0:
                    return BAD_ARGUMENT
            begin += size
            continue
        if _prepare_window(context, keys_id, begin, size) < size:
            return BAD_ARGUMENT
        window = load(context + KEYS)
        for index in range(size):
            for part in range(parts):
                entry, found, where, identity = look_up(context, window + index * _WINDOW_BYTES, part)
                if entry < 0:
                    return BUSY
                if entry == 0:
                    going = False
                    break
                next_lowest = min(next_lowest, shift_right(identity, FIDELITY_SHIFT))
                if part == 0:
                    next_slot, next_sequence = where & WHO_MASK, found
            if not going:
                break
            slot, sequence, lowest = next_slot, next_sequence, next_lowest
            hits += 1
        begin += size
    again = usable(context)
    if again != 0:
        if again != STALE:
            return again
        hits = 0
        lowest = FIDELITY_EXACT
    if hits < count and unsure != 0:
        return BUSY
    file = load(context + FILE)
    named = min(count - hits, MAX_MISSING)
    record = begin_report(file, _MATCH, 0, load(context + NAMESPACE_ID), named)
    if record != 0:
        for index in range(named):
            name_missing(file, index, _key_at(context, keys_id, hits + index))
        fill_report(record, count, hits, slot, sequence, access, now, 0, 0)
        end_report(context, named)
    return hits | (FIDELITY_EXACT - lowest) << 32


# ---------------------------------------------------------------- batches


@inlined
def _close_items(items: int, count: int) -> None:
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        close_buffer(item + ITEM_BUFFER)


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def open_batch(context: int, keys_id: int, outs_id: int, count: int, items: int, part: int) -> int:
    """Fill the items of a batch of gets from two lists and hold their buffers; 0, and then ``close_batch`` must follow.

    Returns:
        ``LOOK``; ``BAD_ARGUMENT``: something is no key or no buffer; ``TOO_SMALL``: a buffer is smaller than its block.
        Nothing is held then, and nothing was copied.
    """
    if look_is_due(context, now_ns(context)) != 0:
        return LOOK
    opened = 0
    result = 0
    for index in range(count):
        item = items + index * ITEM_BYTES
        key = _key_at(context, keys_id, index)
        if key == 0 or open_buffer(list_item(outs_id, index), item + ITEM_BUFFER, 1) == 0:
            result = BAD_ARGUMENT
            break
        opened += 1
        copy(item + ITEM_KEY, key, 32)
        store(item + ITEM_TARGET, buffer_address(item + ITEM_BUFFER))
        capacity = buffer_length(item + ITEM_BUFFER)
        store(item + ITEM_CAPACITY, capacity)
        if capacity == 0:
            result = BAD_ARGUMENT
            break
    if result == 0 and usable(context) == 0:
        for index in range(count):
            item = items + index * ITEM_BYTES
            entry, _, where, identity = look_up(context, item + ITEM_KEY, part)
            if entry > 0:
                source, length = payload_of(context, where, identity)
                if source != 0 and length > load(item + ITEM_CAPACITY):
                    result = TOO_SMALL
                    break
    if result != 0:
        _close_items(items, opened)
    return result


@compiled("int64(int64, int64, int64, int64, int64)")
def close_batch(context: int, items: int, count: int, part: int, access: int) -> int:
    """Let go of a batch's buffers and report it, one report for each run of a block and its child; hits."""
    now = now_ns(context)
    file = load(context + FILE)
    namespace = load(context + NAMESPACE_ID)
    missing = 0
    total = 0
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        result = load(item + ITEM_RESULT)
        if result >= 0:
            total += 1
        elif _is_miss(result):
            missing += 1
        if result == CORRUPT:
            report_suspect(context, load(item + ITEM_SLOT), load(item + ITEM_SEQUENCE), part)
    asked = total + missing
    named = min(missing, MAX_MISSING)
    later = 0
    run = 0
    run_bytes = 0
    deepest = 0
    at = items
    end = items + count * ITEM_BYTES
    while at <= end:
        hit = at < end and load(at + ITEM_RESULT) >= 0
        # A run ends where the next hit is no child of the last one, and with the batch.
        if (hit and run > 0 and load(at + ITEM_CHAINED) == 0) or (
            at == end and (run > 0 or (later == 0 and asked > 0))
        ):
            names = 0 if later != 0 else named
            record = begin_report(file, _GET, part, namespace, names)
            if record != 0:
                if names != 0:
                    index = 0
                    for item in range(items, end, ITEM_BYTES):
                        result = load(item + ITEM_RESULT)
                        if index < names and _is_miss(result):
                            name_missing(file, index, item + ITEM_KEY)
                            index += 1
                slot = load(deepest + ITEM_SLOT) if run > 0 else 0
                sequence = load(deepest + ITEM_SEQUENCE) if run > 0 else 0
                fill_report(record, 0 if later != 0 else asked, run, slot, sequence, access, now, run_bytes, later)
                end_report(context, names)
            later = 1
            run = 0
            run_bytes = 0
        if hit:
            run += 1
            run_bytes += load(at + ITEM_RESULT)
            deepest = at
        at += ITEM_BYTES
    # Last: giving a buffer back may run Python, and with it other threads.
    _close_items(items, count)
    return total


@compiled("void(int64, int64)")
def cancel_batch(items: int, count: int) -> None:
    """After an exception: let go of the buffers that a batch holds, whose memory was zero before its first use."""
    for item in range(items, items + count * ITEM_BYTES, ITEM_BYTES):
        if buffer_is_open(item + ITEM_BUFFER):
            close_buffer(item + ITEM_BUFFER)
