from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kvstore_client.integrations.l2_adapter.workers import Results, Workers

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_a_result_is_taken_once_and_announced() -> None:
    told: list[int] = []
    results: Results[str] = Results(lambda: told.append(1))
    results.put(1, "one")
    results.put(2, "two")
    assert told == [1, 1]
    assert results.take(1) == "one"
    assert results.take(1) is None
    assert results.take_all() == {2: "two"}
    assert results.take_all() == {}


def test_every_task_that_was_taken_runs_also_where_the_end_comes_first() -> None:
    workers, begun, ran = Workers("test", 1, 60.0), threading.Event(), []

    def long(ended: Callable[[], bool]) -> None:
        begun.set()
        while not ended():
            time.sleep(0.001)
        ran.append("long")

    assert workers.submit(long)
    for number in range(5):
        assert workers.submit(lambda ended, number=number: ran.append((number, ended())))  # type: ignore[misc]
    assert begun.wait(5)
    workers.close()
    assert ran == ["long", *((number, True) for number in range(5))]
    assert not workers.submit(long)


def test_a_task_that_waited_too_long_is_told_so() -> None:
    workers, ran = Workers("test", 1, 0.05), []
    workers.submit(lambda ended: time.sleep(0.1))
    workers.submit(lambda ended: ran.append(ended()))
    while not ran:
        time.sleep(0.001)
    assert ran == [True]
    workers.close()


def test_a_task_that_fails_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    workers, ran = Workers("test", 1, 5.0), []

    def fail(ended: Callable[[], bool]) -> None:
        raise ZeroDivisionError("a bug")

    workers.submit(fail)
    workers.submit(lambda ended: ran.append(1))
    workers.close()
    assert ran == [1]
    assert "a bug" in caplog.text
