"""What publishing KV events costs: CPU time of the daemon for each block put, with events off, on, and followed.

Baseline: a daemon with events off, in the same run; the daemons take turns. The tier is full, so that each put stores
one block and evicts one: two events a block. ``chain``: 64 blocks a put, one behind the other. ``single``: one block a
put, with nothing before it, which is an event and mostly a message of its own: as bad as it gets. ``followed``: an
``EventConsumer`` in a process of its own reads everything. Blocks are small, so that what is the same in all of them
(copying and checking bytes) is little. CPU time is that of the whole process, libzmq's threads included.

Usage: ``python benchmarks/events_cost.py [--rounds N] [--seconds S]``; prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from hashlib import sha256

import msgspec
import psutil

from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore_client import Client
from kvstore_client.events import EventConsumer

DATA = bytes(4096 - 256)
CAPACITY_BYTES = 64 << 20
BLOCKS = CAPACITY_BYTES // 4096
SIDES = ("off", "on", "followed")
FOLLOWER = """
import sys
from kvstore_client.events import EventConsumer
with EventConsumer(sys.argv[1]) as consumer:
    while True:
        consumer.poll(1.0)
"""


class Side:
    """One daemon, its client, and who follows its events."""

    def __init__(self, name: str, stack: ExitStack, mapped: bool) -> None:
        self.name = name
        arguments = () if name == "off" else ("--set", "events.publish=true")
        self.daemon = stack.enter_context(
            PrivateDaemon(capacity_bytes=CAPACITY_BYTES, arguments=("--verify", "off", *arguments))
        )
        self.client = stack.enter_context(Client(self.daemon.endpoint, namespace="cost", mapped=mapped))
        self.process = psutil.Process(self.daemon.pid)
        self.numbers = itertools.count()
        if name == "followed":
            follower = subprocess.Popen(
                [sys.executable, "-c", FOLLOWER, self.daemon.endpoint], stdout=subprocess.DEVNULL
            )
            stack.callback(follower.wait)
            stack.callback(follower.kill)
        self.put(BLOCKS // 64 + 8, 64)

    def put(self, count: int, blocks: int) -> None:
        for _ in range(count):
            keys = [sha256(next(self.numbers).to_bytes(8, "little")).digest() for _ in range(blocks)]
            statuses = self.client.put_many(keys, [DATA] * blocks)
            assert all(status.name == "STORED" for status in statuses), statuses

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def round(self, blocks: int, seconds: float) -> float:
        """Microseconds of the daemon's CPU for each block."""
        before, end_s, count = self.cpu_s(), time.monotonic() + seconds, 0
        while time.monotonic() < end_s:
            self.put(16, blocks)
            count += 16 * blocks
        time.sleep(0.1)  # what it still publishes is part of the cost
        return (self.cpu_s() - before) / count * 1e6


def measure(mapped: bool, rounds: int, seconds: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        sides = [Side(name, stack, mapped) for name in SIDES]
        for op, blocks in (("chain", 64), ("single", 1)):
            costs: dict[str, list[float]] = {side.name: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    costs[side.name].append(side.round(blocks, seconds))
            for name in SIDES:
                ratios = [off / own for off, own in zip(costs["off"], costs[name], strict=True)]
                rows.append(
                    {
                        "op": op,
                        "path": "mapped" if mapped else "socket",
                        "events": name,
                        "daemon_cpu_us": round(statistics.median(costs[name]), 2),
                        "ratio": round(statistics.median(ratios), 4),
                    }
                )
        check(sides[1])
    return rows


def check(side: Side) -> None:
    """What was measured did publish: a consumer that comes now finds exactly a full tier."""
    with EventConsumer(side.daemon.endpoint) as consumer:
        consumer.poll(1.0)
        held = side.client.stats().dram.blocks
        assert consumer.exact
        assert len(consumer.index) == held, (len(consumer.index), held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each round of each side")
    arguments = parser.parse_args()
    rows = [row for mapped in (False, True) for row in measure(mapped, arguments.rounds, arguments.seconds)]
    report = {
        "machine": msgspec.to_builtins(machine_facts()),
        "baseline": "the daemon's CPU time for each block put with events off, in the same round",
        "rows": rows,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
