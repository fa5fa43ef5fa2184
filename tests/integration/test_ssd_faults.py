"""What a daemon does while its SSD fails: it serves on, says why, comes back by itself, and reads nothing wrong."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_process import wait_until
from fakes.disk_faults import Fault
from forked_daemons import Nursery
from killed_daemon import Orders
from ssd_daemon import SsdDaemon, durable_is, found_blocks, key_of, payload_of, put_durable, ssd_stats, wait_for_state

from kvstore.protocol.messages import PutStatus
from kvstore_client import Client, Throttled

BELOW = range(80)
"""Blocks that are stored before the fault; the first ones are not in DRAM any more."""

REMOVED = [6, 7]
EXPECTED = ("ssd_degraded", "ssd_read_failed", "corrupt_ssd_record", "ssd_stays_smaller")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def daemon(nursery: Nursery, tmp_path: Path) -> Iterator[SsdDaemon]:
    with SsdDaemon(nursery, tmp_path, expected_errors=EXPECTED) as daemon:
        yield daemon


def serve_on(client: Client, first: int) -> None:
    """Puts and gets of DRAM go on, each in time; more blocks than DRAM has room for."""
    for number in range(first, first + 90):
        begin = time.monotonic()
        assert client.put(key_of(number), payload_of(number)) == PutStatus.STORED
        assert client.get(key_of(number)) == payload_of(number)
        assert time.monotonic() - begin < 5.0


def put_and_forget(client: Client, first: int) -> None:
    """Give the tier something to write, whatever becomes of it."""
    numbers = range(first, first + 8)
    client.put_many([key_of(number) for number in numbers], [payload_of(number) for number in numbers], durable=True)


@pytest.mark.parametrize(
    ("orders", "why"),
    [
        pytest.param(Orders(faults=[Fault("data_write", errno.ENOSPC, passes=2)]), "No space left", id="write-enospc"),
        pytest.param(Orders(faults=[Fault("data_sync", errno.EIO)]), "Input/output", id="sync-eio"),
        pytest.param(Orders(faults=[Fault("log_append", errno.ENOSPC)]), "No space left", id="log-append-enospc"),
        pytest.param(
            Orders(faults=[Fault("log_sync", errno.EIO), Fault("log_create", errno.EIO)]), "Input", id="log-eio"
        ),
        pytest.param(Orders(read_only=True), "Read-only file system", id="read-only"),
    ],
)
def test_writes_that_fail(daemon: SsdDaemon, orders: Orders, why: str) -> None:
    with daemon.client() as client:
        put_durable(client, BELOW)
        daemon.control.order(orders)
        put_and_forget(client, 1000)
        stats = wait_for_state(client, "read-only")
        assert why in stats.problem
        assert stats.write_errors > 0
        assert durable_is(client, 1100) == PutStatus.REJECTED
        # What is there is read, from the SSD too.
        assert found_blocks(client, range(10)) == list(range(10))
        assert ssd_stats(client).promoted_blocks > 0
        serve_on(client, 2000)
        removed = [key_of(number) for number in REMOVED]
        if orders.faults and orders.faults[0].op == "data_write":
            # Where only records cannot be written, the log says what was removed.
            assert client.remove(removed) == len(REMOVED)
        else:
            with pytest.raises(Throttled, match=f"SSD cannot be written now .*{why}.*may be back after a restart"):
                client.remove(removed)
        assert found_blocks(client, REMOVED) == []
        assert ssd_stats(client).state == "read-only"
        assert len(daemon.logged("ssd_degraded")) == 1

        daemon.control.order()
        assert wait_for_state(client, "ok").problem == ""
        assert len(daemon.logged("ssd_recovered")) == 1
        put_durable(client, range(3000, 3010))
        assert found_blocks(client, REMOVED) == []
        daemon.restarted()
        assert found_blocks(client, REMOVED) == []
        assert found_blocks(client, range(3000, 3010)) == list(range(3000, 3010))
        kept = [number for number in BELOW if number not in REMOVED]
        assert found_blocks(client, kept) == kept
        assert client.verify().problems == []


def test_a_checkpoint_that_fails(nursery: Nursery, tmp_path: Path) -> None:
    orders = Orders(faults=[Fault("checkpoint_create", errno.ENOSPC)])
    with SsdDaemon(nursery, tmp_path, expected_errors=EXPECTED) as daemon, daemon.client() as client:
        small = [payload_of(number, length_bytes=2000) for number in range(64)]
        daemon.control.order(orders)
        end = time.monotonic() + 20
        base = 0
        while ssd_stats(client).state == "ok":
            assert time.monotonic() < end, "no checkpoint was tried"
            base += 64
            client.put_many([key_of(base + at) for at in range(64)], small, durable=True)
        stats = ssd_stats(client)
        assert "No space left" in stats.problem
        assert stats.checkpoints == 0
        serve_on(client, 1_000_000)
        before = sorted(os.listdir(daemon.ssd))
        wait_until(lambda: "cannot write yet" in ssd_stats(client).problem, 10.0)
        # Attempts that fail leave nothing more behind.
        assert len(os.listdir(daemon.ssd)) <= len(before) + 1
        daemon.control.order()
        wait_for_state(client, "ok")
        assert ssd_stats(client).checkpoints == 1
        assert [name for name in os.listdir(daemon.ssd) if name.startswith("checkpoint")] != []
        put_durable(client, range(8))
        daemon.restarted()
        assert found_blocks(client, range(8)) == list(range(8))
        assert client.verify().problems == []


def test_reads_that_fail(daemon: SsdDaemon) -> None:
    with daemon.client() as client:
        put_durable(client, BELOW)
        daemon.control.order(Orders(faults=[Fault("data_read", errno.EIO, times=1)]))
        assert found_blocks(client, [7]) == []
        assert found_blocks(client, range(7)) == list(range(7))
        stats = ssd_stats(client)
        assert (stats.state, stats.read_errors, stats.corrupt_records) == ("ok", 1, 1)
        assert len(daemon.logged("ssd_read_failed")) == 1
        put_durable(client, [7], version=1)
        assert found_blocks(client, [7], version=1) == [7]
        # Where the device fails as a whole, what cannot be read is kept.
        daemon.control.order(Orders(faults=[Fault("data_read", errno.EIO), Fault("log_append", errno.EIO)]))
        durable_is(client, 500)
        wait_for_state(client, "read-only")
        assert found_blocks(client, range(10, 14)) == []
        daemon.control.order()
        wait_for_state(client, "ok")
        assert found_blocks(client, range(10, 14)) == list(range(10, 14))


def test_reads_that_hang(daemon: SsdDaemon) -> None:
    with daemon.client() as client, daemon.client(timeout=1.0) as hurried:
        put_durable(client, BELOW)
        daemon.control.order(Orders(delays_s={"data_read": 2.0}))
        begin = time.monotonic()
        assert hurried.get(key_of(0)) is None
        assert time.monotonic() - begin < 1.5
        assert client.get(key_of(BELOW[-1])) == payload_of(BELOW[-1])
        daemon.control.order()
        assert found_blocks(client, [0]) == [0]


def renamed_away(directory: Path) -> Callable[[], None]:
    away = directory.with_name("away")
    directory.rename(away)
    return lambda: [None, away.rename(directory)][0]


def replaced(directory: Path) -> Callable[[], None]:
    back = renamed_away(directory)
    directory.mkdir()
    return lambda: [directory.rmdir(), back()][0]


@pytest.mark.parametrize("take", [renamed_away, replaced])
def test_the_directory_goes_and_comes_back(daemon: SsdDaemon, take: Callable[[Path], Callable[[], None]]) -> None:
    with daemon.client() as client:
        put_durable(client, BELOW)
        give_back = take(daemon.ssd)
        stats = wait_for_state(client, "read-only")
        assert "removed, renamed or replaced" in stats.problem
        assert durable_is(client, 500) == PutStatus.REJECTED
        assert found_blocks(client, range(10)) == list(range(10))
        serve_on(client, 2000)
        give_back()
        wait_for_state(client, "ok")
        put_durable(client, [501])
        assert len(daemon.logged("ssd_degraded")) == len(daemon.logged("ssd_recovered")) == 1
        daemon.restarted()
        assert found_blocks(client, [*range(10), 501]) == [*range(10), 501]
        assert client.verify().problems == []


def test_the_directory_is_removed(daemon: SsdDaemon) -> None:
    with daemon.client() as client:
        put_durable(client, BELOW)
        shutil.rmtree(daemon.ssd)
        stats = wait_for_state(client, "read-only")
        assert "restart the daemon" in stats.problem
        assert found_blocks(client, range(10)) == list(range(10))
        serve_on(client, 2000)
        assert durable_is(client, 500) == PutStatus.REJECTED
        assert len(daemon.logged("ssd_degraded")) == 1
        daemon.restarted()
        assert ssd_stats(client).state == "ok"
        assert found_blocks(client, BELOW) == []
        put_durable(client, [501])
