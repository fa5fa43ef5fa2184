"""A client that writes nonsense into the memory it shares with the daemon harms nobody but itself."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from daemon_process import DaemonProcess, wait_until
from mapped_peer import RECORD, MappedPeer, entry_of

from kvstore.errors import ErrorCode
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.record import encode_header, raw_header
from kvstore.mapped.client_file import (
    AWAKE_OFFSET,
    CONSUMED_OFFSET,
    GRANT_OFFSET,
    HAZARD_OFFSET,
    LANE_COUNT,
    LANE_GRANTS,
    LANE_OFFSET,
    RING_OFFSET,
    RING_RECORDS,
    RingKind,
)
from kvstore.protocol.messages import Bye, Ping, Put, PutReply, PutStatus, Reason
from kvstore_client import Client

Where = Callable[[int], tuple[int, int]]
BAD = (PutStatus.REJECTED, Reason.BAD_RECORD)
HUGE = [-1, -(2**63), 2**63 - 1, 2**52, 2**52 + 513, 2**31, 2**32 + 513]
"""Slots that no arena has; times the page size some of them wrap around to one that it has."""

ENDS = ("ring_refused", "hazards_refused", "corrupt_record")


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    settings = ("--slab", "256KiB", "--set", "limits.grant_bytes_per_session=512KiB")
    with DaemonProcess(*settings, capacity="4MiB", grant="2MiB", expected_errors=ENDS) as daemon:
        yield daemon


@pytest.fixture
def honest(daemon: DaemonProcess) -> Iterator[Client]:
    """Finds out afterwards whether everything is as it should be."""
    with daemon.connect(namespace="honest", mapped=True, timeout=20.0) as client:
        client.clear()
        for number in range(10):
            assert client.put(key(number), bytes([number]) * 5000) is PutStatus.STORED
        yield client
        serves(client)
        wait_until(lambda: len(client.stats().sessions) == 1, 5.0)
        assert client.verify().problems == []
        client.clear()

        def nothing_is_held() -> bool:
            stats = client.stats()
            mine = stats.sessions[0].granted_bytes
            return stats.dram.granted_bytes == mine and stats.dram.limbo_bytes == 0

        wait_until(nothing_is_held, 5.0)


@pytest.fixture
def peer(daemon: DaemonProcess, honest: Client, stack: ExitStack) -> MappedPeer:
    return stack.enter_context(MappedPeer(daemon.endpoint)).join("hostile")


def serves(client: Client) -> None:
    """The honest client finds what it put, and can put more."""
    for number in range(10):
        assert client.get(key(number)) == bytes([number]) * 5000
    assert client.put(key(11), b"more") is PutStatus.STORED
    assert client.remove([key(11)]) == 1


@pytest.fixture
def where(daemon: DaemonProcess) -> Where:
    """Gives slot and sequence of a block of the honest client."""
    return lambda number: entry_of(daemon.arena_directory, key(number))


def record(peer: MappedPeer, number: int, payload: bytes, **changes: object) -> bytes:
    described = {"key": key(number), "parent_key": bytes(32), "namespace_digest": peer.digest, "part": 0} | changes
    return encode_header(raw_header(payload=payload, **described))  # type: ignore[arg-type]


def granted(peer: MappedPeer, record_bytes: int = 5256) -> tuple[int, int]:
    """A slot that was lent to the peer, and its size."""
    reserved = peer.reserve(record_bytes)
    slot = peer.claim()
    assert slot
    return slot, reserved.slot_bytes


BROKEN: dict[str, Callable[[MappedPeer], None]] = {
    "head negative": lambda peer: setattr(peer, "head", -1),
    "head smallest": lambda peer: setattr(peer, "head", -(2**63)),
    "head too far": lambda peer: setattr(peer, "head", peer.consumed + RING_RECORDS + 1),
    "head largest": lambda peer: setattr(peer, "head", 2**63 - 1),
    "kind 0": lambda peer: peer.push(0),  # type: ignore[dict-item]
    "kind unknown": lambda peer: peer.push(6),  # type: ignore[dict-item]
    "kind 255": lambda peer: peer.push(255),  # type: ignore[dict-item]
    "too many continuations": lambda peer: peer.push(RingKind.GET, following=9),  # type: ignore[dict-item]
    "255 continuations": lambda peer: peer.push(RingKind.MATCH, following=255, named=255),  # type: ignore[dict-item]
    "more keys than continuations": lambda peer: peer.push(  # type: ignore[dict-item]
        RingKind.GET, following=1, named=3, keys=bytes(64)
    ),
    "continuations that are not there": lambda peer: peer.push(RingKind.MATCH, following=2, named=4),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_ring_that_cannot_be_one_ends_its_session_and_no_other(
    honest: Client, peer: MappedPeer, daemon: DaemonProcess, what: str
):
    slot, slot_bytes = granted(peer)
    peer.fill(slot, slot_bytes, record(peer, 1, b"x"), b"x")
    BROKEN[what](peer)
    error = peer.error(Ping)
    assert (error.code, peer.over) == (ErrorCode.UNKNOWN_SESSION, True)
    assert any(event["event"] == "ring_refused" for event in daemon.events())
    stats = honest.stats()
    assert len(stats.sessions) == 1
    serves(honest)
    # It may greet again, as any client whose session is over.
    peer.close()
    with MappedPeer(daemon.endpoint) as again:
        again.join("hostile").drained()
        again.send(again.request(Bye))


@pytest.mark.parametrize("what", ["head negative", "kind unknown"])
def test_ring_that_cannot_be_one_is_found_by_the_doorbell_and_by_others_puts(
    honest: Client, peer: MappedPeer, daemon: DaemonProcess, what: str
):
    BROKEN[what](peer)
    peer.ring()
    wait_until(lambda: peer.over, 2.0)
    with MappedPeer(daemon.endpoint) as another, daemon.connect(mapped=False) as sender:
        another.join("hostile")
        BROKEN[what](another)
        assert sender.put(key(1), b"x") is PutStatus.STORED
        assert another.over
        reply = another.ask(Put, 1, payloads=[record(another, 1, b"x"), b"x"])
        assert not isinstance(reply, PutReply)
        sender.clear()


def test_commits_of_slots_that_were_not_lent_are_rejected_and_touch_nothing(
    where: Where, honest: Client, peer: MappedPeer, daemon: DaemonProcess
):
    with MappedPeer(daemon.endpoint) as other:
        other.join("other")
        lent_to_other, _ = granted(other)
        resident = [where(number)[0] for number in range(10)]
        end = peer.arena_bytes // PAGE_BYTES
        for slot in [0, 1, *resident, lent_to_other, end, end - 1, end + 1, *HUGE]:
            number = peer.push(RingKind.COMMIT, slot=slot)
            peer.drained()
            assert peer.answer(number) == BAD, slot
            peer.push(RingKind.RETURN, slot=slot)
            peer.drained()
        assert [where(number)[0] for number in range(10)] == resident
        other.fill(lent_to_other, 8192, record(other, 7, b"mine"), b"mine")
        number = other.push(RingKind.COMMIT, slot=lent_to_other)
        other.drained()
        assert other.answer(number) == (PutStatus.STORED, Reason.NONE)
        other.send(other.request(Bye))


def test_commits_of_headers_that_are_wrong_are_rejected_and_give_the_slot_back(honest: Client, peer: MappedPeer):
    payload = b"x" * 5000
    good = record(peer, 1, payload)
    stranger = honest._session.digest
    cases: list[tuple[bytes, dict[str, int], Reason]] = [
        (bytes(256), {}, Reason.BAD_RECORD),
        (b"\xff" * 256, {}, Reason.BAD_RECORD),
        (good[:-1] + bytes([good[-1] ^ 1]), {}, Reason.BAD_RECORD),
        (good[:30] + bytes([good[30] ^ 1]) + good[31:], {}, Reason.BAD_RECORD),
        (record(peer, 1, payload, namespace_digest=stranger), {}, Reason.BAD_RECORD),
        (record(peer, 1, payload, part=1), {}, Reason.BAD_PART),
        (record(peer, 1, payload, part=65_535), {}, Reason.BAD_PART),
        (record(peer, 1, b"x" * 50_000), {}, Reason.BAD_RECORD),
        (good, {"namespace": honest._session.namespace_id}, Reason.BAD_RECORD),
        (good, {"namespace": 0}, Reason.BAD_RECORD),
        (good, {"namespace": 65_535}, Reason.BAD_RECORD),
    ]
    for header, changes, reason in cases:
        slot, slot_bytes = granted(peer)
        peer.fill(slot, slot_bytes, header, payload)
        number = peer.push(RingKind.COMMIT, slot=slot, **changes)
        peer.drained()
        assert peer.answer(number) == (PutStatus.REJECTED, reason), (header[:40], changes)
        number = peer.push(RingKind.COMMIT, slot=slot)
        peer.fill(slot, slot_bytes, good, payload)
        peer.drained()
    slot, slot_bytes = granted(peer)
    peer.fill(slot, slot_bytes, record(peer, 2, payload), payload)
    first, second = (peer.push(RingKind.COMMIT, slot=slot) for _ in range(2))
    peer.drained()
    assert [peer.answer(number) for number in (first, second)] == [(PutStatus.STORED, Reason.NONE), BAD]
    assert honest.stats().puts.reasons["bad_record"] > 10
    peer.send(peer.request(Bye))


def test_header_that_changes_while_it_is_committed_is_taken_as_it_was_once(honest: Client, peer: MappedPeer):
    """The daemon decides on a copy. What its client does to its own block afterwards is its client's loss."""
    payload = b"x" * 100
    headers = [record(peer, number, payload) for number in (1, 2)] + [bytes(256)]
    slots = []
    while slot := (peer.claim() or (peer.reserve(356) and peer.claim())):
        slots.append(slot)
        if len(slots) == 200:
            break
    stop = threading.Event()

    def change() -> None:
        turn = 0
        while not stop.is_set():
            for slot in slots:
                peer.arena[slot * PAGE_BYTES : slot * PAGE_BYTES + 256] = headers[turn % 3]
            turn += 1

    thread = threading.Thread(target=change)
    thread.start()
    told = set()
    for slot in slots:
        number = peer.push(RingKind.COMMIT, slot=slot)
        peer.drained()
        told.add(peer.answer(number)[0])
    stop.set()
    thread.join()
    assert told <= {PutStatus.STORED, PutStatus.EXISTS, PutStatus.REJECTED}
    honest.verify()
    serves(honest)
    peer.send(peer.request(Bye))


