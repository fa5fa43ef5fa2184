from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvstore_client.integrations.row_tier.jobs import Finished, Jobs

pytestmark = pytest.mark.usefixtures("no_leaks")
Ended = Callable[[], bool]


@contextmanager
def jobs(threads: int = 1, most_queued: int = 100, timeout_s: float = 5.0) -> Iterator[Jobs[str]]:
    running: Jobs[str] = Jobs(threads, most_queued, timeout_s)
    try:
        yield running
    finally:
        assert running.close(5.0)


def ended(running: Jobs[str], count: int) -> list[Finished[str]]:
    finished: list[Finished[str]] = []
    end = time.monotonic() + 5.0
    while len(finished) < count:
        assert time.monotonic() < end
        finished += running.take_finished()
        time.sleep(0.001)
    return finished


class Gate:
    """A job that waits until it is let go, or told to end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self, is_over: Ended) -> str:
        self.begun.set()
        while not self.open.wait(0.002):
            if is_over():
                return "left"
        return "done"


def test_jobs_give_their_results_once() -> None:
    with jobs(2) as running:
        for number in range(10):
            assert running.submit(number, number % 2 == 0, 1, lambda _, number=number: f"r{number}")  # type: ignore[misc]
        found = ended(running, 10)
        assert {each.identity: each.result for each in found} == {number: f"r{number}" for number in range(10)}
        assert {each.identity: each.is_load for each in found} == {number: number % 2 == 0 for number in range(10)}
        assert running.take_finished() == []
        assert running.pending() == 0


def test_loads_go_before_stores() -> None:
    gate = Gate()
    order: list[int] = []
    with jobs() as running:
        running.submit(0, False, 1, gate)
        gate.begun.wait(5.0)
        for number, is_load in ((1, False), (2, False), (3, True), (4, True)):
            running.submit(number, is_load, 1, lambda _, number=number: order.append(number) or "")  # type: ignore[func-returns-value, misc]
        gate.open.set()
        ended(running, 5)
    assert order == [3, 4, 1, 2]


def test_stores_beyond_the_queue_are_not_taken() -> None:
    gate = Gate()
    with jobs(most_queued=10) as running:
        running.submit(0, False, 50, gate)
        gate.begun.wait(5.0)
        assert running.submit(1, False, 20, lambda _: "alone")
        assert not running.submit(2, False, 1, lambda _: "")
        assert running.submit(3, True, 50, lambda _: "load")
        gate.open.set()
        assert {each.identity for each in ended(running, 3)} == {0, 1, 3}
        assert running.submit(4, False, 10, lambda _: "")
        ended(running, 1)


def test_a_job_whose_time_is_over_never_begins_and_a_running_one_is_told() -> None:
    gate = Gate()
    with jobs(timeout_s=0.05) as running:
        running.submit(0, True, 1, gate)
        running.submit(1, True, 1, lambda _: "late")
        assert [(each.identity, each.result) for each in ended(running, 2)] == [(0, "left"), (1, None)]


def test_drain_cancels_what_waits_and_waits_for_what_runs() -> None:
    gate = Gate()
    with jobs() as running:
        running.submit(0, True, 1, gate)
        gate.begun.wait(5.0)
        running.submit(1, False, 1, lambda _: "never")
        assert running.drain(5.0)
        assert {each.identity: each.result for each in running.take_finished()} == {0: "left", 1: None}
        running.submit(2, False, 1, lambda _: "again")
        assert ended(running, 1)[0].result == "again"


def test_drain_of_a_job_that_does_not_end_says_so_in_time() -> None:
    begun, release = threading.Event(), threading.Event()

    def stubborn(_: Ended) -> str:
        begun.set()
        return str(release.wait(10.0))

    with jobs() as running:
        running.submit(0, True, 1, stubborn)
        assert begun.wait(5.0)
        begin = time.monotonic()
        assert not running.drain(0.1)
        assert not running.close(0.1)
        assert time.monotonic() - begin < 2.0
        release.set()


def test_a_job_that_raises_is_one_without_a_result(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Ended) -> str:
        raise ValueError("broken")

    with jobs() as running:
        running.submit(0, True, 1, fail)
        running.submit(1, True, 1, lambda _: "next")
        assert [each.result for each in ended(running, 2)] == [None, "next"]
    assert "job 0 failed" in caplog.text


def test_a_closed_queue_takes_nothing() -> None:
    with jobs() as running:
        assert running.close(5.0)
        assert not running.submit(0, True, 1, lambda _: "")
        running.fail(0, True, "told")
        assert running.take_finished() == [Finished(0, True, "told", 0.0)]
