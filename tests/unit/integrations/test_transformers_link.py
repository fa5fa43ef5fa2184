"""A store that may be away."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvstore.errors import ConnectionLost, DaemonUnavailable, ForkedClient, InvalidArgument, Throttled
from kvstore_client.integrations import absence
from kvstore_client.integrations.transformers_cache import link as module
from kvstore_client.integrations.transformers_cache.link import StoreLink


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Daemon:
    """Something to connect to."""

    def __init__(self, *, there: bool) -> None:
        self.there = there
        self.attempts = 0

    def connect(self) -> Any:
        self.attempts += 1
        if not self.there:
            raise DaemonUnavailable("no daemon")
        return self


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(absence, "time", clock := Clock())
    return clock


def work(store: Any) -> str:
    if not store.there:
        raise ConnectionLost("gone")
    return "done"


def test_a_store_that_is_required_must_be_there() -> None:
    with pytest.raises(DaemonUnavailable):
        StoreLink(Daemon(there=False).connect, required=True)
    assert StoreLink(Daemon(there=True).connect, required=True).attempt(work) == "done"


@pytest.mark.parametrize("required", [True, False])
def test_what_is_wrong_is_always_an_error(required: bool) -> None:
    def wrong(*_: Any) -> Any:
        raise InvalidArgument("wrong")

    with pytest.raises(InvalidArgument):
        StoreLink(wrong, required=required)
    link = StoreLink(Daemon(there=True).connect, required=required)
    with pytest.raises(InvalidArgument):
        link.attempt(wrong)

    def forked(_: Any) -> Any:
        raise ForkedClient("forked")

    with pytest.raises(ForkedClient):
        link.attempt(forked)


def test_one_that_is_away_is_asked_now_and_then_and_spoken_of_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kvstore_client")
    daemon = Daemon(there=False)
    link = StoreLink(daemon.connect, required=False)
    for _ in range(100):
        assert link.attempt(work) is None
    assert (daemon.attempts, link.missed, link.store) == (1, 100, None)
    clock.now = module.PAUSE_S
    assert link.attempt(work) is None
    assert daemon.attempts == 2
    daemon.there = True
    assert link.attempt(work) is None
    clock.now = 2 * module.PAUSE_S
    assert link.attempt(work) == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "going on without the store, which is tried again after 5 s: no daemon",
        "the store is there again",
    ]
    daemon.there = False
    assert link.attempt(work) is None
    assert caplog.records[-1].getMessage().endswith(": gone")
    assert len(caplog.records) == 3


def test_a_busy_store_is_there(clock: Clock) -> None:
    link = StoreLink(Daemon(there=True).connect, required=True)

    def busy(_: Any) -> Any:
        raise Throttled("later")

    assert link.attempt(busy) is None
    assert link.attempt(work) == "done"
    assert link.missed == 1
