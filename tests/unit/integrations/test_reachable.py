from __future__ import annotations

import logging

import pytest

from kvstore.errors import ConnectionLost, DaemonUnavailable, InvalidArgument, Throttled
from kvstore_client.integrations import absence
from kvstore_client.integrations.reachable import Reachable

LOG = logging.getLogger("test.reachable")


class Daemon:
    """A daemon that can be away; also the store, and what makes it."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.opened = 0
        self.closed = 0

    def open(self) -> Daemon:
        self.opened += 1
        return self.use(self)

    def use(self, _: object) -> Daemon:
        if self.error is not None:
            raise self.error
        return self

    def close(self) -> None:
        self.closed += 1


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(absence, "time", clock)
    return clock


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def store(daemon: Daemon, clock: Clock) -> Reachable[Daemon]:
    return Reachable("the test", daemon.open, retry_s=2.0, log=LOG)


def test_opens_once_and_on_first_use(daemon: Daemon, store: Reachable[Daemon]) -> None:
    assert daemon.opened == 0
    assert store.store is None
    assert store.call(lambda _: 1, 0) == 1
    assert store.call(lambda _: 2, 0) == 2
    assert daemon.opened == 1
    assert store.store is daemon


@pytest.mark.parametrize("error", [DaemonUnavailable("gone"), ConnectionLost("gone")])
def test_leaves_a_daemon_alone_that_failed(
    daemon: Daemon, store: Reachable[Daemon], clock: Clock, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    daemon.error = error
    assert store.call(daemon.use, None) is None
    assert daemon.opened == 1
    clock.now_s += 1.9
    assert store.call(daemon.use, None) is None
    assert daemon.opened == 1
    assert (store.failures, store.skipped) == (1, 1)
    clock.now_s += 0.2
    assert store.call(daemon.use, None) is None
    assert daemon.opened == 2
    clock.now_s += 2.1
    daemon.error = None
    assert store.call(daemon.use, None) is daemon
    assert [record.message for record in caplog.records] == [
        "the test goes on without the store, and tries again every 2 s: gone",
        "the test uses the store again",
    ]


def test_a_throttled_call_is_no_absence(
    daemon: Daemon, store: Reachable[Daemon], caplog: pytest.LogCaptureFixture
) -> None:
    store.call(daemon.use, None)
    daemon.error = Throttled("busy")
    assert store.call(daemon.use, None) is None
    daemon.error = None
    assert store.call(daemon.use, None) is daemon
    assert (store.failures, store.skipped, caplog.records) == (1, 0, [])


def test_mistakes_are_seen(daemon: Daemon, store: Reachable[Daemon]) -> None:
    daemon.error = InvalidArgument("codec")
    with pytest.raises(InvalidArgument):
        store.call(daemon.use, None)


def test_is_not_opened_after_it_was_closed(daemon: Daemon, store: Reachable[Daemon]) -> None:
    store.call(daemon.use, None)
    store.close()
    store.close()
    assert daemon.closed == 1
    assert store.call(daemon.use, None) is None
    assert daemon.opened == 1
