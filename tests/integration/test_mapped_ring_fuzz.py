"""Thousands of random records in rings, words in hazards, lanes and headers: the daemon serves on and leaks nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

from daemon_process import DaemonProcess, wait_until
from mapped_peer import MappedPeer, entry_of

from kvstore.format.constants import PAGE_BYTES
from kvstore.format.record import encode_header, raw_header
from kvstore.mapped.client_file import (
    AWAKE_OFFSET,
    CONSUMED_OFFSET,
    DROPPED_REPORTS_OFFSET,
    FLAGS_OFFSET,
    GRANT_OFFSET,
    HAZARD_OFFSET,
    LANE_COUNT,
    LANE_GRANTS,
    LANE_OFFSET,
    RingKind,
)
from kvstore.protocol.messages import Bye, Done, Flush, Ping, Remove, Reserve
from kvstore_client import Client, PutStatus

ROUNDS = 120
RECORDS = 40
WORDS = [
    *[(HAZARD_OFFSET + 8 * number, 8) for number in range(64)],
    *[(LANE_OFFSET + 64 * number, 16) for number in range(2 * LANE_COUNT)],
    (GRANT_OFFSET, 8 * LANE_COUNT * LANE_GRANTS),
    (CONSUMED_OFFSET, 8),
    (AWAKE_OFFSET, 8),
    (FLAGS_OFFSET, 8),
    (DROPPED_REPORTS_OFFSET, 8),
]


def key(number: int) -> bytes:
    return (number + 1).to_bytes(4, "big") * 8


class Hostile:
    """One peer and what it knows: its own slots, those of others."""

    def __init__(self, peer: MappedPeer, draw: random.Random, others: list[int]) -> None:
        self.peer = peer
        self.draw = draw
        self.others = others
        self.own: list[int] = []
        self.written = 0

    def any_slot(self) -> int:
        draw = self.draw
        return draw.choice(
            [
                *self.own[-3:],
                draw.choice(self.others),
                draw.randrange(self.peer.arena_bytes // PAGE_BYTES + 2),
                draw.randrange(-(2**63), 2**63),
            ]
        )

    def fill(self, slot: int) -> None:
        """A header, mostly a right one, into a slot that was lent."""
        draw, payload = self.draw, self.draw.randbytes(self.draw.randrange(1, 4000))
        digest = self.peer.digest if draw.random() < 0.9 else draw.randbytes(32)
        parent = key(draw.randrange(1000, 1020)) if draw.random() < 0.5 else bytes(32)
        part = 0 if draw.random() < 0.9 else draw.randrange(65_536)
        mine = key(draw.randrange(1000, 1040))
        if mine == parent:
            parent = bytes(32)
        header = bytearray(
            encode_header(raw_header(key=mine, parent_key=parent, namespace_digest=digest, part=part, payload=payload))
        )
        if draw.random() < 0.2:
            header[draw.randrange(256)] ^= 1 << draw.randrange(8)
        self.peer.fill(slot, 8192, bytes(header), payload)

    def record(self) -> None:
        """Publish one record."""
        draw, peer = self.draw, self.peer
        self.written += 1
        kind = draw.choices([*RingKind, draw.randrange(256)], [8, 2, 3, 3, 1, 0.03])[0]
        if kind == RingKind.COMMIT and draw.random() < 0.7:
            slot = peer.claim(draw.randrange(2)) & 0xFFFF_FFFF
            if 0 < slot < peer.arena_bytes // PAGE_BYTES - 2 and slot not in self.others:
                self.own.append(slot)
                self.fill(slot)
                peer.push(kind, slot=slot, access=draw.choice([0, 0, 1, 2]))
                return
        wild = draw.random() < 0.1
        following = draw.choice([0, 0, 1, 2, 8])
        peer.push(
            kind,
            following=following if kind in (RingKind.MATCH, RingKind.GET) else 0,
            named=2 * following if not wild else draw.randrange(2 * following + 1),
            part=draw.randrange(65_536) if wild else 0,
            namespace=draw.randrange(65_536) if wild else None,
            asked=draw.choice([1, 20, 2**32 - 1]),
            hits=draw.choice([0, 1, 20, 2**32 - 1]),
            slot=self.any_slot(),
            sequence=draw.choice([0, 2, 4, draw.randrange(-(2**63), 2**63)]),
            access=draw.choice([0, 1, draw.randrange(-(2**63), 2**63)]),
            nbytes=draw.choice([0, 4096, 2**63 - 1, -(2**63)]),
            later=draw.choice([0, 0, 1, -1]),
            keys=draw.randbytes(64 * following) if kind in (RingKind.MATCH, RingKind.GET) else b"",
        )

    def words(self) -> None:
        """Garbage into words that the daemon reads."""
        draw = self.draw
        for offset, length in draw.sample(WORDS, 3):
            low = draw.randrange(1, self.peer.arena_bytes // PAGE_BYTES).to_bytes(8, "little")
            self.peer.file[offset : offset + length] = draw.choice(
                [bytes(length), b"\xff" * length, draw.randbytes(length), (low * length)[:length]]
            )


def test_random_records_and_words_of_hostile_clients_harm_nobody():
    settings = ("--slab", "256KiB", "--set", "limits.grant_bytes_per_session=512KiB")
    expected = ("ring_refused", "hazards_refused", "corrupt_record")
    with DaemonProcess(*settings, capacity="4MiB", grant="2MiB", expected_errors=expected) as daemon:
        with (
            daemon.connect(namespace="honest", mapped=True, timeout=20.0) as mapped,
            daemon.connect(namespace="honest", mapped=False, timeout=20.0) as sent,
        ):
            drive(daemon, mapped, sent)
            # Everything that was ever lent or held is back, or about to be: deaths are seen within a second.
            wait_until(lambda: len(mapped.stats().sessions) == 2, 5.0)
            mapped.verify()
            assert mapped.verify().problems == []
            mapped.clear()

            def nothing_is_held() -> bool:
                stats = mapped.stats()
                lent = sum(session.granted_bytes for session in stats.sessions)
                return stats.dram.granted_bytes == lent and stats.dram.limbo_bytes == 0

            wait_until(nothing_is_held, 5.0)
        with daemon.connect(mapped=False) as last:
            wait_until(lambda: last.stats().dram.granted_bytes == 0, 5.0)
        assert [event for event in daemon.events() if event["event"] == "ring_refused"]


def drive(daemon: DaemonProcess, mapped: Client, sent: Client) -> None:
    draw = random.Random(7)
    for number in range(20):
        assert sent.put(key(number), bytes([number]) * 5000) is PutStatus.STORED
    others = [entry_of(daemon.arena_directory, key(number))[0] for number in range(20)]
    written = ended = 0
    hostile: Hostile | None = None
    for turn in range(ROUNDS):
        if hostile is None:
            peer = MappedPeer(daemon.endpoint).join(f"hostile-{turn % 3}")
            hostile = Hostile(peer, draw, others)
        peer = hostile.peer
        for lane in range(2):
            peer.send(peer.request(Reserve, 5000, lane))
        peer.settle()
        for _ in range(RECORDS):
            if peer.head - peer.consumed > 1500 or peer.consumed > peer.head:
                break
            hostile.record()
        if turn % 3 == 2:
            hostile.words()
        ask: list[Callable[[], object]] = [
            lambda peer=peer: peer.ask(Ping),
            lambda peer=peer: peer.ask(Flush),
            lambda peer=peer: peer.ask(Remove, key(1001) + key(1002)),
            peer.ring,
        ]
        told = draw.choice(ask)()
        assert told is None or told is not None
        number = draw.randrange(20)
        assert mapped.get(key(number)) in (bytes([number]) * 5000, None)
        found = sent.get(key(number))
        assert found in (bytes([number]) * 5000, None)
        if found is None:
            sent.put(key(number), bytes([number]) * 5000)
        assert mapped.put(key(100 + turn), bytes([turn]) * 9000) in (PutStatus.STORED, PutStatus.THROTTLED)
        assert mapped.stats().lookups.get_keys >= 0
        if peer.over or not isinstance(peer.ask(Ping), Done) or draw.random() < 0.05:
            ended += peer.over
            written += hostile.written
            if not peer.over and draw.random() < 0.5:
                peer.send(peer.request(Bye))
            peer.close()
            hostile = None
    if hostile is not None:
        written += hostile.written
        hostile.peer.close()
    assert written > ROUNDS * RECORDS // 4
    assert ended > 2
