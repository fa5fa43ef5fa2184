"""What connected clients cost while nobody asks for anything: CPU time of their processes and the daemon's."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from kvstore.cli.bench.process import ChildProcess
from kvstore.cli.bench.report import Row
from kvstore.errors import DaemonUnavailable

__all__ = ["IDLE_CLIENTS", "IDLE_LIMIT", "ClientKind", "cpu_seconds", "measure_idle", "parse_stat"]

ClientKind = Literal["socket", "mapped"]
"""What idles: a client that only connected and does not map, or one that maps and has put and read."""

IDLE_CLIENTS: Final = 16
IDLE_LIMIT: Final = 0.01
"""Share of one core that the clients and the daemon may use together."""

_START_SECONDS: Final = 120.0
_SETTLE_SECONDS: Final = 2.0
"""Left out of the measurement: what ends shortly after a start."""


def measure_idle(
    endpoint: str,
    daemon_pid: int,
    seconds: float,
    clients: int = IDLE_CLIENTS,
    settle_seconds: float = _SETTLE_SECONDS,
    kind: ClientKind = "socket",
) -> Row:
    """Connect ``clients`` SDK clients, a process each, leave them alone and see what they and the daemon use.

    Args:
        endpoint: of the daemon.
        daemon_pid: its process.
        seconds: length of the measurement.
        clients: how many.
        settle_seconds: waited before it.
        kind: of client.

    Raises:
        DaemonUnavailable: a client could not connect or do what its kind does first, or a process ended meanwhile.
    """
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(ChildProcess(f"idle client {index}", "kvstore.cli.bench.idle_client", endpoint, kind))
            for index in range(clients)
        ]
        deadline = time.monotonic() + _START_SECONDS
        for child in children:
            child.wait_until_ready(deadline)
        time.sleep(settle_seconds)
        pids = [daemon_pid, *(child.pid for child in children)]
        before, started = cpu_seconds(pids), time.perf_counter()
        time.sleep(seconds)
        used, elapsed = cpu_seconds(pids) - before, time.perf_counter() - started
    return Row(
        op="idle", batch=clients, seconds=round(elapsed, 3), core_share=round(used / elapsed, 6), limit=IDLE_LIMIT
    )


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes with all their threads, from ``/proc/PID/stat``.

    Raises:
        DaemonUnavailable: a process is gone.
    """
    ticks = 0
    for pid in pids:
        try:
            ticks += parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            raise DaemonUnavailable(f"process {pid} ended while its idle cost was measured") from None
    return ticks / os.sysconf("SC_CLK_TCK")


def parse_stat(text: str) -> int:
    """User and system clock ticks of one ``/proc/PID/stat``; the command's name may hold spaces and brackets."""
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[11]) + int(fields[12])
