"""What a consumer makes of messages, given what a played daemon would answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import DeadlineExceeded, InvalidArgument
from kvstore.protocol.kv_events import (
    AllBlocksCleared,
    BlockEvent,
    BlockRemoved,
    BlockStored,
    EventBatch,
    SnapshotPage,
    encode_batch,
    heartbeat_topic,
)
from kvstore_client.events import EventConsumer

SPACE = b"n" * 32


def stored(*keys: bytes, incarnation: int = 1, parent: bytes | None = None) -> BlockStored:
    return BlockStored(list(keys), parent, namespace=SPACE, incarnation=incarnation)


def removed(*keys: bytes, incarnation: int = 1) -> BlockRemoved:
    return BlockRemoved(list(keys), namespace=SPACE, incarnation=incarnation)


class Played(EventConsumer):
    """A consumer whose daemon is played: ``pages`` are given in turn, ``ring`` is replayed."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path / "none"))
        self.pages: list[SnapshotPage] = []
        self.ring: list[tuple[int, list[BlockEvent]]] = []
        self.incarnation_now = 1
        self.asked: list[int] = []

    def _page(self, cursor: int, deadline_s: float) -> SnapshotPage:
        return self.pages.pop(0)

    def _replay(self, start: int, deadline_s: float) -> Iterator[tuple[bytes, int, bytes]]:
        self.asked.append(start)
        for number, events in self.ring:
            if number >= start:
                yield heartbeat_topic(b"", self.incarnation_now), number, encode_batch(0.0, events)

    def will_page(self, sequence: int, *events: BlockEvent, cursor: int = -1) -> None:
        self.pages.append(SnapshotPage(sequence, EventBatch(0.0, list(events)), cursor, self.incarnation_now))

    def hear(self, number: int, *events: BlockEvent, incarnation: int = 1) -> bool:
        topic = b"" if events else heartbeat_topic(b"", incarnation)
        return self._take(topic, number, EventBatch(0.0, list(events)))

    def keys(self) -> str:
        blocks = self.index.namespaces.get(SPACE, {})
        return "".join(sorted(key.decode() for key in blocks if isinstance(key, bytes)))


@pytest.fixture
def consumer(tmp_path: Path) -> Iterator[Played]:
    with Played(tmp_path) as made:
        yield made


def test_snapshot_then_batches_in_order(consumer: Played) -> None:
    consumer.will_page(7, stored(b"a", b"b"))
    assert consumer.poll() == 1
    assert (consumer.keys(), consumer.sequence, consumer.incarnation, consumer.exact) == ("ab", 7, 1, True)
    assert not consumer.hear(7, removed(b"a")), "it is in the snapshot"
    assert consumer.hear(8, stored(b"c", parent=b"b"))
    assert consumer.hear(9)
    assert consumer.hear(10, removed(b"a"))
    assert consumer.index.namespaces == {SPACE: {b"b": b"a", b"c": b"b"}}
    assert consumer.index.leading(SPACE, [b"b", b"c", b"d"]) == 2
    assert consumer.hear(11, removed(b"b", b"c"))
    assert consumer.index.namespaces == {}
    assert (consumer.gaps, consumer.replays, consumer.snapshots, consumer.asked) == (0, 0, 1, [])


def test_pages_of_different_moments_become_one_by_a_replay(consumer: Played) -> None:
    consumer.will_page(3, stored(b"a"), stored(b"b"), cursor=2)
    consumer.will_page(6, stored(b"c"), stored(b"d"))
    consumer.ring = [(4, [removed(b"a"), stored(b"d")]), (6, [removed(b"e"), stored(b"a")]), (8, [removed(b"a")])]
    consumer.poll()
    assert consumer.asked == [4]
    assert (consumer.keys(), consumer.sequence) == ("bcd", 8)


def test_clear_between_two_pages_is_no_blocks(consumer: Played) -> None:
    consumer.will_page(3, stored(b"a"), cursor=2)
    consumer.will_page(5, stored(b"x"))
    consumer.ring = [(4, [AllBlocksCleared(1)]), (5, [stored(b"x")])]
    consumer.poll()
    assert consumer.keys() == "x"


def test_gap_is_replayed_and_numbers_without_events_are_no_loss(consumer: Played) -> None:
    consumer.will_page(0)
    consumer.poll()
    consumer.ring = [(1, [stored(b"a")]), (4, [stored(b"b")])]
    assert consumer.hear(6)
    assert (consumer.keys(), consumer.sequence, consumer.replays, consumer.snapshots) == ("ab", 6, 1, 1)
    assert not consumer.hear(4, stored(b"b")), "it was replayed"


def test_gap_that_nobody_can_fill_is_a_snapshot(consumer: Played) -> None:
    consumer.will_page(0)
    consumer.poll()
    consumer.ring = [(5, [stored(b"z")])]
    consumer.will_page(6, stored(b"q"))
    consumer.hear(6, stored(b"q"))
    assert (consumer.keys(), consumer.sequence, consumer.snapshots, consumer.exact) == ("q", 6, 2, True)


def test_gap_that_another_incarnation_answers_is_a_snapshot(consumer: Played) -> None:
    consumer.will_page(0)
    consumer.poll()
    consumer.incarnation_now = 2
    consumer.ring = [(1, [stored(b"z", incarnation=2)])]
    consumer.will_page(4, stored(b"new", incarnation=2))
    consumer.hear(3, stored(b"old"))
    assert (consumer.incarnation, consumer.sequence) == (2, 4)
    assert list(consumer.index.namespaces[SPACE]) == [b"new"]


def test_restart_is_one_snapshot_however_much_was_left_of_before(consumer: Played) -> None:
    consumer.will_page(50, stored(b"a"))
    consumer.poll()
    consumer.incarnation_now = 2
    consumer.will_page(2)
    assert consumer.hear(2, incarnation=2)
    assert (consumer.keys(), consumer.incarnation) == ("", 2)
    for number in (51, 52):
        assert not consumer.hear(number, stored(b"old"))
    assert consumer.hear(3, stored(b"n", incarnation=2))
    assert (consumer.keys(), consumer.snapshots) == ("n", 2)


def test_blocks_that_change_faster_than_snapshots_are_an_error_and_the_index_stays(consumer: Played) -> None:
    consumer.will_page(0, stored(b"a"))
    consumer.poll()
    for number in range(8):
        consumer.will_page(10 + number, cursor=1)
        consumer.will_page(20 + number)
    consumer.ring = [(19, [])]
    with pytest.raises(DeadlineExceeded, match="buffer_steps"):
        consumer.hear(10, stored(b"b"))
    assert (consumer.keys(), consumer.exact, consumer.sequence) == ("a", False, 0)
    consumer.will_page(40, stored(b"c"))
    consumer.poll()
    assert (consumer.keys(), consumer.exact) == ("c", True)


@pytest.mark.parametrize("endpoint", ["tcp://*:5557", "inproc://events", "tcp://host"])
def test_endpoints_that_nobody_can_connect_to_are_refused(endpoint: str) -> None:
    with pytest.raises(InvalidArgument):
        EventConsumer("/tmp/none", events_endpoint=endpoint)
    with pytest.raises(InvalidArgument):
        EventConsumer("/tmp/none", replay_endpoint=endpoint)
