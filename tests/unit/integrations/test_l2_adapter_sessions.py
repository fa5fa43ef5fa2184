from __future__ import annotations

import logging
import threading
import time
from typing import Any, cast

import pytest

from kvstore.errors import DaemonUnavailable, InvalidArgument, Throttled
from kvstore.protocol.namespace import Namespace
from kvstore_client.integrations.l2_adapter.places import Place
from kvstore_client.integrations.l2_adapter.sessions import Session, Sessions, StoreAway
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings


class Daemon:
    """A daemon that comes and goes."""

    def __init__(self) -> None:
        self.there = True
        self.opened: list[str] = []
        self.open = 0
        self.tries = 0
        self.wait_s = 0.0

    def connect(self, place: Place, settings: AdapterSettings) -> Session:
        self.tries += 1
        time.sleep(self.wait_s)
        self.answer()
        self.opened.append(place.namespace.name)
        self.open += 1
        return cast("Session", Connection(self))

    def answer(self, session: object = None) -> int:
        if not self.there:
            raise DaemonUnavailable("nobody listens")
        return 5


class Connection:
    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def close(self) -> None:
        self.daemon.open -= 1


def place(name: str = "one", **fields: Any) -> Place:
    return Place(Namespace(**{"name": name, "revision": "r"} | fields), 0)


def sessions(daemon: Daemon, **params: Any) -> Sessions:
    return Sessions(AdapterSettings.parse({"retry_s": 0.05} | params), daemon.connect)


def test_a_session_is_opened_once_for_reads_and_once_for_writes() -> None:
    daemon = Daemon()
    some = sessions(daemon)
    for _ in range(3):
        assert some.use(place(), daemon.answer) == 5
        assert some.use(place(), daemon.answer, writes=True) == 5
    assert daemon.opened == ["one", "one"]
    some.close()
    assert daemon.open == 0
    with pytest.raises(StoreAway):
        some.use(place(), daemon.answer)


def test_a_dead_daemon_is_asked_now_and_then_and_said_to_be_so_once(caplog: pytest.LogCaptureFixture) -> None:
    daemon = Daemon()
    some = sessions(daemon)
    some.use(place(), daemon.answer)
    daemon.there = False
    asked = 0

    def ask(session: Session) -> int:
        nonlocal asked
        asked += 1
        return daemon.answer()

    end = time.monotonic() + 0.5
    calls = 0
    while time.monotonic() < end:
        with pytest.raises(StoreAway):
            some.use(place(), ask)
        calls += 1
    assert some.away
    assert 2 <= asked <= 11
    assert some.skipped == calls - asked
    daemon.there = True
    time.sleep(0.06)
    assert some.use(place(), ask) == 5
    assert not some.away
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert "LMCache goes on without it" in texts[0]
    assert "nobody listens" in texts[0]
    assert "there again" in texts[1]
    assert some.losses == 1


def test_threads_that_wait_for_one_connection_do_not_try_one_after_the_other() -> None:
    daemon = Daemon()
    daemon.there, daemon.wait_s = False, 0.3
    some = sessions(daemon, retry_s=60)
    results: list[str] = []

    def ask() -> None:
        try:
            some.use(place(), daemon.answer)
        except StoreAway:
            results.append("away")

    begin = time.monotonic()
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == ["away"] * 6
    assert daemon.tries == 1
    assert time.monotonic() - begin < 1.2


@pytest.mark.parametrize("error", [InvalidArgument("wrong"), Throttled("busy")])
def test_mistakes_and_a_busy_daemon_are_no_absence(error: Exception) -> None:
    daemon = Daemon()
    some = sessions(daemon)

    def fail(session: Session) -> None:
        raise error

    with pytest.raises(type(error)):
        some.use(place(), fail)
    assert not some.away
    assert some.use(place(), daemon.answer) == 5


def test_the_least_recently_used_are_closed_where_there_are_too_many() -> None:
    daemon = Daemon()
    some = sessions(daemon, layouts=2)
    for number in range(10):
        some.use(place(str(number)), daemon.answer)
        some.use(place("0"), daemon.answer)
    assert daemon.open == 4
    assert [each.namespace.name for each, _ in some.connected()][-1] == "0"
    assert daemon.opened.count("0") == 1


def test_a_session_in_use_is_not_closed_for_another() -> None:
    daemon = Daemon()
    some = sessions(daemon, layouts=1)

    def nested(session: Session) -> None:
        for number in range(5):
            some.use(place(str(number)), daemon.answer)
        assert ("busy" in [each.namespace.name for each, _ in some.connected()]) is True

    some.use(place("busy"), nested)


def test_an_unknown_revision_is_said_once_for_a_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    daemon = Daemon()
    some = sessions(daemon)
    for number in range(3):
        some.use(place(str(number), model="m", revision=""), daemon.answer)
    some.use(place("r", model="n", revision="abc"), daemon.answer)
    (record,) = caplog.records
    assert "revision of the weights of m" in record.getMessage()
