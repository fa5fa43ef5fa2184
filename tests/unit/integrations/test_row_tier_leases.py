from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kvstore.errors import DaemonUnavailable, Throttled
from kvstore_client.integrations.row_tier.counters import Counters
from kvstore_client.integrations.row_tier.leases import Leases

pytestmark = pytest.mark.usefixtures("no_leaks")
KEYS = [bytes([number]) * 32 for number in range(1, 9)]


class Matching:
    """A client that has some blocks."""

    def __init__(self) -> None:
        self.there = set(KEYS)
        self.held: dict[int, list[bytes]] = {}
        self.touched: list[list[bytes]] = []
        self.error: Exception | None = None
        self.numbers = iter(range(1, 1000))

    def match(self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool = False) -> Any:
        if self.error is not None:
            raise self.error
        present = [key in self.there for key in keys]
        hits = present.index(False) if False in present else len(present)
        if lease is None:
            self.touched.append(list(keys))
        number = next(self.numbers) if lease and hits else 0
        if number:
            self.held[number] = list(keys[:hits])

        class Found:
            def __init__(self, held: dict[int, list[bytes]]) -> None:
                self.hits, self.lease, self._held = hits, number, held

            def release(self) -> None:
                del self._held[self.lease]

        return Found(self.held)


class Setup:
    def __init__(self) -> None:
        self.client: Matching | None = Matching()
        self.matching = self.client
        self.errors: list[BaseException] = []
        self.counters = Counters()
        self.leases = Leases(lambda: self.client, self.errors.append, self.counters, 5.0)


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    assert made.leases.close(5.0)


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_leases_are_held_until_they_are_released(setup: Setup) -> None:
    setup.leases.promise("r", KEYS[:3])
    setup.leases.promise("r", KEYS[3:5])
    setup.leases.promise("s", KEYS[5:])
    wait(lambda: len(setup.matching.held) == 3)
    setup.leases.release("r")
    wait(lambda: list(setup.matching.held.values()) == [KEYS[5:]])
    setup.leases.release("s")
    wait(lambda: not setup.matching.held)
    assert setup.counters.take() == {("leases", ("taken",)): 3.0}


def test_a_block_that_went_is_passed_over(setup: Setup) -> None:
    setup.matching.there -= {KEYS[0], KEYS[4]}
    setup.leases.promise("r", KEYS)
    wait(lambda: sorted(setup.matching.held.values()) == [KEYS[1:4], KEYS[5:]])


def test_touched_blocks_are_matched_without_a_lease(setup: Setup) -> None:
    setup.leases.touch(KEYS[:2])
    setup.leases.touch([])
    wait(lambda: setup.matching.touched == [KEYS[:2]])
    assert not setup.matching.held


def test_errors_are_told_and_do_not_end_the_thread(setup: Setup) -> None:
    setup.matching.error = DaemonUnavailable("gone")
    setup.leases.promise("r", KEYS)
    wait(lambda: setup.errors)
    setup.matching.error = Throttled("too many")
    setup.leases.promise("r", KEYS)
    wait(lambda: ("leases", ("throttled",)) in setup.counters.take())
    setup.matching.error = None
    setup.client = None
    setup.leases.promise("r", KEYS)
    setup.leases.release("r")
    setup.client = setup.matching
    setup.leases.promise("s", KEYS)
    wait(lambda: setup.matching.held)
    assert len(setup.errors) == 1


def test_without_a_lease_time_nothing_is_leased() -> None:
    client = Matching()
    leases = Leases(lambda: client, lambda error: None, Counters(), 0.0)
    leases.promise("r", KEYS)
    leases.touch(KEYS[:1])
    wait(lambda: client.touched)
    assert leases.close(5.0)
    assert not client.held
