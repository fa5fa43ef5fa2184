"""Puts that wait for blocks to be written to a tier below, against a scripted daemon: which records are sent again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvstore.errors import DeadlineExceeded
from kvstore.format.record import decode_header
from kvstore.protocol.messages import Done, Persist, Persisted, Ping, PutReply, PutStatus, Reason
from kvstore.protocol.namespace import Namespace
from kvstore_client.operations import Operations
from kvstore_client.puts import DEMOTING_ANSWER, demoting_pauses, waits_for_demotion
from kvstore_client.session import Ask, Session, Steps, Told

KEYS = [bytes([number]) * 32 for number in range(1, 9)]
STORED, EXISTS = (PutStatus.STORED, Reason.NONE), (PutStatus.EXISTS, Reason.NONE)
DEMOTING = (PutStatus.THROTTLED, Reason.DEMOTING)
NO_ROOM = (PutStatus.REJECTED, Reason.NO_ROOM)
HELD = (PutStatus.THROTTLED, Reason.ALL_HELD)
Answers = list[tuple[PutStatus, Reason]]


class Daemon:
    """Answers puts with what is scripted, one list a request; ``late`` requests of a kind find the time over."""

    def __init__(self, *puts: Answers, late: Callable[[Ask], bool] = lambda ask: False) -> None:
        self.puts = list(puts)
        self.sent: list[list[bytes]] = []
        self.persisted: list[bytes] = []
        self.late = late

    def run(self, steps: Steps[list[PutStatus]]) -> list[PutStatus]:
        try:
            ask = next(steps)
            while True:
                ask = steps.throw(DeadlineExceeded("late")) if self.late(ask) else steps.send(self.told(ask))
        except StopIteration as stop:
            result: list[PutStatus] = stop.value
            return result

    def told(self, ask: Ask) -> Told:
        if ask.type is Ping:
            assert ask.pause_s > 0
            return Told(Done(1, 1), [])
        if ask.type is Persist:
            self.persisted.append(ask.fields[0])
            count = len(ask.fields[0]) // 32
            return Told(Persisted(1, 1, bytes([PutStatus.STORED]) * count, bytes(count)), [])
        self.sent.append([decode_header(frame).key for frame in ask.payloads[::2]])
        answers = self.puts.pop(0)
        return Told(PutReply(1, 1, bytes(s for s, _ in answers), bytes(r for _, r in answers), 20), [])


@pytest.fixture
def operations() -> Operations:
    session = Session(Namespace(name="n"), ())
    session.max_record_bytes = 1 << 20
    session.number = session.namespace_id = 1
    session.protocol = 4
    return Operations(session)


def put(operations: Operations, daemon: Daemon, count: int, seconds: float = 60.0, **options: bool) -> list[PutStatus]:
    chain = operations.check_chain(KEYS[:count], [b"data"] * count, None, 0, None)
    return daemon.run(operations.put_chain(chain, time.monotonic() + seconds, **options))


def test_only_what_waits_and_what_found_no_room_behind_it_is_sent_again(operations: Operations) -> None:
    daemon = Daemon(
        [EXISTS, DEMOTING, NO_ROOM, HELD, DEMOTING, STORED],
        [DEMOTING, NO_ROOM, NO_ROOM],
        [STORED, STORED, NO_ROOM],
    )
    assert put(operations, daemon, 6) == [
        PutStatus.EXISTS,
        PutStatus.STORED,
        PutStatus.STORED,
        PutStatus.THROTTLED,
        PutStatus.REJECTED,
        PutStatus.STORED,
    ]
    assert daemon.sent == [KEYS[:6], [KEYS[1], KEYS[2], KEYS[4]], [KEYS[1], KEYS[2], KEYS[4]]]


def test_no_other_answer_is_asked_for_again(operations: Operations) -> None:
    daemon = Daemon([NO_ROOM, HELD, STORED])
    assert put(operations, daemon, 3) == [PutStatus.REJECTED, PutStatus.THROTTLED, PutStatus.STORED]
    assert len(daemon.sent) == 1


def test_answers_at_the_deadline_are_the_last_ones(operations: Operations) -> None:
    daemon = Daemon([STORED, DEMOTING, NO_ROOM], [STORED, DEMOTING])
    last = [False]

    def late(ask: Ask) -> bool:
        # The second retry finds the time over, in its put.
        last[0] = len(daemon.sent) == 2 and ask.type is not Ping
        return last[0]

    daemon.late = late
    assert put(operations, daemon, 3) == [PutStatus.STORED, PutStatus.STORED, PutStatus.THROTTLED]
    assert last == [True]
    assert put(operations, Daemon([DEMOTING]), 1, seconds=0.0) == [PutStatus.THROTTLED]


def test_first_answer_that_is_late_is_an_error_as_ever(operations: Operations) -> None:
    with pytest.raises(DeadlineExceeded):
        put(operations, Daemon(late=lambda ask: True), 1)


def test_durable_is_asked_for_what_is_there_only(operations: Operations) -> None:
    daemon = Daemon([EXISTS, STORED, HELD])
    assert put(operations, daemon, 3, durable=True) == [PutStatus.STORED, PutStatus.STORED, PutStatus.THROTTLED]
    assert daemon.persisted == [b"".join(KEYS[:2])]
    late = Daemon([STORED], late=lambda ask: ask.type is Persist)
    assert put(operations, late, 1, durable=True) == [PutStatus.THROTTLED]


def test_pauses_grow_and_end_with_the_time() -> None:
    assert list(demoting_pauses(time.monotonic())) == []
    pauses = demoting_pauses(time.monotonic() + 1000)
    first = [next(pauses) for _ in range(12)]
    assert first == sorted(first)
    assert (first[0], first[-1]) == (0.002, 0.128)


def test_nothing_waits_before_the_first_that_waits() -> None:
    no_room = PutStatus.REJECTED | Reason.NO_ROOM << 8
    assert waits_for_demotion([]) == []
    assert waits_for_demotion([no_room, 1, 2]) == []
    assert waits_for_demotion([no_room, DEMOTING_ANSWER, 1, no_room]) == [1, 3]
