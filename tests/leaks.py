"""What a test must give back: file descriptors, threads, child processes and shared-memory files.

Each function takes a snapshot of one resource; ``Snapshot.leaks_since`` polls until everything new is gone or the
grace period is over. Shared memory of daemons that other test runs own is left out of the account.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SHM = Path("/dev/shm")
SHM_PREFIX = "kvstore-"
ZMQ_THREAD_PREFIX = "ZMQbg"
GRACE_S = 5.0
POLL_S = 0.02


def _fds(pid: str) -> Iterator[tuple[int, str]]:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # gone, or another user's
    for name in names:
        with suppress(OSError):  # closed since, as the listing's own descriptor is
            yield int(name), os.readlink(f"/proc/{pid}/fd/{name}")


def open_fds() -> dict[int, str]:
    """This process's open file descriptors and what they point at."""
    return dict(_fds("self"))


def live_threads() -> dict[int, str]:
    """Python's threads and ZeroMQ's, by native id; pools of numerical libraries are left out."""
    found = {thread.native_id or 0: thread.name for thread in threading.enumerate()}
    for name in os.listdir("/proc/self/task"):
        try:
            title = Path(f"/proc/self/task/{name}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith(ZMQ_THREAD_PREFIX):
            found.setdefault(int(name), title)
    return found


def live_children(root: int | None = None) -> dict[int, str]:
    """Running descendants of this process, without those that only wait to be reaped."""
    parents: dict[int, tuple[int, str, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            title, _, rest = text.partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            parents[int(name)] = (int(parent), title, state)
    found: dict[int, str] = {}
    layer = {os.getpid() if root is None else root}
    while layer:
        layer = {pid for pid, (parent, _, _) in parents.items() if parent in layer}
        found |= {pid: parents[pid][1] for pid in layer if parents[pid][2] not in "ZX"}
    return found


def shm_entries() -> set[str]:
    """Files and directories of kvstore daemons in ``/dev/shm``."""
    try:
        return {name for name in os.listdir(SHM) if name.startswith(SHM_PREFIX)}
    except FileNotFoundError:
        return set()


def shm_holders(name: str) -> set[int]:
    """Processes that have a file at or below a shared-memory entry open."""
    path = str(SHM / name)
    holders = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if any(link == path or link.startswith(f"{path}/") for _, link in _fds(pid)):
            holders.add(int(pid))
    return holders


def _named(kind: str, found: Iterable[tuple[int, str]]) -> list[str]:
    return [f"{kind} {number} ({name})" for number, name in sorted(found)]


@dataclass(frozen=True)
class Snapshot:
    """What was there before a test."""

    fds: dict[int, str]
    threads: dict[int, str]
    children: dict[int, str]
    shm: set[str]

    @classmethod
    def take(cls) -> Snapshot:
        """The resources of this moment."""
        gc.collect()
        return cls(open_fds(), live_threads(), live_children(), shm_entries())

    def new(self) -> list[str]:
        """What is there now and was not then, in words.

        A descriptor counts only when there are more than before: replacing one that outlives the test (a
        reconnected socket of a longer-lived fixture) is no leak.
        """
        fds, threads, children = open_fds(), live_threads(), live_children()
        leaks = []
        if len(fds) > len(self.fds):
            leaks += _named("fd", fds.items() - self.fds.items())
        leaks += _named("thread", ((at, name) for at, name in threads.items() if at not in self.threads))
        leaks += _named("process", ((pid, name) for pid, name in children.items() if pid not in self.children))
        ours = {os.getpid(), *children}
        for name in sorted(shm_entries() - self.shm):
            holders = shm_holders(name)
            if not holders or holders & ours:
                leaks.append(f"shared memory {SHM / name}")
        return leaks

    def leaks_since(self, grace_s: float = GRACE_S) -> list[str]:
        """What is still new when the grace period ends; empty as soon as nothing is."""
        end = time.monotonic() + grace_s
        while leaks := self.new():
            if time.monotonic() >= end:
                return leaks
            gc.collect()
            time.sleep(POLL_S)
        return []