def test_reports_and_suspicions_that_lie_change_nothing(where: Where, honest: Client, peer: MappedPeer):
    slot, sequence = where(3)
    for kind in (RingKind.GET, RingKind.MATCH):
        for place in (0, slot, slot + 1, peer.arena_bytes, *HUGE):
            for hits in (0, 1, 2**32 - 1):
                told = {"slot": place, "sequence": sequence, "hits": hits, "asked": 2**32 - 1, "access": -(2**63)}
                peer.push(kind, nbytes=2**62, later=1, **told)
                peer.push(kind, namespace=65_535, following=1, named=2, keys=b"\xff" * 64, **told)
                # Keys that look like commits are keys.
                peer.push(
                    kind, following=1, named=2, keys=RECORD.pack(1, 0, 0, 0, 1, 0, 0, slot, 0, 0, 0, 0, 0), **told
                )
    for place in (0, slot, slot + 1, peer.arena_bytes, *HUGE):
        for told_sequence in (sequence, 0, -1):
            peer.push(RingKind.SUSPECT, slot=place, sequence=told_sequence)
    peer.drained()
    assert honest.stats().eviction.corrupt_records == 0
    assert where(3) == (slot, sequence)
    peer.send(peer.request(Bye))


def test_suspicion_of_a_damaged_block_is_looked_into(where: Where, honest: Client, peer: MappedPeer):
    slot, sequence = where(3)
    peer.arena[slot * PAGE_BYTES + 300] ^= 1
    peer.push(RingKind.SUSPECT, slot=slot, sequence=sequence)
    peer.drained()
    assert honest.get(key(3)) is None
    assert honest.put(key(3), bytes([3]) * 5000) is PutStatus.STORED
    peer.send(peer.request(Bye))


