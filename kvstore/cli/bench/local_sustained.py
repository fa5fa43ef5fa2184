"""Writing as fast as the daemon takes it: more bytes than the caches hold, into a full tier, until all is published.

One number a round: the wall time of all puts (``wait=False``) and the ``flush`` behind them, beside a loop of as many
``ctypes.memmove`` calls from the same buffers into random slots. Each put evicts a block. The daemon's CPU time is that
of all its threads meanwhile, its polling included.

Client and daemon work at the same time, so they need a core each, the baseline needs one. Where other processes keep a
core busy the ratio falls by as much as the two have to share: the row says how many cores others used.
"""

from __future__ import annotations

import os
import time
from ctypes import memmove
from statistics import median
from time import perf_counter_ns
from typing import Final

from kvstore.cli.bench.local_blocks import Buffers, wrong
from kvstore.cli.bench.local_puts import FullTier
from kvstore.cli.bench.local_reads import MEMMOVE
from kvstore.cli.bench.local_sides import Walk
from kvstore.cli.bench.report import Row
from kvstore.protocol.keys import KEY_BYTES

__all__ = ["Sustained"]

_LIMIT: Final = 0.85
_LIMIT_FROM_BYTES: Final = 256 << 10


class Sustained:
    """Sustained puts of one size; see ``Puts`` for what the arguments are.

    Args:
        tier: full.
        pool: whose contents are put, in rotation.
        total_bytes: written by each side in a round.
        daemon_pid: whose CPU time is taken.
    """

    def __init__(self, tier: FullTier, pool: Buffers, total_bytes: int, daemon_pid: int) -> None:
        self._tier = tier
        self._pool = pool
        # At most what the tier holds: the puts of a round must all be there to be looked at afterwards.
        self._count = max(1, min(total_bytes // tier.size_bytes, len(tier.addresses)))
        self._pid = daemon_pid
        self._walk = Walk(len(tier.addresses), 1)
        self._rounds = 0
        self._ours_ns: list[int] = []
        self._baseline_ns: list[int] = []
        self._cpu_ns: list[int] = []
        self._others: list[float] = []

    def round(self) -> None:
        """Measure each side once, in turns first."""
        sides = [self._memmoves, self._puts]
        for side in sides if self._rounds % 2 else reversed(sides):
            side()
        self._rounds += 1

    def _memmoves(self) -> None:
        size, addresses, sources = self._tier.size_bytes, self._tier.addresses, self._pool.addresses
        places, taken = self._walk.part(0, self._count, 0.0), self._pool.take(self._count)
        self._walk.forward(self._count)
        pairs = [(addresses[place], sources[source]) for place, source in zip(places, taken, strict=True)]
        started = perf_counter_ns()
        for target, source in pairs:
            memmove(target, source, size)
        self._baseline_ns.append(perf_counter_ns() - started)

    def _puts(self) -> None:
        client, arrays = self._tier.client, self._pool.arrays
        for array in arrays:
            array[KEY_BYTES] = self._rounds & 0xFF  # what an earlier round left in a slot is not what this one puts
        keys, taken = self._tier.fresh_keys(self._count), self._pool.take(self._count)
        pairs = [(key, arrays[source]) for key, source in zip(keys, taken, strict=True)]
        evicted = client.stats().eviction.evicted_blocks
        busy_ns, own_ns, cpu_ns = machine_busy_ns(), time.process_time_ns(), process_cpu_ns(self._pid)
        started = perf_counter_ns()
        for key, data in pairs:
            client.put(key, data, wait=False)
        flushed = client.flush()
        elapsed_ns = perf_counter_ns() - started
        daemon_ns = process_cpu_ns(self._pid) - cpu_ns
        others_ns = machine_busy_ns() - busy_ns - daemon_ns - (time.process_time_ns() - own_ns)
        self._ours_ns.append(elapsed_ns)
        self._cpu_ns.append(daemon_ns)
        self._others.append(max(others_ns / elapsed_ns, 0.0))
        if flushed.stored != self._count:
            raise wrong(f"{flushed.stored} of {self._count} puts were stored: {flushed}")
        evicted = client.stats().eviction.evicted_blocks - evicted
        if evicted < self._count // 2:
            raise wrong(f"only {evicted} blocks were evicted by {self._count} puts: the tier was not full")
        self._tier.check(keys, [data for _, data in pairs], keyed=False)

    def rows(self) -> list[Row]:
        """What was found."""
        size, count = self._tier.size_bytes, self._count
        ours_ns, baseline_ns = median(self._ours_ns), median(self._baseline_ns)
        ratio = median(theirs / ours for theirs, ours in zip(self._baseline_ns, self._ours_ns, strict=True))
        return [
            Row(
                op="put_sustained",
                size_bytes=size,
                batch=count,
                cache="cold",
                buffers="rotating",
                samples=self._rounds,
                median_us=round(ours_ns / count / 1000, 2),
                gb_per_s=round(size * count / ours_ns, 3),
                baseline=MEMMOVE,
                baseline_median_us=round(baseline_ns / count / 1000, 2),
                ratio=round(ratio, 4),
                limit=_LIMIT if size >= _LIMIT_FROM_BYTES else None,
                daemon_cpu_us=round(sum(self._cpu_ns) / self._rounds / count / 1000, 2),
                others_share=round(median(self._others), 2),
            )
        ]


def machine_busy_ns() -> int:
    """CPU time that all processes used since the machine's start, in steps of some milliseconds."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = (int(ticks) for ticks in file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def process_cpu_ns(pid: int) -> int:
    """CPU time of a process with all its threads.

    The kernel's per-process CPU clock (clock_getcpuclockid(3)): what ``/proc/PID/stat`` says, but in nanoseconds rather
    than in hundredths of a second, of which a round has only a few.
    """
    return time.clock_gettime_ns(~pid << 3 | 2)
