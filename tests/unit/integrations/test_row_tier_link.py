from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.errors import DaemonUnavailable, InvalidArgument, Throttled
from kvstore_client.integrations.row_tier.counters import Counters
from kvstore_client.integrations.row_tier.link import CONNECTING, DOWN, UP, StoreLink

pytestmark = pytest.mark.usefixtures("no_leaks")


class Daemon:
    """A store whose daemon comes and goes."""

    def __init__(self) -> None:
        self.there = True
        self.wrong = False
        self.made = self.pings = self.closed = self.invalidated = 0
        self.client = self
        self.endpoint = "ipc:///test"
        self.mapped, self._mapped, self.unmapped = False, None, "it is a test"
        self.part = 0

    def connect(self) -> Any:
        if self.wrong:
            raise InvalidArgument("a bad layout")
        self.answer()
        self.made += 1
        return self

    def answer(self) -> None:
        if not self.there:
            raise DaemonUnavailable("nobody listens")

    def ping(self) -> float:
        self.pings += 1
        self.answer()
        return 0.0

    def invalidate(self) -> None:
        self.answer()
        self.invalidated += 1

    def close(self) -> None:
        self.closed += 1


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_link_comes_up_and_closes_its_store() -> None:
    daemon, ready = Daemon(), False
    link = StoreLink(daemon.connect, Counters(), ready=lambda: ready, retry_s=0.01)
    time.sleep(0.05)
    assert (link.state, link.store, daemon.made) == (CONNECTING, None, 0)
    ready = True
    wait(lambda: link.state == UP)
    assert link.store is not None
    assert link.find([bytes(32)]) is None
    assert link.close(5.0)
    assert daemon.closed == 1


def test_a_link_says_each_change_once(caplog: pytest.LogCaptureFixture) -> None:
    daemon, counters = Daemon(), Counters()
    daemon.there = False
    with caplog.at_level(logging.WARNING, "kvstore_client"):
        link = StoreLink(daemon.connect, counters, retry_s=0.005)
        wait(lambda: link.state == DOWN)
        time.sleep(0.1)
        assert link.find([bytes(32)] * 3) == [False] * 3
        daemon.there = True
        wait(lambda: link.state == UP)
        for _ in range(2):
            daemon.there = False
            for _ in range(5):
                link.failed(DaemonUnavailable("nobody listens"))
            assert link.store is None
            time.sleep(0.05)
            daemon.there = True
            wait(lambda: link.state == UP)
        assert link.close(5.0)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 6
    assert all("no store" in line and "nobody listens" in line for line in lines[::2])
    assert all("connected to ipc:///test over the socket (it is a test)" in line for line in lines[1::2])
    assert counters.take() == {("state_changes", ("down",)): 3.0, ("state_changes", ("up",)): 3.0}
    assert daemon.made == 1


def test_a_throttled_or_wrong_operation_does_not_take_the_link_down() -> None:
    daemon = Daemon()
    link = StoreLink(daemon.connect, Counters())
    wait(lambda: link.state == UP)
    link.failed(Throttled("not now"))
    link.failed(InvalidArgument("a bad key"))
    link.failed(ZeroDivisionError("a bug"))
    assert link.state == UP
    assert link.close(5.0)


def test_what_can_never_be_right_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    daemon = Daemon()
    daemon.wrong = True
    link = StoreLink(daemon.connect, Counters(), retry_s=0.005)
    wait(lambda: link.state == DOWN)
    daemon.wrong = False
    time.sleep(0.05)
    assert link.state == DOWN
    assert "a bad layout; it is not tried again" in caplog.text
    assert link.close(5.0)


def test_nothing_is_served_between_a_reset_and_the_next_generation(caplog: pytest.LogCaptureFixture) -> None:
    daemon, ready = Daemon(), False
    with caplog.at_level(logging.WARNING, "kvstore_client"):
        link = StoreLink(daemon.connect, Counters(), ready=lambda: ready, retry_s=0.01)
        link.invalidate()
        ready = True
        wait(lambda: link.state == UP)
        assert daemon.invalidated == 1
        daemon.there = False
        link.invalidate()
        assert link.store is None
        wait(lambda: link.state == DOWN)
        assert daemon.invalidated == 1
        daemon.there = True
        wait(lambda: link.state == UP)
        assert daemon.invalidated == 2
        assert link.close(5.0)
