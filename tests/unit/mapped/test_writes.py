"""Compiled puts, the ring and grants: what a client writes is what the daemon takes."""

from __future__ import annotations

import os
import random
import struct
import sys

import numpy as np
import pytest
from mapped_memory import DIGEST, MappedMemory, key_of

from kvstore.format.record import decode_record, encode_header, raw_header
from kvstore.mapped import context as fields
from kvstore.mapped.client_file import (
    CONSUMED_OFFSET,
    GRANT_OFFSET,
    HEAD_OFFSET,
    LANE_BYTES,
    LANE_GRANTS,
    LANE_OFFSET,
    LANE_TAIL,
    RING_OFFSET,
    RING_RECORDS,
    WORD_SLOT,
    RingKind,
)
from kvstore.mapped.context import BAD_ARGUMENT, FULL, LARGE, NO_GRANT, NO_LANE, STALE
from kvstore.mapped.grants import offer, revoke
from kvstore.mapped.reads import match
from kvstore.mapped.ring import consume, consumed, lower_bells, take, waiting
from kvstore.mapped.writes import begin_put, cancel_put, end_put, fill_slot, give_back, put_one

_RECORD = struct.Struct("<BBBxHHIIqqQqqq")
ROOT = bytes(32)


def lend(memory: MappedMemory, slots: list[int], lane: int = 0, pages: int = 1, head: int = 0) -> int:
    words = np.array(slots, np.int64)
    memory.set(fields.LANE_PAGES + 8 * lane, pages)
    new: int = offer(memory.file_at, lane, head, pages * 4096, int(words.ctypes.data), len(slots))
    return new


def taken(memory: MappedMemory, limit: int = 64, already: int = 0) -> list[tuple[tuple[int, ...], bytes]]:
    out, headers = np.zeros(limit * 8, np.int64), np.zeros(limit * 32, np.int64)
    where = (memory.arena_at, memory.pages * 4096, int(headers.ctypes.data))
    count = take(memory.file_at, already, int(out.ctypes.data), limit, *where)
    assert count >= 0
    raw, all_headers = out.tobytes(), headers.tobytes()
    return [
        (_RECORD.unpack_from(raw, 64 * number), all_headers[256 * number : 256 * number + 256])
        for number in range(count)
    ]


@pytest.mark.parametrize("length", [1, 7, 64, 255, 1000, 3840])
def test_put_writes_the_very_record_that_the_format_describes(length: int) -> None:
    memory = MappedMemory()
    memory.bytes_at(9, 4096)[:] = b"\xff" * 4096
    lend(memory, [9])
    payload, key, parent = random.Random(length).randbytes(length), key_of(1), key_of(0)
    assert put_one(memory.context, id(key), id(parent), id(payload), 3, 77) >= 0
    expected = raw_header(key=key, parent_key=parent, namespace_digest=DIGEST, part=3, payload=payload)
    slot = bytes(memory.bytes_at(9, 4096))
    assert slot == (encode_header(expected) + payload).ljust(4096, b"\0")
    assert decode_record(slot[: 256 + length])[0] == expected
    ((record, header),) = taken(memory)
    assert header == slot[:256]
    kind, _, _, part, namespace, record_bytes, _, where, _, access, now, _, _ = record
    assert (kind, part, namespace) == (RingKind.COMMIT, 3, memory.namespace)
    assert (record_bytes, where, access) == (256 + length, 9, 77)
    assert now > 0


