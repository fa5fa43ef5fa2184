"""The bucket index through its compiled functions: what is published is found, what is withdrawn is not, ever."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
from mapped_memory import MappedMemory, key_of

from kvstore.mapped import context as fields
from kvstore.mapped.client_file import HAZARD_OFFSET
from kvstore.mapped.context import BUSY, CORRUPT, MISS, OTHER_CODEC, OVER, STALE, TOO_SMALL
from kvstore.mapped.index_file import BUCKET_OFFSET, STATE_OFFSET, bucket_count_for
from kvstore.mapped.index_reader import copy_batch, unpin
from kvstore.mapped.reads import get_one, match, pin_one


def read(memory: MappedMemory, key: bytes, size: int = 4096, part: int = 0) -> bytes | int:
    out = bytearray(size)
    length = get_one(memory.context, id(key), id(out), part, 0, 0)
    return bytes(out[:length]) if length >= 0 else int(length)


def test_get_published_record_gives_its_payload() -> None:
    memory = MappedMemory()
    assert memory.put(5, key_of(1), b"payload of one")
    assert read(memory, key_of(1)) == b"payload of one"


def test_get_other_key_part_or_namespace_misses() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload of one")
    assert read(memory, key_of(2)) == MISS
    assert read(memory, key_of(1), part=1) == MISS
    memory.set(fields.NAMESPACE_ID, memory.namespace + 1)
    assert read(memory, key_of(1)) == MISS


def test_get_withdrawn_record_misses_and_its_place_is_used_again() -> None:
    memory = MappedMemory(buckets=2)
    for turn in range(200):
        assert memory.put(5, key_of(turn), b"x" * (turn + 1))
        assert read(memory, key_of(turn)) == b"x" * (turn + 1)
        assert memory.withdraw(5) == []
        assert read(memory, key_of(turn)) == MISS


def test_get_too_small_buffer_copies_nothing() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload of one")
    out = bytearray(b"?" * 13)
    key = key_of(1)
    assert get_one(memory.context, id(key), id(out), 0, 0, 0) == TOO_SMALL
    assert out == b"?" * 13


def test_get_entry_that_stays_half_written_is_left_to_the_daemon() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    entry = BUCKET_OFFSET // 8 + 8 * int(memory.entries[5])
    memory.index[entry] += 1
    assert read(memory, key_of(1)) == BUSY
    key, keys = key_of(1), [key_of(1)]
    assert pin_one(memory.context, id(key), 0, 0, 0, 0) == BUSY
    assert match(memory.context, id(keys), 1, 0, 0) == BUSY
    assert read(memory, key_of(2)) == MISS
    memory.index[entry] += 1
    assert read(memory, key_of(1)) == b"payload"


@pytest.mark.parametrize(("slot", "length"), [(0, 100), (256, 100), (255, 4097 - 256), (5, 0), (1 << 31, 100)])
def test_get_entry_outside_the_arena_is_never_followed(slot: int, length: int) -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    entry = BUCKET_OFFSET // 8 + 8 * int(memory.entries[5])
    memory.index[entry + 5] = np.int64(np.uint64(slot | (256 + length) << 32))
    assert read(memory, key_of(1)) == CORRUPT


def test_get_record_of_another_codec_is_left_to_others() -> None:
    memory = MappedMemory()
    memory.write(5, key_of(1), b"payload")
    memory.publish(5, key_of(1), 7, codec=2)
    assert read(memory, key_of(1)) == OTHER_CODEC


def test_get_verifying_sees_one_changed_bit() -> None:
    memory = MappedMemory(verify_every=1)
    payload = random.Random(1).randbytes(3000)
    memory.put(5, key_of(1), payload)
    assert read(memory, key_of(1)) == payload
    memory.bytes_at(5, 4096)[256 + 1234] ^= 4
    assert read(memory, key_of(1)) == CORRUPT


def test_get_verifying_every_third_read_looks_at_every_third() -> None:
    memory = MappedMemory(verify_every=3)
    memory.put(5, key_of(1), b"payload")
    memory.bytes_at(5, 4096)[256] ^= 1
    results = [read(memory, key_of(1)) for _ in range(9)]
    assert results.count(CORRUPT) == 3
    assert results[2::3] == [CORRUPT] * 3


def test_reads_dead_daemon_ended_session_or_invalidated_namespace_are_refused() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    memory.set_namespace(2)
    assert read(memory, key_of(1)) == STALE
    key = key_of(1)
    assert pin_one(memory.context, id(key), 0, 0, 0, 0) == STALE
    memory.set_namespace(1)
    memory.index[STATE_OFFSET // 8] = 2
    assert read(memory, key_of(1)) == OVER
    assert pin_one(memory.context, id(key), 0, 0, 0, 0) == OVER
    memory.index[STATE_OFFSET // 8] = 1
    memory.file[128 // 8] = 2
    assert read(memory, key_of(1)) == OVER


def test_move_record_is_found_in_its_new_slot_and_the_old_one_is_free() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    assert memory.move(5, 9, 4096) == 1
    memory.bytes_at(5, 4096)[:] = bytes(4096)
    assert read(memory, key_of(1)) == b"payload"
    assert memory.withdraw(5) == []
    assert read(memory, key_of(1)) == b"payload"
    memory.withdraw(9)
    assert read(memory, key_of(1)) == MISS
    assert memory.move(5, 9, 0) == 0


def test_replace_better_record_is_found_and_the_old_slot_is_free() -> None:
    memory = MappedMemory(verify_every=1, buckets=2)
    keys = [key_of(number) for number in range(30) if memory.publish(number + 1, key_of(number), 7, 0, fidelity=85)]
    assert len(keys) == 14, "both buckets are full, which does not matter"
    key, source = key_of(1), 2
    assert match(memory.context, id([key]), 1, 0, 0) == 1 | 170 << 32
    assert memory.replace(source, 100, key, b"the better payload") == 1
    memory.bytes_at(source, 4096)[:] = bytes(4096)
    assert read(memory, key) == b"the better payload"
    assert match(memory.context, id([key]), 1, 0, 0) == 1
    assert memory.withdraw(source) == []
    assert read(memory, key) == b"the better payload"
    assert memory.replace(source, 101, key, b"?") == 0
    memory.withdraw(100)
    assert read(memory, key) == MISS


def test_replace_while_the_old_record_is_read_in_place_keeps_its_slot() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    key = key_of(1)
    assert pin_one(memory.context, id(key), 0, 0, 0, 0) == 5 << 32 | 7
    memory.replace(5, 9, key, b"better")
    assert memory.withdraw(5) == [5]
    assert memory.bytes_at(5, 4096)[256:263] == b"payload"
    assert pin_one(memory.context, id(key), 1, 0, 0, 0) == 9 << 32 | 6
    unpin(memory.context, 0)
    assert memory.rescan(5) == []


def test_replace_again_and_again_is_never_a_miss_and_never_a_mixture() -> None:
    """Another thread reads meanwhile, without the interpreter lock; a slot is written again as soon as it is free."""
    memory = MappedMemory(verify_every=1)
    key, size, count = key_of(1), 3000, 20_000
    memory.put(5, key, b"\0" * size)
    out = np.zeros(size, np.uint8)
    items = np.zeros((count, fields.ITEM_BYTES // 8), np.int64)
    items[:, :4] = np.frombuffer(key, np.int64)
    items[:, fields.ITEM_TARGET // 8], items[:, fields.ITEM_CAPACITY // 8] = out.ctypes.data, size
    seen: Counter[int] = Counter()
    over = threading.Event()

    def keep_reading() -> None:
        while not over.is_set():
            copy_batch(memory.context, int(items.ctypes.data), count, 0)
            seen.update(items[:, fields.ITEM_RESULT // 8].tolist())

    reader = threading.Thread(target=keep_reading)
    reader.start()
    try:
        source, target = 5, 9
        end = time.monotonic() + 1.5
        turn = 0
        while time.monotonic() < end:
            turn += 1
            assert memory.replace(source, target, key, bytes([turn % 256]) * size)
            assert memory.withdraw(source) == []
            source, target = target, source
    finally:
        over.set()
        reader.join()
    assert seen[size] > count
    assert turn > 100
    assert set(seen) <= {size, BUSY}, seen


def test_match_tells_the_lowest_fidelity_of_its_hits() -> None:
    memory = MappedMemory(parts=2)
    for number, fidelities in enumerate([(255, 255), (255, 178), (85, 255), (34,)]):
        for part, fidelity in enumerate(fidelities):
            memory.publish(1 + 2 * number + part, key_of(number), 7, part=part, fidelity=fidelity)
    keys = [key_of(number) for number in range(4)]
    for count, hits, lowest in [(1, 1, 255), (2, 2, 178), (3, 3, 85), (4, 3, 85)]:
        assert match(memory.context, id(keys), count, 0, 0) == hits | (255 - lowest) << 32
    memory.publish(20, key_of(0), 7, part=0)
    memory.set_namespace(2)
    assert match(memory.context, id(keys), 3, 0, 0) == 0


def test_publish_full_buckets_is_refused_and_changes_nothing() -> None:
    memory = MappedMemory(buckets=2)
    numbers = [number for number in range(40) if memory.put(number + 1, key_of(number), b"%d" % number)]
    assert len(numbers) == 14
    for number in range(40):
        expected = b"%d" % number if number in numbers else MISS
        assert read(memory, key_of(number)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_index_random_operations_equal_a_dict(seed: int) -> None:
    chance = random.Random(seed)
    memory = MappedMemory(pages=400, buckets=bucket_count_for(300))
    model: dict[bytes, tuple[int, bytes]] = {}
    free = list(range(1, 400))
    for _ in range(4000):
        action = chance.random()
        if action < 0.5 and len(model) < 300:
            key = key_of(chance.randrange(1000))
            if key not in model:
                slot, payload = free.pop(chance.randrange(len(free))), chance.randbytes(chance.randint(1, 64))
                assert memory.put(slot, key, payload)
                model[key] = (slot, payload)
        elif action < 0.7 and model:
            some = chance.sample(sorted(model), min(len(model), 5))
            slots = [model.pop(key)[0] for key in some]
            assert memory.withdraw(*slots) == []
            free += slots
        elif action < 0.8 and model:
            key = chance.choice(sorted(model))
            target = free.pop(chance.randrange(len(free)))
            memory.move(model[key][0], target, 4096)
            memory.withdraw(model[key][0])
            free.append(model[key][0])
            model[key] = (target, model[key][1])
        key = key_of(chance.randrange(1000))
        assert read(memory, key) == (model[key][1] if key in model else MISS)


def test_hazard_pinned_slot_is_reported_until_it_is_let_go() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    memory.put(6, key_of(2), b"other")
    key = key_of(1)
    assert pin_one(memory.context, id(key), 7, 0, 0, 0) == 5 << 32 | 7
    assert memory.file[HAZARD_OFFSET // 8 + 7] == 6
    assert sorted(memory.withdraw(5, 6)) == [5]
    assert read(memory, key) == MISS
    assert memory.rescan(5) == [5]
    unpin(memory.context, 7)
    assert memory.rescan(5) == []


def test_hazard_garbage_in_a_clients_words_harms_nobody() -> None:
    memory = MappedMemory()
    chance = random.Random(2)
    words = memory.file[HAZARD_OFFSET // 8 : HAZARD_OFFSET // 8 + 64]
    words[:] = [chance.randrange(-(1 << 63), 1 << 63) for _ in range(64)]
    words[:4] = [1, -1, memory.pages + 1, memory.pages + 2]
    memory.put(5, key_of(1), b"payload")
    assert memory.withdraw(5) == []
    assert not memory.entries.any()


def test_hazard_of_a_moved_record_holds_the_old_slot() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"payload")
    key = key_of(1)
    pin_one(memory.context, id(key), 0, 0, 0, 0)
    memory.move(5, 9, 4096)
    assert memory.withdraw(5) == [5]
    assert read(memory, key) == b"payload"


def test_pin_miss_leaves_no_hazard() -> None:
    memory = MappedMemory()
    key = key_of(1)
    assert pin_one(memory.context, id(key), 0, 0, 0, 0) == MISS
    assert not memory.file[HAZARD_OFFSET // 8 : HAZARD_OFFSET // 8 + 64].any()


def test_copy_batch_reads_each_item_by_itself() -> None:
    memory = MappedMemory()
    memory.put(5, key_of(1), b"first")
    memory.put(6, key_of(2), b"second", parent=key_of(1))
    memory.put(7, key_of(4), b"fourth", parent=key_of(3))
    out = np.zeros((4, 64), np.uint8)
    items = np.zeros((4, fields.ITEM_BYTES // 8), np.int64)
    for index in range(4):
        items[index, :4] = np.frombuffer(key_of(index + 1), np.int64)
        items[index, fields.ITEM_TARGET // 8] = out[index].ctypes.data
        items[index, fields.ITEM_CAPACITY // 8] = 64
    copy_batch(memory.context, int(items.ctypes.data), 4, 0)
    assert items[:, fields.ITEM_RESULT // 8].tolist() == [5, 6, MISS, 6]
    assert items[[0, 1, 3], fields.ITEM_CHAINED // 8].tolist() == [0, 1, 0]
    assert out[3, :6].tobytes() == b"fourth"


def test_results_are_all_different() -> None:
    results = [MISS, TOO_SMALL, BUSY, OVER, STALE, CORRUPT, OTHER_CODEC, fields.BAD_ARGUMENT, fields.LARGE]
    results += [fields.NO_GRANT, fields.NO_LANE, fields.FULL, fields.LOOK]
    assert len(set(results)) == len(results)
    assert max(results) < 0
