from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from kvstore.policy.prefetch import Load, LoadQueue, LoadRequest, Outcome, Urgency


@dataclass(eq=False)
class Piece:
    name: str
    home_bytes: int = 10


class Harness:
    def __init__(self) -> None:
        self.queue: LoadQueue[Piece, str] = LoadQueue()
        self.pieces: dict[str, Piece] = {}
        self.ended: list[str] = []

    def want(
        self, names: str, urgency: Urgency = Urgency.AHEAD, deadline_ns: int = 1000, session: int = 0
    ) -> LoadRequest:
        request = LoadRequest(urgency, deadline_ns, session)
        request.ended = lambda: self.ended.append(names)
        for name in names:
            self.queue.want(request, self.pieces.setdefault(name, Piece(name)), "space")
        return request

    def next(self, now_ns: int = 0) -> Load[Piece, str]:
        load = self.queue.next(now_ns)
        assert load is not None
        return load

    def begin(self, now_ns: int = 0) -> Load[Piece, str]:
        load = self.next(now_ns)
        self.queue.begin(load)
        return load

    def all(self, now_ns: int = 0) -> str:
        """Begin and end everything; in which order."""
        order = ""
        while self.queue.next(now_ns) is not None:
            load = self.begin(now_ns)
            order += load.record.name
            self.queue.end(load, Outcome.BROUGHT)
        return order

    def check_sums(self) -> None:
        waiting = [load for load in self.queue if not load.flying]
        for urgency in Urgency:
            same = [load for load in waiting if load.urgency is urgency]
            assert self.queue.waiting_bytes[urgency] == sum(load.record.home_bytes for load in same)
        assert self.queue.flying == len(self.queue) - len(waiting)


def test_queue_loads_parents_first_and_earlier_deadlines_before_later_ones() -> None:
    queue = Harness()
    queue.want("abc", deadline_ns=500)
    queue.want("xyz", deadline_ns=400)
    assert queue.all() == "xyzabc"
    assert queue.ended == ["xyz", "abc"]


def test_queue_loads_what_is_waited_for_before_all_else() -> None:
    queue = Harness()
    queue.want("ab", Urgency.WARMING, deadline_ns=1)
    queue.want("cd", Urgency.HINTED, deadline_ns=2)
    queue.want("ef", Urgency.ARRIVED, deadline_ns=3)
    queue.want("gh", Urgency.WAITED, deadline_ns=4)
    assert queue.all() == "ghefcdab"


def test_queue_loads_once_what_two_want_and_as_urgently_as_the_more_urgent() -> None:
    queue = Harness()
    queue.want("abcd")
    queue.want("xcd", Urgency.WAITED)
    assert queue.queue.merged == 2
    queue.check_sums()
    assert queue.all() == "xcdab"
    assert queue.ended == ["xcd", "abcd"]


def test_queue_tells_who_waits_for_a_load_that_was_on_its_way() -> None:
    queue = Harness()
    queue.want("a", Urgency.HINTED)
    load = queue.begin()
    waited = queue.want("a", Urgency.WAITED)
    assert (queue.queue.merged, waited.left) == (1, 1)
    assert load.urgency is Urgency.WAITED
    queue.queue.end(load, Outcome.BROUGHT)
    assert queue.ended == ["a", "a"]
    assert queue.queue.flying_bytes == 0


def test_queue_drops_what_nobody_has_time_for() -> None:
    queue = Harness()
    early, late = queue.want("ab", deadline_ns=100), queue.want("bc", deadline_ns=200)
    assert queue.next(150).record.name == "b"
    queue.check_sums()
    assert queue.all(150) == "bc"
    assert early.outcomes == {Outcome.EXPIRED: 2}
    assert late.outcomes == {Outcome.BROUGHT: 2}
    assert queue.queue.outcomes[Outcome.EXPIRED] == 2
    assert len(queue.queue) == 0