def test_so_many_suspicions_keep_nobody_waiting():
    """Each would cost a pass over the block."""
    with (
        DaemonProcess("--slab", "8MiB", capacity="32MiB", grant="16MiB") as daemon,
        daemon.connect(mapped=False, timeout=20.0) as client,
        MappedPeer(daemon.endpoint) as peer,
    ):
        assert client.put(key(1), b"z" * 8_000_000) is PutStatus.STORED
        peer.join("hostile")
        slot, sequence = entry_of(daemon.arena_directory, key(1))
        for _ in range(RING_RECORDS - 10):
            peer.push(RingKind.SUSPECT, slot=slot, sequence=sequence)
        begin = time.monotonic()
        peer.drained()
        assert time.monotonic() - begin < 0.5
        assert client.exists([key(1)]) == [True]


def test_hazards_that_name_anything_hold_no_more_than_their_limit(
    where: Where, honest: Client, peer: MappedPeer, daemon: DaemonProcess
):
    words = peer.words[HAZARD_OFFSET // 8 : HAZARD_OFFSET // 8 + 64]
    words[: len(HUGE)] = HUGE
    words[len(HUGE)] = peer.arena_bytes // PAGE_BYTES + 1
    assert honest.remove([key(9)]) == 1
    assert honest.stats().dram.limbo_bytes == 0
    assert honest.put(key(9), bytes([9]) * 5000) is PutStatus.STORED
    # What it may hold for a while others wait for.
    words[:] = 0
    words[0] = where(9)[0] + 1
    assert honest.remove([key(9)]) == 1
    assert honest.stats().dram.limbo_bytes == 8192
    words[0] = 0
    wait_until(lambda: honest.stats().dram.limbo_bytes == 0, 3.0)
    assert honest.put(key(9), bytes([9]) * 5000) is PutStatus.STORED
    numbers = range(100, 112)
    for number in numbers:
        assert honest.put(key(number), b"h" * 200_000) is PutStatus.STORED
    words[: len(numbers)] = [where(number)[0] + 1 for number in numbers]
    assert honest.remove([key(number) for number in numbers]) == len(numbers)
    assert honest.stats().dram.limbo_bytes > 2 << 20
    wait_until(lambda: peer.over, 3.0)
    wait_until(lambda: honest.stats().dram.limbo_bytes == 0, 3.0)
    assert any(event["event"] == "hazards_refused" for event in daemon.events())


def test_lanes_and_other_words_that_are_garbage_cost_their_client_its_slots_alone(
    honest: Client, peer: MappedPeer, daemon: DaemonProcess
):
    draw = random.Random(3)
    with daemon.connect(namespace="sender", mapped=False) as sender:
        for turn in range(60):
            for lane in range(LANE_COUNT):
                peer.reserve(draw.choice([300, 5000, 20_000, 70_000]), lane)
            begin, end = draw.choice(
                [
                    (LANE_OFFSET, LANE_OFFSET + 1024),
                    (GRANT_OFFSET, GRANT_OFFSET + 8 * LANE_COUNT * LANE_GRANTS),
                    (CONSUMED_OFFSET, CONSUMED_OFFSET + 64),
                    (AWAKE_OFFSET, AWAKE_OFFSET + 64),
                    (0, 128),
                    (RING_OFFSET, RING_OFFSET + 4096),
                ]
            )
            peer.file[begin:end] = draw.choice([bytes, draw.randbytes, lambda size: b"\xff" * size])(end - begin)
            assert sender.put(key(turn), bytes([turn]) * 60_000) is PutStatus.STORED
            assert sender.get(key(turn)) == bytes([turn]) * 60_000
            stats = sender.stats()
            assert stats.dram.granted_bytes <= 2 << 20
        sender.clear()
    serves(honest)
