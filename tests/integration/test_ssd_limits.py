"""Limits of the SSD tier: bytes on disk at every moment, room that is left to others, other sizes at a later start."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from daemon_process import wait_until
from fakes.disk_faults import Fault
from forked_daemons import Nursery
from killed_daemon import Orders
from ssd_daemon import MIB, SLAB_BYTES, SsdDaemon, found_blocks, key_of, payload_of, put_durable, ssd_stats

from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import checkpoint_name
from kvstore.protocol.messages import PutStatus
from kvstore.server.ssd_groups import index_bytes


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def disk_bytes(directory: Path) -> int:
    """What ``du`` says."""
    used = os.stat(directory).st_blocks * 512
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            used += os.stat(directory / name).st_blocks * 512
    return used


class Watch:
    """Looks at the bytes on disk all the time, in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most_bytes = 0
        self.looks = 0

    def _look(self) -> None:
        while not self._end.wait(0.002):
            self.most_bytes = max(self.most_bytes, disk_bytes(self._directory))
            self.looks += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.parametrize("settings", [(), ("--set", "ssd.max_records=300")], ids=["automatic", "300-records"])
def test_bytes_on_disk_never_pass_the_capacity(nursery: Nursery, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Blocks of all sizes, some durable, some removed; then many small ones, whose log needs checkpoints."""
    capacity_bytes = 6 * MIB
    randomness = random.Random(7)
    with SsdDaemon(nursery, tmp_path, *settings, ssd_capacity="6MiB") as daemon, daemon.client() as client:
        with Watch(daemon.ssd) as watch:
            number = 0
            for _ in range(20):
                lengths = [randomness.choice([900, 3000, 13_000, 60_000]) for _ in range(16)]
                keys = [key_of(number + at) for at in range(16)]
                payloads = [payload_of(number + at, length_bytes=length) for at, length in enumerate(lengths)]
                client.put_many(keys, payloads, durable=randomness.random() < 0.5)
                if randomness.random() < 0.2:
                    client.remove(randomness.sample(keys, 4))
                number += 16
            small = [payload_of(at, length_bytes=800) for at in range(128)]
            end = time.monotonic() + 15
            while not settings and not ssd_stats(client).checkpoints and time.monotonic() < end:
                client.put_many([key_of(number + at) for at in range(128)], small, durable=True)
                number += 128
            stats = ssd_stats(client)
        assert bool(stats.checkpoints) == (not settings)
        assert stats.evicted_blocks > 0
        assert watch.looks > 50
        assert watch.most_bytes <= capacity_bytes
        assert stats.file_bytes <= capacity_bytes
        assert stats.state == "ok"
        assert client.verify().problems == []


def test_free_space_of_the_file_system_is_left(nursery: Nursery, tmp_path: Path) -> None:
    settings = ["--set", f"ssd.reserve_bytes={MIB}"]
    daemon = SsdDaemon(nursery, tmp_path, *settings)
    # Log and checkpoints need room as well.
    left_bytes = MIB + index_bytes(0) + PAGE_BYTES
    daemon.control.order(Orders(volume_bytes=2 * MIB + left_bytes))
    with daemon, daemon.client() as client:
        put_durable(client, range(300))
        stats = ssd_stats(client)
        assert stats.state == "ok"
        assert stats.problem == "stays smaller: the file system's free space is near ssd.reserve_bytes"
        assert 2 * MIB - 2 * SLAB_BYTES < stats.formatted_bytes <= 2 * MIB
        assert stats.file_bytes <= 2 * MIB + left_bytes - MIB
        assert stats.evicted_blocks > 0
        (line,) = daemon.logged("ssd_stays_smaller")
        assert "ssd.reserve_bytes" in line["why"]
        # It grows when there is room.
        daemon.control.order(Orders(volume_bytes=3 * MIB + left_bytes))
        numbers = iter(range(1000, 10_000))

        def grown() -> bool:
            put_durable(client, [next(numbers) for _ in range(8)])
            return ssd_stats(client).formatted_bytes > stats.formatted_bytes

        wait_until(grown, 12.0, 0.2)
        assert ssd_stats(client).problem == ""
        assert len(daemon.logged("ssd_stays_smaller")) == 1


def test_slabs_that_cannot_be_formatted(nursery: Nursery, tmp_path: Path) -> None:
    daemon = SsdDaemon(nursery, tmp_path, expected_errors=("ssd_stays_smaller",))
    daemon.control.order(Orders(faults=[Fault("data_format", errno.ENOSPC, passes=6)]))
    with daemon, daemon.client() as client:
        put_durable(client, range(100))
        stats = ssd_stats(client)
        assert (stats.state, stats.formatted_bytes) == ("ok", 6 * SLAB_BYTES)
        assert stats.problem == "stays smaller: No space left on device"
        assert stats.evicted_blocks > 0
        assert len(daemon.logged("ssd_stays_smaller")) == 1
        put_durable(client, range(100, 108))
        assert client.verify().problems == []


def test_slabs_on_a_device_that_fails(nursery: Nursery, tmp_path: Path) -> None:
    """Nothing leaves for want of slabs that are only late, and the tier comes back when they can be written."""
    daemon = SsdDaemon(nursery, tmp_path, expected_errors=("ssd_degraded",))
    with daemon, daemon.client() as client:
        put_durable(client, range(8))
        daemon.control.order(Orders(faults=[Fault("data_format", errno.EIO)]))
        client.put_many(
            [key_of(number) for number in range(100, 164)], [payload_of(number) for number in range(100, 164)]
        )
        client.put_many(
            [key_of(number) for number in range(200, 264)], [payload_of(number) for number in range(200, 264)]
        )
        wait_until(lambda: ssd_stats(client).state == "read-only")
        assert "Input/output" in ssd_stats(client).problem
        wait_until(lambda: "cannot write yet" in ssd_stats(client).problem)
        time.sleep(1.0)
        assert ssd_stats(client).state == "read-only"
        assert len(daemon.logged("ssd_degraded")) == 1
        daemon.control.order()
        wait_until(lambda: ssd_stats(client).state == "ok", 15.0)
        assert ssd_stats(client).evicted_blocks == 0
        put_durable(client, range(300, 340))
        assert found_blocks(client, range(8)) == list(range(8))
        assert client.verify().problems == []


def test_another_capacity_at_the_next_start(nursery: Nursery, tmp_path: Path) -> None:
    def blocks_with(capacity: str, mib: int, first: int) -> set[int]:
        with SsdDaemon(nursery, tmp_path, ssd_capacity=capacity) as daemon, daemon.client() as client:
            found = set(found_blocks(client, range(400)))
            assert ssd_stats(client).file_bytes <= mib * MIB
            with Watch(daemon.ssd) as watch:
                put_durable(client, range(first, first + 40))
            assert watch.most_bytes <= mib * MIB
            assert client.verify().problems == []
            return found

    with SsdDaemon(nursery, tmp_path, ssd_capacity="8MiB") as daemon, daemon.client() as client:
        put_durable(client, range(320))
        assert client.remove([key_of(number) for number in range(312, 320)]) == 8
        assert ssd_stats(client).formatted_bytes > 5 * MIB
    smaller = blocks_with("4MiB", 4, 400)
    assert 0 < len(smaller) < 200
    assert smaller.isdisjoint(range(312, 320))
    # What lay in the slabs that went does not come back with them.
    assert blocks_with("8MiB", 8, 500) <= smaller


def refusal(nursery: Nursery, where: Path, *arguments: str, capacity: str = "8MiB") -> str:
    """The one line with which a daemon with an endpoint of its own refuses to start; it leaves nothing behind."""
    daemon = SsdDaemon(nursery, where, ssd_capacity=capacity)
    before = len(daemon.log())
    try:
        status, line = daemon.refused(*arguments)
        assert len(daemon.log()[before:].splitlines()) == 1
        assert daemon.files() == []
    finally:
        daemon._remove()
    assert status in (1, 2), line
    assert line.startswith("kvstore: error: "), line
    return line


def test_what_a_start_refuses(nursery: Nursery, tmp_path: Path) -> None:
    """See also the tests of ``SsdTier.open``."""
    assert "is too small" in refusal(nursery, tmp_path, capacity="1MiB")
    assert not (tmp_path / "ssd").exists()
    with SsdDaemon(nursery, tmp_path) as daemon, daemon.client() as client:
        put_durable(client, range(8))
        assert f"in use by another daemon (pid {daemon.pid})" in refusal(nursery, tmp_path)
        assert client.put(key_of(9), payload_of(9), durable=True) == PutStatus.STORED
        daemon.terminate()
        kept = {path.name: path.read_bytes() for path in daemon.ssd.iterdir()}
        assert "ssd.slab_bytes says 256.0 KiB" in refusal(nursery, tmp_path, "--set", "ssd.slab_bytes=262144")
        assert {path.name: path.read_bytes() for path in daemon.ssd.iterdir()} == kept
        # A checkpoint of another store is none of this one's.
        (daemon.ssd / checkpoint_name(77)).write_bytes(os.urandom(500))
        daemon.start()
        assert found_blocks(client, range(10)) == [*range(8), 9]
        assert any(checkpoint_name(77) in line["why"] for line in daemon.logged("ssd_recovery"))


def test_tier_that_gets_no_slab_keeps_nobody_waiting(nursery: Nursery, tmp_path: Path) -> None:
    """DRAM evicts as it would without a tier below, and says that blocks left without a copy."""
    reserve = ("--set", "ssd.reserve_bytes=1000TiB")
    with SsdDaemon(nursery, tmp_path, *reserve) as daemon, daemon.client() as client:
        for number in range(150):
            assert client.put(key_of(number), payload_of(number)) is PutStatus.STORED
        ssd = ssd_stats(client)
        assert (ssd.state, ssd.blocks, ssd.formatted_bytes) == ("ok", 0, 0)
        assert "ssd.reserve_bytes" in ssd.problem
        assert ssd.dropped_blocks > 50
        assert client.get(key_of(149)) == payload_of(149)
        assert client.verify().problems == []
