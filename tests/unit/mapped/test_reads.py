"""Compiled reads: what they take as keys and buffers, what they find, and what they report."""

from __future__ import annotations

import os
import select
import struct

import numpy as np
import pytest
from mapped_memory import MappedMemory, key_of

from kvstore.mapped import context as fields
from kvstore.mapped.client_file import HEAD_OFFSET, RING_OFFSET, RING_RECORDS, RingKind
from kvstore.mapped.context import BAD_ARGUMENT, BUSY, LARGE, LOOK, MISS, TOO_SMALL
from kvstore.mapped.index_reader import copy_batch
from kvstore.mapped.reads import close_batch, get_one, match, open_batch, pin_one

_RECORD = struct.Struct("<BBBxHHIIqqQqqq")


def ring(memory: MappedMemory) -> list[tuple[int, ...]]:
    """All records written into the ring so far, undecoded beyond their fields."""
    head = int(memory.file[HEAD_OFFSET // 8])
    data = memory.file.data.cast("B")
    return [_RECORD.unpack_from(data, RING_OFFSET + 64 * (number % RING_RECORDS)) for number in range(head)]


def named_keys(memory: MappedMemory, record: int, count: int) -> list[bytes]:
    begin = RING_OFFSET + 64 * (record + 1)
    data = bytes(memory.file.data.cast("B")[begin : begin + 32 * count])
    return [data[at : at + 32] for at in range(0, len(data), 32)]


@pytest.fixture
def memory() -> MappedMemory:
    memory = MappedMemory(pages=400, buckets=60)
    parent = bytes(32)
    for number in range(150):
        memory.put(number + 1, key_of(number), b"block %d" % number, parent)
        parent = key_of(number)
    return memory


@pytest.mark.parametrize("count", [0, 1, 5, 127, 128, 129, 150])
def test_match_counts_leading_hits(memory: MappedMemory, count: int) -> None:
    keys = [key_of(number) for number in range(count)]
    assert match(memory.context, id(keys), len(keys), 0, 0) == count
    keys.append(b"\7" * 32)
    keys += [key_of(number) for number in range(count, 150)]
    assert match(memory.context, id(keys), len(keys), 0, 0) == count


@pytest.mark.parametrize("bad", [b"short", b"\1" * 33, bytes(32), None, 7, "text", bytearray(32)])
@pytest.mark.parametrize("at", [0, 3, 149, 160])
def test_match_what_is_no_key_is_refused_wherever_it_stands(memory: MappedMemory, bad: object, at: int) -> None:
    keys: list[object] = [key_of(number) for number in range(150)] + [b"\7" * 32] * 20
    keys[at] = bad
    assert match(memory.context, id(keys), len(keys), 0, 0) == BAD_ARGUMENT


def test_match_of_several_parts_needs_all_of_them() -> None:
    memory = MappedMemory(parts=3)
    for part in range(3):
        memory.put(1 + part, key_of(0), b"p", part=part)
    for part in range(2):
        memory.put(5 + part, key_of(1), b"p", part=part)
    keys = [key_of(0), key_of(1)]
    assert match(memory.context, id(keys), 2, 0, 0) == 1


def test_match_that_is_unsure_is_busy_and_silent_unless_all_keys_hit(memory: MappedMemory) -> None:
    keys = [key_of(number) for number in range(10)]
    for missing in ([b"\7" * 32], [b"\7" * 32, key_of(11)]):
        assert match(memory.context, id(keys + missing), 10 + len(missing), 0, 8) == BUSY
    assert not ring(memory)
    assert match(memory.context, id([*keys, None]), 11, 0, 8) == BAD_ARGUMENT
    assert match(memory.context, id(keys), 10, 0, 8) == 10
    assert match(memory.context, id([]), 0, 0, 8) == 0
    assert [record[5:7] for record in ring(memory)] == [(10, 10), (0, 0)]


def test_match_reports_counts_deepest_hit_and_missing_keys(memory: MappedMemory) -> None:
    keys = [key_of(number) for number in range(10)] + [bytes([200 + number]) * 32 for number in range(20)]
    assert match(memory.context, id(keys), 30, 77, 0) == 10
    kind, following, named, part, namespace, asked, hits, slot, sequence, access, now, nbytes, later = ring(memory)[0]
    assert (kind, part, namespace, asked, hits, slot) == (RingKind.MATCH, 0, memory.namespace, 30, 10, 10)
    assert (following, named, access, nbytes, later) == (8, 16, 77, 0, 0)
    assert sequence > 0
    assert sequence % 2 == 0
    assert now > 0
    assert named_keys(memory, 0, 16) == keys[10:26]
    assert int(memory.file[HEAD_OFFSET // 8]) == 9


def test_get_reports_a_hit_and_a_miss(memory: MappedMemory) -> None:
    key, out = key_of(4), bytearray(100)
    assert get_one(memory.context, id(key), id(out), 0, 5, 0) == 7
    missing = b"\7" * 32
    assert get_one(memory.context, id(missing), id(out), 0, 0, 0) == MISS
    hit, miss = ring(memory)[:2]
    assert hit[0] == RingKind.GET
    assert hit[5:8] == (1, 1, 5)
    assert hit[9] == 5
    assert hit[11] == 7
    assert miss[0] == RingKind.GET
    assert miss[1:3] == (1, 1)
    assert miss[5:7] == (1, 0)
    assert named_keys(memory, 1, 1) == [missing]


@pytest.mark.parametrize(
    "out",
    [
        bytearray(64),
        memoryview(bytearray(64)),
        np.zeros(64, np.uint8),
        np.zeros((4, 8), np.float32),
        np.zeros(16, np.int32)[:],
        memoryview(bytearray(64)).cast("i"),
    ],
)
def test_get_into_any_writable_contiguous_buffer(memory: MappedMemory, out: object) -> None:
    key = key_of(4)
    assert get_one(memory.context, id(key), id(out), 0, 0, 0) == 7
    assert bytes(memoryview(out).cast("B"))[:7] == b"block 4"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "out",
    [
        bytes(64),
        memoryview(bytes(64)),
        np.zeros(64, np.uint8)[::2],
        np.zeros((8, 8), np.uint8).T,
        np.array([object()] * 64),
        "text",
        None,
        [1, 2],
        bytearray(),
    ],
)
def test_get_into_what_is_no_such_buffer_is_refused_and_unharmed(memory: MappedMemory, out: object) -> None:
    key = key_of(4)
    before = repr(out)
    assert get_one(memory.context, id(key), id(out), 0, 0, 0) == BAD_ARGUMENT
    assert repr(out) == before


def test_get_buffers_are_given_back(memory: MappedMemory) -> None:
    key, out, small = key_of(4), bytearray(64), bytearray(3)
    assert get_one(memory.context, id(key), id(out), 0, 0, 0) == 7
    assert get_one(memory.context, id(key), id(small), 0, 0, 0) == TOO_SMALL
    out.extend(b"can only grow while nobody holds it")
    small.clear()


def test_get_large_buffer_is_left_to_a_batch(memory: MappedMemory) -> None:
    key, out = key_of(4), bytearray(1 << 20)
    assert get_one(memory.context, id(key), id(out), 0, 0, 0) == LARGE
    assert ring(memory) == []


def test_reads_ask_for_a_look_at_the_daemons_lock_when_it_is_due(memory: MappedMemory) -> None:
    memory.set(fields.NEXT_LOOK, 0)
    key, out, keys = key_of(4), bytearray(64), [key_of(1)]
    assert get_one(memory.context, id(key), id(out), 0, 0, 0) == LOOK
    assert pin_one(memory.context, id(key), 0, 0, 0, 0) == LOOK
    assert match(memory.context, id(keys), 1, 0, 0) == LOOK
    assert ring(memory) == []


def batch(memory: MappedMemory, keys: list[bytes], outs: list[bytearray], access: int = 9) -> list[int]:
    items = np.zeros((len(keys), fields.ITEM_BYTES // 8), np.int64)
    at = int(items.ctypes.data)
    assert open_batch(memory.context, id(keys), id(outs), len(keys), at, 0) == 0
    copy_batch(memory.context, at, len(keys), 0)
    close_batch(memory.context, at, len(keys), 0, access)
    results: list[int] = items[:, fields.ITEM_RESULT // 8].tolist()
    return results


def test_batch_one_chain_is_one_report(memory: MappedMemory) -> None:
    keys = [key_of(number) for number in range(20)]
    outs = [bytearray(32) for _ in keys]
    assert batch(memory, keys, outs) == [len(b"block %d" % number) for number in range(20)]
    assert all(out.startswith(b"block %d\0" % number) for number, out in enumerate(outs))
    (report,) = ring(memory)
    assert report[0] == RingKind.GET
    assert report[5:8] == (20, 20, 20)
    assert report[9] == 9
    assert report[11] == sum(len(b"block %d" % number) for number in range(20))
    for out in outs:
        out.extend(b"let go")


def test_batch_several_runs_are_reports_that_belong_together(memory: MappedMemory) -> None:
    keys = [key_of(2), key_of(3), b"\7" * 32, key_of(10), key_of(11), key_of(12), b"\6" * 32, key_of(50)]
    assert batch(memory, keys, [bytearray(32) for _ in keys])[2] == MISS
    reports = [record for record in ring(memory) if record[0] == RingKind.GET]
    assert [(report[5], report[6], report[7], report[12]) for report in reports] == [
        (8, 2, 4, 0),
        (0, 3, 13, 1),
        (0, 1, 51, 1),
    ]
    assert reports[0][1:3] == (1, 2)
    assert named_keys(memory, 0, 2) == [b"\7" * 32, b"\6" * 32]


def test_batch_bad_argument_or_small_buffer_copies_nothing_and_holds_nothing(memory: MappedMemory) -> None:
    items = np.zeros((3, fields.ITEM_BYTES // 8), np.int64)
    at = int(items.ctypes.data)
    keys: list[object] = [key_of(1), key_of(2), key_of(3)]
    outs: list[object] = [bytearray(b"?" * 32), bytearray(b"?" * 32), bytearray(2)]
    assert open_batch(memory.context, id(keys), id(outs), 3, at, 0) == TOO_SMALL
    outs[2] = bytes(32)
    assert open_batch(memory.context, id(keys), id(outs), 3, at, 0) == BAD_ARGUMENT
    outs[2] = bytearray(32)
    keys[2] = b"short"
    assert open_batch(memory.context, id(keys), id(outs), 3, at, 0) == BAD_ARGUMENT
    for out in outs[:2]:
        assert isinstance(out, bytearray)
        assert out == b"?" * 32
        out.extend(b"let go")


def test_reports_full_ring_drops_and_counts_them_and_keeps_room_for_commits(memory: MappedMemory) -> None:
    key, out = key_of(4), bytearray(64)
    for _ in range(RING_RECORDS + 100):
        assert get_one(memory.context, id(key), id(out), 0, 0, 0) == 7
    head = int(memory.file[HEAD_OFFSET // 8])
    assert head == RING_RECORDS - 512
    assert int(memory.file[392 // 8]) == RING_RECORDS + 100 - head


def test_reports_ring_the_bell_only_when_the_ring_fills_up(memory: MappedMemory) -> None:
    key, out = key_of(4), bytearray(64)
    reader, writer = os.pipe()
    memory.set(fields.BELL, writer)
    try:
        for number in range(RING_RECORDS - 600):
            get_one(memory.context, id(key), id(out), 0, 0, 0)
            rang = bool(select.select([reader], [], [], 0)[0])
            assert rang == (number >= RING_RECORDS // 2 - 1), number
        assert len(os.read(reader, 100)) == 1
    finally:
        os.close(reader)
        os.close(writer)
