"""Ends of a daemon in the middle of durable puts and removals: what was acknowledged is so in the next life."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_daemons import Nursery
from killed_daemon import Orders
from ssd_daemon import SsdDaemon, found_blocks, key_of, payload_of, put_durable, ssd_stats

from kvstore.protocol.messages import PutStatus
from kvstore_client import KVStoreError

THREADS = 4


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


class Putter(threading.Thread):
    """Stores blocks durably, removes every fifth again, and notes what was acknowledged."""

    def __init__(self, daemon: SsdDaemon, first: int) -> None:
        super().__init__()
        self._daemon = daemon
        self._first = first
        self.durable: set[int] = set()
        self.removed: set[int] = set()
        self.unknown: set[int] = set()

    def run(self) -> None:
        try:
            with self._daemon.client(timeout=3.0) as client:
                for number in range(self._first, self._first + 500):
                    self.unknown = {number}
                    if client.put(key_of(number), payload_of(number), durable=True) == PutStatus.STORED:
                        self.durable.add(number)
                    victim = number - 3
                    if number % 5 == 0 and victim in self.durable:
                        self.unknown |= {victim}
                        client.remove([key_of(victim)])
                        self.durable.discard(victim)
                        self.removed.add(victim)
        except KVStoreError:
            pass  # the daemon ends


@pytest.mark.parametrize("killed", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_what_was_acknowledged_is_there(nursery: Nursery, tmp_path: Path, *, killed: bool) -> None:
    with SsdDaemon(nursery, tmp_path, ssd_capacity="32MiB") as daemon:
        # Slow enough that there is always something on its way.
        daemon.control.order(Orders(delays_s={"data_sync": 0.02, "data_write": 0.005}))
        putters = [Putter(daemon, 1000 * number) for number in range(1, THREADS + 1)]
        for putter in putters:
            putter.start()
        time.sleep(0.8)
        begin = time.monotonic()
        if killed:
            daemon.kill()
        else:
            assert daemon.terminate() == 0
            assert time.monotonic() - begin < 8.0
        for putter in putters:
            putter.join()
        daemon.control.order()
        daemon.start()
        with daemon.client() as client:
            for putter in putters:
                assert len(putter.durable) > 3
                sure = sorted(putter.durable - putter.unknown)
                assert found_blocks(client, sure) == sure
                assert found_blocks(client, sorted(putter.removed - putter.unknown)) == []
            assert sum(len(putter.removed) for putter in putters) > 0
            assert client.verify().problems == []
            put_durable(client, range(8))


def test_a_life_in_which_nothing_could_be_written(nursery: Nursery, tmp_path: Path) -> None:
    """Removals that were refused because of a fault, and an end before it was over: told, and so it is."""
    with (
        SsdDaemon(nursery, tmp_path, expected_errors=("ssd_degraded", "ssd_stays_smaller")) as daemon,
        daemon.client() as client,
    ):
        put_durable(client, range(16))
        daemon.control.order(Orders(read_only=True))
        client.put(key_of(20), payload_of(20), durable=True)
        assert ssd_stats(client).state == "read-only"
        begin = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - begin < 5.0
        daemon.control.order()
        daemon.start()
        assert ssd_stats(client).state == "ok"
        assert found_blocks(client, range(16)) == list(range(16))
        assert client.verify().problems == []