def test_queue_keeps_what_another_wants_when_a_client_is_gone() -> None:
    queue = Harness()
    gone = queue.want("abc", Urgency.WAITED, session=1)
    stays = queue.want("cd", session=2)
    first = queue.begin()
    queue.queue.cancel(gone, Outcome.CANCELLED)
    queue.check_sums()
    assert gone.outcomes == {Outcome.CANCELLED: 3}
    assert queue.ended == ["abc"]
    # What is being read is read to its end.
    queue.queue.end(first, Outcome.BROUGHT)
    assert queue.all() == "cd"
    assert stays.outcomes == {Outcome.BROUGHT: 2}
    queue.check_sums()


def test_queue_of_many_changes_of_urgency_stays_small() -> None:
    queue = Harness()
    for deadline in range(2000, 1000, -1):
        queue.want("ab", deadline_ns=deadline)
    assert len(queue.queue._order) < 200
    assert queue.all() == "ab"
    assert len(queue.ended) == 1000


def test_queue_wants_of_one_request_for_the_same_record_are_one() -> None:
    queue = Harness()
    request = queue.want("aa")
    assert (request.left, queue.queue.merged) == (1, 0)
    assert queue.all() == "a"


def test_queue_lets_requests_of_one_urgency_take_turns() -> None:
    queue = Harness()
    large = [f"l{at}" for at in range(64)]
    request = LoadRequest(Urgency.WAITED, 1000)
    for name in large:
        queue.queue.want(request, queue.pieces.setdefault(name, Piece(name)), "space")
    began = []
    for _ in range(20):
        load = queue.begin()
        began.append(load.record.name)
        queue.queue.end(load, Outcome.BROUGHT)
    # It comes later, with a later deadline, and does not wait for the other's end.
    queue.want("abcd", Urgency.WAITED, deadline_ns=2000)
    while queue.ended == []:
        load = queue.begin()
        began.append(load.record.name)
        queue.queue.end(load, Outcome.BROUGHT)
    assert [name for name in began if name.startswith("l")] == large[: len(began) - 4]
    assert len(began) <= 20 + 16 + 4
    assert request.left >= 64 - 36


def test_queue_looks_at_others_while_a_load_is_set_aside() -> None:
    queue = Harness()
    queue.want("ab", deadline_ns=1)
    queue.want("cd", deadline_ns=2)
    queue.queue.set_aside(queue.next())
    queue.queue.set_aside(queue.next())
    assert queue.next().record.name == "c"
    queue.check_sums()
    queue.queue.take_up()
    assert queue.all() == "abcd"
    assert len(queue.ended) == 2


@pytest.mark.parametrize("seed", range(4))
def test_queue_of_random_calls_tells_each_want_once_and_its_sums_are_right(seed: int) -> None:
    rng = random.Random(seed)
    harness = Harness()
    queue = harness.queue
    requests: list[tuple[LoadRequest, int]] = []
    flying: list[Load[Piece, str]] = []
    for now in range(1500):
        match rng.randrange(6):
            case 0 | 1:
                request = LoadRequest(Urgency(rng.randrange(5)), now + rng.randrange(1, 60))
                names = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randrange(1, 8))
                for name in names:
                    queue.want(request, harness.pieces.setdefault(name, Piece(name, rng.randrange(1, 9))), "space")
                requests.append((request, len(names)))
            case 2 | 3:
                load = queue.next(now)
                if load is not None and rng.random() < 0.2:
                    queue.set_aside(load)
                    load = queue.next(now)
                    if load is not None:
                        queue.begin(load)
                        flying.append(load)
                    queue.take_up()
                elif load is not None:
                    queue.begin(load)
                    flying.append(load)
            case 4 if flying:
                queue.end(flying.pop(rng.randrange(len(flying))), rng.choice([Outcome.BROUGHT, Outcome.LOST]))
            case 5 if requests:
                queue.cancel(rng.choice(requests)[0], Outcome.CANCELLED)
        harness.check_sums()
        for request, wanted in requests[-20:]:
            assert request.outcomes.total() + request.left == wanted
    for load in flying:
        queue.end(load, Outcome.BROUGHT)
    assert queue.next(10_000) is None
    assert len(queue) == 0
    assert all(request.outcomes.total() == wanted and not request.bytes for request, wanted in requests)
    assert queue.waiting_bytes == [0] * 5
