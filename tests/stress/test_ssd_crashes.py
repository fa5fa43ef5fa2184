"""A daemon with an SSD tier is killed hundreds of times, at any time and at named points of its work on its files.

After each death: no durable block is lost, no removed one is back, no byte is wrong, every slot of the slab file is
free or of one record, and the accounts are those of the files.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from daemon_process import wait_until
from fakes.durable_model import Expected
from forked_daemons import Nursery
from killed_daemon import Orders
from ssd_daemon import SsdDaemon, key_of, payload_of, ssd_stats

from kvstore.protocol.messages import PutStatus
from kvstore_client import Client, KVStoreError

KILLS = int(os.environ.get("SSD_KILLS", "3000"))
"""Of the long run."""

CHAINS, LENGTH = 12, 5
CLIENTS = 2
"""Each with its namespace and, together, twice as many blocks as DRAM holds."""

LONGEST_LIFE_S = 1.5
POINTS = (
    "before_data_write",
    "after_data_write",
    "before_data_sync",
    "after_data_sync",
    "before_log_append",
    "after_log_append",
    "before_log_sync",
    "after_log_sync",
    "before_slot_reuse",
    "before_data_read",
)
AT_START = (
    "before_checkpoint_rename",
    "after_checkpoint_rename",
    "after_log_create",
    "before_file_sync",
    "before_remove",
)


class Worker:
    """A client that does all kinds of things until the daemon dies, and knows what was promised to it."""

    def __init__(self, daemon: SsdDaemon, name: str, seed: int, *, evictions: bool) -> None:
        self._daemon = daemon
        self._namespace = name
        self._draw = random.Random(seed)
        self._number = 0
        self._evictions = evictions
        self.expected = [Expected() for _ in range(CHAINS * LENGTH)]
        self.lost = 0
        self.evicted_blocks = 0
        """Most that were seen in one life."""
        self.problems: list[str] = []
        self.done: Counter[str] = Counter()

    def work(self) -> None:
        """Until the daemon is dead."""
        try:
            with self._daemon.connect(namespace=self._namespace, timeout=5.0) as client:
                while True:
                    self._act(client)
        except KVStoreError:
            return
        except BaseException as error:
            self.problems.append(f"{self._namespace}: {error!r}")

    def _act(self, client: Client) -> None:
        first = self._draw.randrange(CHAINS) * LENGTH
        chain = range(first, first + 1 + self._draw.randrange(LENGTH))
        what = self._draw.choices(["durable", "put", "get", "remove", "clear", "invalidate"], [40, 25, 20, 12, 1, 1])[0]
        if what in ("durable", "put"):
            self._put(client, chain, durable=what == "durable")
        elif what == "get":
            for number in chain:
                self.see(client, number)
        else:
            some = chain if what == "remove" else range(len(self.expected))
            for number in some:
                self.expected[number].unsure()
            if what == "remove":
                client.remove([key_of(number) for number in some])
            elif what == "clear":
                client.clear()
            else:
                client.invalidate()
            for number in some:
                self.expected[number].gone(acknowledged=True)
        self.done[what] += 1
        if self.done.total() % 8 == 0:
            self.evicted_blocks = max(self.evicted_blocks, ssd_stats(client).evicted_blocks)

    def _put(self, client: Client, chain: range, *, durable: bool) -> None:
        payloads = []
        for number in chain:
            known = self.expected[number].possible
            if not known:
                self._number += 1
                known.add(payload_of(number, self._number))
            payloads.append(next(iter(known)))
        statuses = client.put_many([key_of(number) for number in chain], payloads, durable=durable)
        for number, payload, status in zip(chain, payloads, statuses, strict=True):
            if durable and status is PutStatus.STORED:
                self.expected[number].durable = payload

    def see(self, client: Client, number: int) -> None:
        """Read a block and compare."""
        found = client.get(key_of(number))
        expected = self.expected[number]
        if found is not None:
            if found not in expected.possible:
                self.problems.append(f"{self._namespace}: block {number} has wrong bytes, or is back")
            return
        if expected.durable is not None:
            self.lost += 1
            if not self._evictions:
                self.problems.append(f"{self._namespace}: block {number} was durable and is lost")
        expected.missed()

    def check(self) -> None:
        """Read everything after a restart; what is not there now is gone for good."""
        with self._daemon.connect(namespace=self._namespace, timeout=5.0) as client:
            for number, expected in enumerate(self.expected):
                expected.crashed()
                self.see(client, number)
                expected.ghosts = set()


class Lives:
    """One daemon after another over the same files."""

    def __init__(self, daemon: SsdDaemon, seed: int, *, evictions: bool) -> None:
        self._daemon = daemon
        self._draw = random.Random(seed)
        self._evictions = evictions
        self.workers = [
            Worker(daemon, f"worker {number}", seed * 10 + number, evictions=evictions) for number in range(CLIENTS)
        ]
        self.kills: Counter[str] = Counter()

    def run(self, kills: int) -> None:
        """Until so many died."""
        self._daemon.start(populated=False)
        turns = itertools.count()
        while self.kills.total() < kills:
            self._die(next(turns))
            if not self._start(Orders()):
                raise AssertionError(f"the daemon does not start again: {self._daemon.log()[-2000:]}")
            self._check()

    def _start(self, orders: Orders) -> bool:
        """False where it killed itself while it started."""
        self._daemon.control.order(orders)
        try:
            self._daemon.start(populated=False)
        except AssertionError:
            point = self._daemon.control.killed_at()
            if self._daemon.alive() or not point:
                raise
            self.kills[point] += 1
            return False
        return True

    def _die(self, turn: int) -> None:
        """Let clients work until the daemon ends, by the clock or at a point."""
        if turn % 5 == 4:
            # What a start does: from a daemon that runs already.
            self._daemon.kill()
            self.kills["idle"] += 1
            point = self._draw.choice(AT_START)
            if not self._start(Orders(kill=point, passing=1 + self._draw.randrange(2))):
                return
        point = POINTS[turn // 2 % len(POINTS)] if turn % 2 else ""
        end_s = LONGEST_LIFE_S if point else self._draw.random() * 0.1
        self._daemon.control.order(Orders(kill=point, passing=1 + self._draw.randrange(4)))
        threads = [threading.Thread(target=worker.work) for worker in self.workers]
        for thread in threads:
            thread.start()
        end = time.monotonic() + end_s
        while self._daemon.alive() and time.monotonic() < end:
            time.sleep(0.002)
        if self._daemon.alive():
            self._daemon.kill()
        for thread in threads:
            thread.join()
        self.kills[self._daemon.control.killed_at() or "clock"] += 1

    def _check(self) -> None:
        for worker in self.workers:
            worker.check()
        problems = [problem for worker in self.workers for problem in worker.problems]
        assert not problems, f"{problems} after {dict(self.kills)}"
        with self._daemon.client() as client:
            assert client.verify().problems == []
            wait_until(lambda: self._adds_up(client), 5.0, 0.01)
            ssd = ssd_stats(client)
            assert (ssd.state, ssd.corrupt_records, ssd.read_errors, ssd.write_errors) == ("ok", 0, 0, 0)
            assert ssd.file_bytes <= ssd.capacity_bytes
            assert self._evictions or not ssd.evicted_blocks

    def _adds_up(self, client: Client) -> bool:
        """Once it rests: what the tier says of slots and files is so."""
        ssd = ssd_stats(client)
        files = sum(path.stat().st_blocks * 512 for path in self._daemon.ssd.iterdir())
        slots = ssd.resident_bytes + ssd.free_bytes
        return not ssd.writing_bytes + ssd.leaving_bytes and slots == ssd.formatted_bytes and files == ssd.file_bytes


def crashes(where: Path, kills: int, seed: int, *, evictions: bool) -> Counter[str]:
    where.mkdir(exist_ok=True)
    # Room for half of the blocks, or for three times as many.
    arguments = ("--set", "ssd.max_records=256") if evictions else ()
    capacity = "2560KiB" if evictions else "8MiB"
    with Nursery() as nursery, SsdDaemon(nursery, where, *arguments, ssd_capacity=capacity) as daemon:
        daemon.kill()
        lives = Lives(daemon, seed, evictions=evictions)
        lives.run(kills)
        done = sum((worker.done for worker in lives.workers), Counter())
        assert min(done[what] for what in ("durable", "put", "get", "remove")) > kills / 4, done
        assert evictions == any(worker.evicted_blocks for worker in lives.workers)
        assert sum(expected.durable is not None for worker in lives.workers for expected in worker.expected)
        return lives.kills


@pytest.mark.timeout(240)
def test_ssd_survives_kills_at_any_time_and_at_each_point(tmp_path: Path) -> None:
    kills = crashes(tmp_path / "roomy", 140, 1, evictions=False)
    kills += crashes(tmp_path / "tight", 70, 2, evictions=True)
    assert kills.total() >= 210
    assert kills["clock"] > 50
    assert not [point for point in POINTS if not kills[point]], kills
    assert sum(kills[point] for point in AT_START) > 5, kills


@pytest.mark.stress
@pytest.mark.timeout(8 * 3600)
def test_ssd_survives_thousands_of_kills(tmp_path: Path) -> None:
    for seed in range(10, 20):
        crashes(tmp_path / f"roomy-{seed}", KILLS // 20, seed, evictions=False)
        crashes(tmp_path / f"tight-{seed}", KILLS // 20, 100 + seed, evictions=True)
