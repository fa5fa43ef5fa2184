"""Compiled batches: slots that others fill, records that others decode in place."""

from __future__ import annotations

import random

import numpy as np
import pytest
from mapped_memory import DIGEST, MappedMemory, Words, key_of

from kvstore.format.record import checksum, encode_header, raw_header
from kvstore.mapped import batch_writes as writes
from kvstore.mapped import context as fields
from kvstore.mapped.batch_reads import find_batch, hold_batch, release_batch, verify_batch
from kvstore.mapped.client_file import CONSUMED_OFFSET, HAZARD_OFFSET, HEAD_OFFSET, RING_RECORDS, STATE_OFFSET, RingKind
from kvstore.mapped.context import BUSY, CORRUPT, FULL, LOOK, MISS, NO_GRANT, NO_LANE, OVER, STALE
from kvstore.mapped.grants import offer
from kvstore.mapped.ring import consume

PAYLOAD = 1000


class Writing:
    """A batch of slots of one page."""

    def __init__(self, memory: MappedMemory, count: int) -> None:
        self.memory = memory
        self.items: Words = np.zeros((count, writes.ITEM_WORDS), np.int64)
        self.address = int(self.items.ctypes.data)
        self._given = 0

    def lend(self, *slots: int, pages: int = 1) -> None:
        words = np.array(slots, np.int64)
        self.memory.set(fields.LANE_PAGES, pages)
        self._given = offer(self.memory.file_at, 0, self._given, pages * 4096, int(words.ctypes.data), len(slots))

    def claim(self, count: int, record_bytes: int = 256 + PAYLOAD) -> int:
        claimed: int = writes.claim_slots(self.memory.context, self.address, count, record_bytes)
        return claimed

    @property
    def slots(self) -> list[int]:
        return self.items[:, 0].tolist()

    def fill(self, payloads: list[bytes]) -> None:
        """As an encoder does, then say what they are."""
        for index, payload in enumerate(payloads):
            slot = self.slots[index]
            self.memory.bytes_at(slot, 4096)[256 : 256 + len(payload)] = payload
            item = self.items[index]
            item[writes.ITEM_PAYLOAD_BYTES // 8] = len(payload)
            item[writes.ITEM_KEY // 8 :][:4] = np.frombuffer(key_of(index + 1), np.int64)
            item[writes.ITEM_PARENT // 8 :][:4] = np.frombuffer(key_of(index) if index else bytes(32), np.int64)
            item[writes.ITEM_SECTIONS // 8] = len(payload)
        writes.seal_slots(self.memory.context, self.address, len(payloads))

    def commit(self, count: int, digest: bytes = DIGEST, part: int = 3) -> int:
        raw = raw_header(
            key=key_of(9), parent_key=bytes(32), namespace_digest=digest, part=part, payload=bytes(PAYLOAD)
        )
        template = np.frombuffer(encode_header(raw), np.int64).copy()
        first: int = writes.commit_slots(self.memory.context, int(template.ctypes.data), self.address, count, part, 77)
        return first

    @property
    def head(self) -> int:
        return int(self.memory.file[HEAD_OFFSET // 8])


def ring_record(memory: MappedMemory, number: int) -> tuple[int, int]:
    """Kind and slot."""
    at = (24576 + 64 * (number % RING_RECORDS)) // 8
    return int(memory.file[at]) & 0xFF, int(memory.file[at + 2])


def test_what_is_encoded_into_slots_becomes_the_records_of_the_format() -> None:
    memory = MappedMemory()
    batch = Writing(memory, 4)
    for slot in (7, 8, 9):
        memory.bytes_at(slot, 4096)[:] = b"\xff" * 4096
    batch.lend(7, 8, 9)
    assert batch.claim(4) == 3
    assert batch.slots == [7, 8, 9, 0]
    payloads = [random.Random(number).randbytes(PAYLOAD) for number in range(3)]
    batch.fill(payloads)
    assert batch.commit(3) == 0
    assert batch.slots == [0, 0, 0, 0], "what was committed is not held any more"
    for index, payload in enumerate(payloads):
        header = raw_header(
            key=key_of(index + 1),
            parent_key=key_of(index) if index else bytes(32),
            namespace_digest=DIGEST,
            part=3,
            payload=payload,
        )
        expected = (encode_header(header) + payload).ljust(4096, b"\0")
        assert bytes(memory.bytes_at(7 + index, 4096)) == expected
        assert ring_record(memory, index) == (RingKind.COMMIT, 7 + index)
    assert batch.head == 3


def test_what_is_copied_into_slots_is_the_same() -> None:
    memory = MappedMemory()
    batch = Writing(memory, 1)
    batch.lend(7)
    batch.claim(1)
    payload = random.Random(1).randbytes(PAYLOAD)
    batch.fill([payload])
    sealed = int(batch.items[0, writes.ITEM_CHECKSUM // 8])
    source = np.frombuffer(payload, np.uint8).copy()
    memory.bytes_at(7, 4096)[:] = b"\xff" * 4096
    batch.items[0, writes.ITEM_SOURCE // 8] = source.ctypes.data
    writes.fill_slots(memory.context, batch.address, 1)
    assert int(batch.items[0, writes.ITEM_CHECKSUM // 8]) == sealed
    assert sealed & ((1 << 64) - 1) == checksum(payload)
    assert bytes(memory.bytes_at(7, 4096)[256:]) == payload.ljust(3840, b"\0")


def test_what_is_not_committed_goes_back() -> None:
    memory = MappedMemory()
    batch = Writing(memory, 3)
    batch.lend(7, 8, 9)
    assert batch.claim(3) == 3
    assert writes.return_slots(memory.context, batch.address + writes.ITEM_BYTES, 1) == 0
    assert batch.slots == [7, 0, 9]
    assert writes.return_slots(memory.context, batch.address, 3) == 0
    assert batch.slots == [0, 0, 0]
    assert [ring_record(memory, number) for number in range(3)] == [(RingKind.RETURN, slot) for slot in (8, 7, 9)]
    assert writes.return_slots(memory.context, batch.address, 3) == 0
    assert batch.head == 3, "nothing goes back twice"


def test_claims_that_cannot_be() -> None:
    memory = MappedMemory()
    batch = Writing(memory, 2)
    assert batch.claim(1) == NO_LANE
    memory.set(fields.LANE_PAGES, 1)
    assert batch.claim(1) == NO_GRANT
    memory.set(fields.NEXT_LOOK, 0)
    assert batch.claim(1) == LOOK
    memory.set(fields.NEXT_LOOK, 1 << 62)
    batch.lend(7, 8)
    memory.set_namespace(2)
    assert batch.claim(1) == STALE
    memory.set_namespace(1)
    memory.file[STATE_OFFSET // 8] = 2
    assert batch.claim(1) == OVER
    memory.file[STATE_OFFSET // 8] = 1
    memory.file[HEAD_OFFSET // 8] = RING_RECORDS - 2
    assert batch.claim(2) == FULL
    memory.file[HEAD_OFFSET // 8] = 0
    assert batch.slots == [0, 0]
    assert batch.claim(2) == 2


def test_a_slot_that_is_too_small_by_now_goes_back() -> None:
    memory = MappedMemory()
    batch = Writing(memory, 2)
    batch.lend(7, pages=1)
    memory.set(fields.LANE_PAGES, 2)
    assert batch.claim(2, record_bytes=5000) == NO_GRANT
    assert ring_record(memory, 0) == (RingKind.RETURN, 7)
    assert batch.slots == [0, 0]


def test_commits_of_another_generation_or_without_room_keep_their_slots() -> None:
    memory = MappedMemory()
    batch = Writing(memory, 2)
    batch.lend(7, 8)
    batch.claim(2)
    batch.fill([bytes(PAYLOAD)] * 2)
    assert batch.commit(2, digest=bytes(31) + b"x") == STALE
    memory.file[HEAD_OFFSET // 8] = RING_RECORDS - 1
    assert batch.commit(2) == FULL
    assert batch.slots == [7, 8]
    assert batch.head == RING_RECORDS - 1, "all of them or none"
    consume(memory.file_at, 1)
    assert batch.commit(2) == RING_RECORDS - 1


# ---------------------------------------------------------------- reading


class Reading:
    """A batch of reads of keys 1, 2, ... each the parent of the next, with payloads of known bytes."""

    def __init__(self, memory: MappedMemory, count: int) -> None:
        self.memory = memory
        self.count = count
        self.items: Words = np.zeros((count, fields.ITEM_WORDS), np.int64)
        for index in range(count):
            self.items[index, :4] = np.frombuffer(key_of(index + 1), np.int64)
        self.hazards = np.arange(10, 10 + count)
        self.headers = np.zeros((count, 256), np.uint8)

    def store(self, *numbers: int) -> None:
        for number in numbers:
            parent = key_of(number - 1) if number > 1 else bytes(32)
            assert self.memory.put(20 + number, key_of(number), bytes([number]) * PAYLOAD, parent)

    def hold(self, limit: int = 1 << 30, unsure: int = 0, part: int = 0) -> int:
        held: int = hold_batch(
            self.memory.context,
            int(self.items.ctypes.data),
            self.count,
            part,
            int(self.hazards.ctypes.data),
            int(self.headers.ctypes.data),
            limit,
            unsure,
        )
        return held

    def verify(self, count: int) -> int:
        good: int = verify_batch(self.memory.context, int(self.items.ctypes.data), count, int(self.headers.ctypes.data))
        return good

    @property
    def results(self) -> list[int]:
        return self.items[:, fields.ITEM_RESULT // 8].tolist()

    @property
    def hazarded(self) -> list[int]:
        """Slots that are held, in the order of the hazards."""
        words = self.memory.file[HAZARD_OFFSET // 8 : HAZARD_OFFSET // 8 + 64]
        return [int(word) - 1 for word in words if word]


def test_records_are_held_up_to_the_first_that_is_not_there() -> None:
    batch = Reading(MappedMemory(), 5)
    batch.store(1, 2, 3, 5)
    assert batch.hold() == 3
    assert batch.results == [PAYLOAD] * 3 + [MISS, BUSY]
    assert batch.hazarded == [21, 22, 23]
    assert [bytes(header) for header in batch.headers[:3]] == [
        bytes(batch.memory.bytes_at(20 + number, 256)) for number in (1, 2, 3)
    ]
    assert batch.items[:3, fields.ITEM_TARGET // 8].tolist() == [
        batch.memory.arena_at + (20 + number) * 4096 + 256 for number in (1, 2, 3)
    ]
    assert batch.items[:3, fields.ITEM_CHAINED // 8].tolist() == [0, 1, 1]
    assert batch.memory.withdraw(21, 22, 23, 25) == [21, 22, 23], "who is withdrawn while it is held waits"
    assert batch.verify(3) == 3
    release_batch(batch.memory.context, int(batch.hazards.ctypes.data), 2)
    assert batch.hazarded == [23]
    assert batch.memory.rescan(21, 22, 23) == [23]


def test_bytes_and_doubt_end_a_batch_otherwise() -> None:
    batch = Reading(MappedMemory(), 3)
    batch.store(1, 2)
    assert batch.hold(limit=2 * PAYLOAD - 1) == 1
    assert batch.results == [PAYLOAD, BUSY, BUSY]
    assert batch.hold(unsure=1) == 2
    assert batch.results == [PAYLOAD, PAYLOAD, BUSY]
    batch.memory.set_namespace(2)
    assert batch.hold() == 0
    assert batch.results[0] == STALE
    batch.memory.set(fields.NEXT_LOOK, 0)
    assert batch.hold() == LOOK


@pytest.mark.parametrize(
    ("offset", "what"),
    [
        (24, "key"),
        (88, "digest"),
        (12, "part"),
        (16, "length"),
        (130, "parameters"),
        (224, "checksum"),
        (250, "own sum"),
    ],
)
def test_headers_that_are_not_those_of_the_index_are_corrupt(offset: int, what: str) -> None:
    """Also where they are whole: a record that somebody else wrote into the slot."""
    for whole in (False, True):
        batch = Reading(MappedMemory(), 2)
        batch.store(1, 2)
        header = batch.memory.bytes_at(22, 256)
        header[offset] ^= 1
        if whole and what not in ("parameters", "own sum"):
            header[248:256] = checksum(bytes(header[:248])).to_bytes(8, "little")
        assert batch.hold() == 1
        assert batch.results == [PAYLOAD, CORRUPT], what
        assert batch.hazarded == [21]


def test_what_changed_while_it_was_decoded_does_not_count() -> None:
    for offset, every, good in ((60, 0, 1), (500, 0, 3), (500, 1, 1)):
        batch = Reading(MappedMemory(verify_every=every), 3)
        batch.store(1, 2, 3)
        assert batch.hold() == 3
        batch.memory.bytes_at(22, 4096)[offset] ^= 1
        assert batch.verify(3) == good
        assert batch.results == [PAYLOAD, CORRUPT, BUSY] if good == 1 else [PAYLOAD] * 3


def test_where_the_session_ended_meanwhile_every_checksum_is_verified() -> None:
    batch = Reading(MappedMemory(verify_every=0), 3)
    batch.store(1, 2, 3)
    assert batch.hold() == 3
    batch.memory.bytes_at(23, 4096)[500] ^= 1
    assert batch.verify(3) == 3
    batch.memory.file[STATE_OFFSET // 8] = 2
    assert batch.verify(3) == 2


def test_the_index_tells_fidelities() -> None:
    memory = MappedMemory()
    batch = Reading(memory, 3)
    batch.store(1, 3)
    keys = np.ascontiguousarray(batch.items[:, :4])
    found = np.zeros(3, np.int64)
    find_batch(memory.context, int(keys.ctypes.data), 3, 0, int(found.ctypes.data))
    assert found.tolist() == [255, -1, 255]
    find_batch(memory.context, int(keys.ctypes.data), 3, 1, int(found.ctypes.data))
    assert found.tolist() == [-1, -1, -1]
    memory.set_namespace(2)
    find_batch(memory.context, int(keys.ctypes.data), 3, 0, int(found.ctypes.data))
    assert found.tolist() == [-1, -1, -1]
    assert int(memory.file[CONSUMED_OFFSET // 8]) == int(memory.file[HEAD_OFFSET // 8]) == 0, "no access is reported"
