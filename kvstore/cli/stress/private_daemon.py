"""A small private daemon that is killed and started again at the same endpoint while clients use it."""

from __future__ import annotations

import os
import signal
import time
from typing import Final

import psutil

from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.format.constants import PAGE_BYTES
from kvstore.protocol.statistics import DaemonStats

__all__ = ["StressedDaemon", "accounting_problems", "leaked_slots"]

MIB: Final = 1 << 20
CAPACITY_BYTES: Final = 48 * MIB
GRANT_BYTES: Final = 16 * MIB
SLAB_BYTES: Final = 514 * PAGE_BYTES
"""Two records of 1 MiB exactly: memory has to move between sizes all the time."""

_KNOWN_ERRORS: Final = ("hazards_refused", "ring_refused", "corrupt_record", "request_failed", "verification_failed")
"""Events of the daemon's log, and tracebacks, that no client of this stress may bring about."""


class StressedDaemon(PrivateDaemon):
    """Without verification on reading, so that what is wrong reaches the reader, who looks at every byte."""

    def __init__(self) -> None:
        super().__init__(
            capacity_bytes=CAPACITY_BYTES,
            grant_bytes=GRANT_BYTES,
            slab_bytes=SLAB_BYTES,
            arguments=("--verify", "off"),
        )

    def kill_and_restart(self) -> None:
        """SIGKILL, then another daemon at the endpoint: clients have to find out and to connect by themselves."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._launch()

    def pause(self, seconds: float) -> None:
        """Stop the daemon for so long: what clients do without it goes on, and waits in their rings."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def complaints(self) -> list[str]:
        """What the daemon logged and never should have."""
        if self._log is None:
            return []
        log = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode("utf-8", "replace")
        return [
            f"the daemon logged: {line}"
            for line in log.splitlines()
            if line.startswith("Traceback") or "[error" in line or any(name in line for name in _KNOWN_ERRORS)
        ]

    def resources(self) -> tuple[int, int, int]:
        """Memory that is not shared in bytes, descriptors, threads."""
        process = psutil.Process(self.pid)
        memory = process.memory_info()
        return memory.rss - memory.shared, process.num_fds(), process.num_threads()


def leaked_slots(stats: DaemonStats) -> int:
    """Slots that are neither free nor hold a record, while no client is there that could have borrowed them."""
    return sum(slots.used_slots for slots in stats.dram.classes) - stats.dram.records


def accounting_problems(stats: DaemonStats) -> list[str]:
    """Where free and used slots and slabs do not add up, in words. No slab may be in between two sizes."""
    dram = stats.dram
    problems = [
        f"{slots.used_slots} used and {slots.free_slots} free slots of {slots.slot_bytes} bytes are not the "
        f"{slots.slabs} slabs they were cut from"
        for slots in dram.classes
        if slots.used_slots + slots.free_slots != slots.cut_slots
        or slots.cut_slots * slots.slot_bytes > slots.slabs * dram.slab_bytes
    ]
    slabs = sum(slots.slabs for slots in dram.classes) + dram.free_slabs
    if slabs * dram.slab_bytes != dram.populated_bytes:
        problems.append(f"{slabs} slabs in classes and free are not the {dram.populated_bytes} bytes populated")
    if dram.granted_bytes or dram.limbo_bytes:
        problems.append(f"{dram.granted_bytes} bytes stay granted and {dram.limbo_bytes} in limbo with no client left")
    if dram.resident_bytes > dram.capacity_bytes:
        problems.append(f"{dram.resident_bytes} resident bytes are more than the capacity")
    return problems
