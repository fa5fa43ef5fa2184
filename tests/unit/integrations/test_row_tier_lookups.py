from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from kvstore_client.integrations.row_tier.lookups import Answer, Lookups

pytestmark = pytest.mark.usefixtures("no_leaks")
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


class Asked:
    """Says what is there, when it is let."""

    def __init__(self) -> None:
        self.there = {A}
        self.batches: list[list[bytes]] = []
        self.open = threading.Event()
        self.open.set()
        self.broken = False

    def __call__(self, keys: Sequence[bytes]) -> list[bool]:
        self.batches.append(list(keys))
        assert self.open.wait(5.0)
        if self.broken:
            raise ConnectionError("gone")
        return [key in self.there for key in keys]


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def lookups(asked: Asked) -> Iterator[Lookups]:
    running = Lookups(asked)
    yield running
    asked.open.set()
    assert running.close(5.0)


def settle(lookups: Lookups) -> None:
    end = time.monotonic() + 5.0
    lookups.flush()
    while lookups.pending():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_answers_come_after_a_flush_in_one_batch(lookups: Lookups, asked: Asked) -> None:
    assert [lookups.look_up(key, "r") for key in (A, B, A)] == [Answer.LATER] * 3
    assert asked.batches == []
    assert lookups.pending()
    settle(lookups)
    assert [lookups.look_up(key, "r") for key in (A, B)] == [Answer.HIT, Answer.MISS]
    lookups.flush()
    assert asked.batches == [[A, B]]


def test_an_answer_is_kept_as_long_as_a_request_wants_it(lookups: Lookups, asked: Asked) -> None:
    lookups.look_up(A, "r")
    lookups.look_up(A, "s")
    settle(lookups)
    asked.there.clear()
    lookups.forget("r")
    assert lookups.look_up(A, "s") is Answer.HIT
    lookups.forget("s")
    lookups.forget("unknown")
    assert lookups.look_up(A, "t") is Answer.LATER
    settle(lookups)
    assert lookups.look_up(A, "t") is Answer.MISS


def test_an_answer_that_comes_after_its_request_is_nobodys(lookups: Lookups, asked: Asked) -> None:
    asked.open.clear()
    lookups.look_up(A, "r")
    lookups.flush()
    lookups.forget("r")
    asked.there.clear()
    assert lookups.look_up(A, "s") is Answer.LATER
    asked.open.set()
    settle(lookups)
    assert lookups.look_up(A, "s") is Answer.MISS
    assert asked.batches == [[A], [A]]


def test_what_cannot_be_asked_is_a_miss(lookups: Lookups, asked: Asked) -> None:
    asked.broken = True
    lookups.look_up(A, "r")
    settle(lookups)
    assert lookups.look_up(A, "r") is Answer.MISS


def test_nothing_waits_for_a_slow_answer(lookups: Lookups, asked: Asked) -> None:
    asked.open.clear()
    begin = time.monotonic()
    for _ in range(100):
        assert lookups.look_up(C, "r") is Answer.LATER
        lookups.flush()
    assert time.monotonic() - begin < 1.0
    assert lookups.pending()