@pytest.mark.parametrize("pages", [9, 40, 300])
def test_put_large_by_three_calls_equals_one(pages: int) -> None:
    memory = MappedMemory(pages=1000)
    length = pages * 4096 - 256 - 100
    lend(memory, [300], pages=pages)
    payload, key = random.Random(pages).randbytes(length), key_of(1)
    item = np.zeros(fields.ITEM_BYTES // 8, np.int64)
    at = int(item.ctypes.data)
    if length >= 1 << 20:
        assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == LARGE
    assert begin_put(memory.context, at, id(key), id(payload)) == 0
    fill_slot(memory.context, at)
    assert end_put(memory.context, at, id(ROOT), 0, 0) >= 0
    header, data = decode_record(bytes(memory.bytes_at(300, 256 + length)))
    assert header.key == key
    assert data == payload
    assert bytes(memory.bytes_at(300, pages * 4096)[256 + length :]) == bytes(100)


def test_put_without_lane_grant_or_namespace_does_nothing() -> None:
    memory = MappedMemory()
    payload, key = b"x" * 100, key_of(1)
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == NO_LANE
    head = lend(memory, [9])
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) >= 0
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == NO_GRANT
    lend(memory, [10], head=head)
    memory.set_namespace(2)
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == STALE
    assert int(memory.file[HEAD_OFFSET // 8]) == 1


@pytest.mark.parametrize("data", [b"", "text", None, np.zeros(8)[::2], np.array([object()]), [1]])
def test_put_what_is_no_data_is_refused_and_takes_no_grant(data: object) -> None:
    memory = MappedMemory()
    lend(memory, [9])
    key, payload = key_of(1), b"good"
    assert put_one(memory.context, id(key), id(ROOT), id(data), 0, 0) == BAD_ARGUMENT
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) >= 0


def test_put_that_began_in_another_generation_is_not_committed() -> None:
    memory = MappedMemory()
    lend(memory, [9])
    payload, key = b"x" * 100, key_of(1)
    item = np.zeros(fields.ITEM_BYTES // 8, np.int64)
    at = int(item.ctypes.data)
    assert begin_put(memory.context, at, id(key), id(payload)) == 0
    fill_slot(memory.context, at)
    memory.set(fields.NAMESPACE_ID, memory.namespace + 1)
    assert end_put(memory.context, at, id(ROOT), 0, 0) == STALE
    assert int(memory.file[HEAD_OFFSET // 8]) == 0
    payload_is_held = sys.getrefcount(payload)
    assert cancel_put(at) == 9
    assert sys.getrefcount(payload) == payload_is_held - 1
    assert cancel_put(at) == 0


def test_put_full_ring_is_refused_before_a_grant_is_taken() -> None:
    memory = MappedMemory()
    payload, key = b"x", key_of(1)
    head = 0
    for number in range(RING_RECORDS):
        head = lend(memory, [9], head=head)
        assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == number
    lend(memory, [10], head=head)
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == FULL
    assert give_back(memory.context, 10) == FULL
    consume(memory.file_at, 1)
    assert consumed(memory.file_at) == 1
    assert put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == RING_RECORDS


def test_take_goes_round_the_ring_in_order() -> None:
    memory = MappedMemory()
    done = 0
    chance = random.Random(4)
    for _ in range(200):
        for slot in range(1, chance.randint(2, 60)):
            assert give_back(memory.context, slot) != FULL
        records = taken(memory, limit=chance.randint(1, 64), already=done)
        done += len(records)
        consume(memory.file_at, done)
        assert all(record[0] == RingKind.RETURN for record, _ in records)
        while len(records := taken(memory, already=done)):
            done += len(records)
            consume(memory.file_at, done)
    assert done == int(memory.file[HEAD_OFFSET // 8])


@pytest.mark.parametrize("head", [-1, RING_RECORDS + 1, 1 << 62, -(1 << 62)])
def test_take_impossible_head_is_noticed(head: int) -> None:
    memory = MappedMemory()
    memory.file[HEAD_OFFSET // 8] = head
    out = np.zeros(64 * 40, np.int64)
    at = int(out.ctypes.data)
    assert take(memory.file_at, 0, at, 64, memory.arena_at, memory.pages * 4096, at + 4096) == -1


@pytest.mark.parametrize("slot", [0, -1, 256, 1 << 40, -(1 << 60), (1 << 63) - 1, 0x744E_9508_A715_51AA])
def test_take_commit_of_a_slot_outside_the_arena_has_no_header(slot: int) -> None:
    memory = MappedMemory()
    lend(memory, [9])
    payload, key = b"x", key_of(1)
    put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0)
    memory.file[(RING_OFFSET + WORD_SLOT) // 8] = slot
    ((_, header),) = taken(memory)
    assert header[:8] == bytes(8)


def test_take_keys_behind_a_report_are_not_taken_for_records() -> None:
    memory = MappedMemory()
    keys = [b"\x01" + bytes(15) + b"\xaa\x51\x15\xa7\x08\x95\x4e\x74" + bytes([number]) * 8 for number in range(16)]
    assert match(memory.context, id(keys), 16, 0, 0) == 0
    records = taken(memory)
    assert [record[0] for record, _ in records] == [RingKind.MATCH] + [1] * 8
    assert not any(any(header) for _, header in records)


def test_take_header_with_a_wrong_checksum_has_no_header() -> None:
    memory = MappedMemory()
    lend(memory, [9])
    payload, key = b"x", key_of(1)
    put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0)
    memory.bytes_at(9, 4096)[30] ^= 1
    ((_, header),) = taken(memory)
    assert header[:8] == bytes(8)


def test_bell_rings_once_until_it_is_lowered() -> None:
    memory = MappedMemory()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    memory.set(fields.BELL, writer)

    def rang() -> int:
        try:
            return len(os.read(reader, 100))
        except BlockingIOError:
            return 0

    assert give_back(memory.context, 1) == 0
    assert rang() == 1
    assert give_back(memory.context, 1) == 0
    assert rang() == 0
    files = np.array([memory.file_at, 2], np.int64)
    out = np.zeros(1, np.int64)
    at = int(files.ctypes.data)
    assert waiting(at, 1, int(out.ctypes.data)) == 0
    assert lower_bells(at, 1) == 0
    assert give_back(memory.context, 1) == 0
    assert rang() == 1
    assert waiting(at, 1, int(out.ctypes.data)) == 1
    assert lower_bells(at, 1) == 1
    os.close(reader)
    os.close(writer)


def test_grants_go_to_one_side_only_and_round_the_lane() -> None:
    memory = MappedMemory()
    chance = random.Random(5)
    out = np.zeros(LANE_GRANTS, np.int64)
    payload = b"x"
    head, number, next_slot = 0, 0, 1
    lent: set[int] = set()
    used: list[int] = []
    done = 0
    for _ in range(400):
        action = chance.random()
        if action < 0.5:
            slots = [1 + (next_slot + step) % 250 for step in range(chance.randint(1, 40))]
            slots = [slot for slot in dict.fromkeys(slots) if slot not in lent]
            next_slot += len(slots)
            new = lend(memory, slots, head=head)
            lent.update(slots[: new - head])
            head = new
        elif action < 0.9:
            for _ in range(chance.randint(1, 30)):
                key = key_of(number)
                if put_one(memory.context, id(key), id(ROOT), id(payload), 0, 0) == NO_GRANT:
                    break
                number += 1
            for record, _ in taken(memory, already=done):
                lent.remove(record[7])
                used.append(record[7])
                done += 1
            consume(memory.file_at, done)
        else:
            count = revoke(memory.file_at, 0, int(out.ctypes.data))
            back = out[:count].tolist()
            assert set(back) == lent
            lent.clear()
    assert used


def test_offer_hostile_tail_writes_inside_the_lane_only() -> None:
    memory = MappedMemory()
    outside = np.ones(len(memory.file), bool)
    outside[(LANE_OFFSET) // 8 : (LANE_OFFSET + LANE_BYTES) // 8] = False
    outside[GRANT_OFFSET // 8 : GRANT_OFFSET // 8 + LANE_GRANTS] = False
    before = memory.file.copy()
    for tail in (-(1 << 62), 1 << 62, -1, 300):
        memory.file[(LANE_OFFSET + LANE_TAIL) // 8] = tail
        words = np.arange(1, LANE_GRANTS + 1)
        offer(memory.file_at, 0, 0, 4096, int(words.ctypes.data), LANE_GRANTS)
        assert (memory.file == before)[outside].all()


def test_consumed_is_what_the_daemon_said() -> None:
    memory = MappedMemory()
    consume(memory.file_at, 12345)
    assert int(memory.file[CONSUMED_OFFSET // 8]) == 12345
