"""Stages with a daemon: clients read and write through the SDK while clients and the daemon are stopped and killed."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.cli.stress.client_role import NAMESPACE, TIMEOUT_S
from kvstore.cli.stress.crew import Crew, Worker, WorkerDied, wait_for_any
from kvstore.cli.stress.private_daemon import MIB, StressedDaemon, accounting_problems, leaked_slots
from kvstore.cli.stress.report import StageReport
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.protocol.statistics import DaemonStats
from kvstore_client import Client

__all__ = ["DAEMON_STAGES", "run_daemon_stage"]

DAEMON_STAGES: Final = ("64 KiB", "1 MiB", "mixed")
"""Names of profiles."""

_CLIENTS: Final = 2
_ANSWER_S: Final = 30.0
_GONE_S: Final = 15.0
_SERVED_S: Final = 10.0
_SLOWEST_PING_S: Final = 5.0
_STOP_S: Final = (0.1, 0.8)
_PAUSE_S: Final = (0.02, 0.3)
_MOST_GROWTH_BYTES: Final = 32 * MIB
_MOST_CLIENT_GROWTH_BYTES: Final = 64 * MIB
"""More, because what a client of this stress holds for a moment is up to 60 MiB of buffers."""

_MORE_FDS: Final = 8
_DAEMON_KILL_EVERY_S: Final = 12.0
_CLIENT_KILL_EVERY_S: Final = 10.0


@dataclass(slots=True)
class _Uses:
    """What the daemon of the moment was seen to use."""

    idle_fds: int
    idle_threads: int
    private_bytes: list[int] = field(default_factory=list)


class _Stage:
    """One stage under way."""

    def __init__(self, crew: Crew, profile: str, seconds: float, seed: int) -> None:
        self._crew = crew
        self._profile = profile
        self._seconds = seconds
        self._rng = random.Random(seed)
        self._said: dict[int, dict[str, Any]] = {}
        self._private_bytes: dict[int, list[int]] = {}
        self._counts: Counter[str] = Counter()
        self._resume_at: dict[Worker, float] = {}
        self.report = StageReport(phase="daemon", name=profile, processes=_CLIENTS + 2)

    def run(self) -> None:
        """Start a daemon, clients and mischief; look at what is left."""
        report = self.report
        *clients, mortals = self._crew.hire(_CLIENTS + 1)
        with StressedDaemon() as daemon:
            self._uses = _uses_of(daemon)
            begin = time.monotonic()
            try:
                for worker in clients:
                    self._begin(worker, "client", daemon, self._seconds)
                self._begin(mortals, "mortals", daemon, self._seconds, stopped_s=_STOP_S[0])
                self._make_mischief(daemon, clients, mortals, begin + self._seconds)
                report.seconds = time.monotonic() - begin
                self._collect(clients, mortals)
                self._look_at_what_is_left(daemon)
            except (WorkerDied, DeadlineExceeded) as error:
                report.hangs += isinstance(error, DeadlineExceeded)
                report.problems.append(str(error))
            finally:
                for worker in (*clients, mortals):
                    if worker.busy:
                        self._crew.dismiss(worker)
            report.problems += daemon.complaints()
        self._add_up()

    def _begin(self, worker: Worker, role: str, daemon: StressedDaemon, seconds: float, **more: object) -> None:
        seed = self._rng.randrange(1 << 30)
        how = {"endpoint": daemon.endpoint, "profile": self._profile, "seconds": seconds, "seed": seed}
        worker.begin(role, seconds, **how, **more)

    # -------------------------------------------------------------- while they work

    def _make_mischief(self, daemon: StressedDaemon, clients: list[Worker], mortals: Worker, end: float) -> None:
        """Stop clients for a while, kill some, kill the daemon; between that see that it answers."""
        daemon_kills = _spread(end, self._seconds, 1 + int(self._seconds // _DAEMON_KILL_EVERY_S))
        client_kills = _spread(end, self._seconds * 0.7, 1 + int(self._seconds // _CLIENT_KILL_EVERY_S))
        next_stop = time.monotonic() + 0.5
        next_pause = time.monotonic() + 1.0
        while (now := time.monotonic()) < end:
            self._listen([*clients, mortals], 0.1)
            if daemon_kills and now >= daemon_kills[0]:
                del daemon_kills[0]
                self._restart(daemon)
            if client_kills and now >= client_kills[0]:
                del client_kills[0]
                self._replace(clients, self._rng.randrange(len(clients)), daemon, end)
            if now >= next_stop:
                next_stop = now + self._rng.uniform(0.5, 1.5)
                self._stop(self._rng.choice(clients))
            if now >= next_pause:
                next_pause = now + self._rng.uniform(1.5, 4.0)
                daemon.pause(self._rng.uniform(*_PAUSE_S))
            self._resume(now)
            self._uses.private_bytes.append(daemon.resources()[0])
            self._ping(daemon)
        self._resume(float("inf"))

    def _listen(self, workers: list[Worker], timeout_s: float) -> None:
        for worker in wait_for_any([worker for worker in workers if worker.busy], timeout_s):
            for kind, content in worker.poll():
                if kind == "failed":
                    raise WorkerDied(str(content))
                if kind != "ready":
                    self._said[worker.pid] = content
                if kind == "progress":
                    self._private_bytes.setdefault(worker.pid, []).append(content["private_bytes"])

    def _restart(self, daemon: StressedDaemon) -> None:
        self._look_at_growth()
        key, data = b"s" * 32, self._rng.randbytes(MIB // 4)
        with Client(daemon.endpoint, namespace="survivor", timeout=TIMEOUT_S, mapped=True) as survivor:
            self._add_daemon(survivor.stats())
            before = survivor.incarnation
            survivor.put(key, data)
            daemon.kill_and_restart()
            if not _is_served(survivor, key, data) or survivor.incarnation == before:
                self.report.problems.append("a client of the daemon that was killed did not find the next one")
            survivor.clear()
        self._counts["daemon_kills"] += 1
        self._uses = _uses_of(daemon)

    def _replace(self, clients: list[Worker], at: int, daemon: StressedDaemon, end: float) -> None:
        """Kill a client process in whatever it does; another takes its place."""
        victim = clients[at]
        victim.signal(signal.SIGKILL)
        self._counts["clients_killed"] += 1
        self._resume_at.pop(victim, None)
        self._crew.dismiss(victim)
        clients[at] = self._crew.recruit()
        self._begin(clients[at], "client", daemon, end - time.monotonic())

    def _stop(self, worker: Worker) -> None:
        if worker.alive and worker.busy:
            worker.signal(signal.SIGSTOP)
            self._counts["clients_stopped"] += 1
            self._resume_at[worker] = time.monotonic() + self._rng.uniform(*_STOP_S)

    def _resume(self, now: float) -> None:
        for worker in [worker for worker, at in self._resume_at.items() if at <= now]:
            del self._resume_at[worker]
            worker.signal(signal.SIGCONT)

    def _ping(self, daemon: StressedDaemon) -> None:
        begin = time.monotonic()
        with Client(daemon.endpoint, namespace="witness", timeout=TIMEOUT_S, mapped=False) as witness:
            witness.ping()
        if time.monotonic() - begin > _SLOWEST_PING_S:
            self.report.problems.append("the daemon took more than 5 s to answer a ping")

    # -------------------------------------------------------------- afterwards

    def _collect(self, clients: list[Worker], mortals: Worker) -> None:
        """The last words of all."""
        deadline = time.monotonic() + _ANSWER_S
        for worker in (*clients, mortals):
            worker.stop()
        while waiting := [worker for worker in (*clients, mortals) if worker.busy]:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"{len(waiting)} processes did not end in time")
            self._listen(waiting, 0.2)
        for worker in clients:
            self._look_at_client(worker)
        found = self._said.pop(mortals.pid)
        self.report.problems += found["problems"]
        self._counts.update(found["counts"])

    def _look_at_client(self, worker: Worker) -> None:
        mappings = self._said[worker.pid]["mappings"]
        if mappings:
            self.report.problems.append(f"a process without clients still maps {mappings} arenas")
        growth = _growth_bytes(self._private_bytes.get(worker.pid, []))
        if growth > _MOST_CLIENT_GROWTH_BYTES:
            self.report.problems.append(f"a client process's own memory grew by {growth} bytes")

    def _look_at_what_is_left(self, daemon: StressedDaemon) -> None:
        """Nobody is there any more: everything must be free again, and every record sound."""
        report = self.report
        with Client(daemon.endpoint, namespace=NAMESPACE, timeout=TIMEOUT_S, mapped=False) as witness:
            end = time.monotonic() + _GONE_S
            while (stats := witness.stats()).dram.granted_bytes or stats.dram.limbo_bytes or len(stats.sessions) > 1:
                if time.monotonic() >= end:
                    report.problems.append(f"{len(stats.sessions) - 1} sessions are left of clients that are gone")
                    break
                time.sleep(0.1)
            report.problems += accounting_problems(stats)
            report.leaked_slots = leaked_slots(stats)
            report.problems += [f"verification: {problem}" for problem in witness.verify().problems]
            self._add_daemon(stats)
            if not self._counts["mapped_reads"] or not self._counts["evicted_blocks"]:
                report.problems.append("nothing was read from mapped memory, or nothing was evicted")
            witness.clear()
            empty = witness.stats()
            report.leaked_slots = max(report.leaked_slots, sum(slots.used_slots for slots in empty.dram.classes))
            report.problems += accounting_problems(empty)
        self._look_at_growth()
        _, fds, threads = daemon.resources()
        if fds > self._uses.idle_fds + _MORE_FDS or threads > self._uses.idle_threads:
            report.problems.append(f"the daemon is left with {fds} descriptors and {threads} threads")

    def _add_daemon(self, stats: DaemonStats) -> None:
        """Counts of a daemon that is about to end."""
        if stats.eviction.corrupt_records:
            self.report.problems.append(f"the daemon found {stats.eviction.corrupt_records} corrupt records")
        self._counts["mapped_reads"] += stats.lookups.mapped_reads
        self._counts["sessions_died"] += stats.server.sessions_died
        for name in ("evicted_blocks", "moved_records"):
            self._counts[name] += getattr(stats.eviction, name)

    def _look_at_growth(self) -> None:
        growth = _growth_bytes(self._uses.private_bytes)
        if growth > _MOST_GROWTH_BYTES:
            self.report.problems.append(f"the daemon's own memory grew by {growth} bytes")

    def _add_up(self) -> None:
        report = self.report
        for said in self._said.values():
            self._counts.update(said["counts"])
            self._counts["slowest_ms"] = max(self._counts["slowest_ms"], said.get("slowest_ms", 0))
        counts = self._counts
        report.reads, report.hits = counts.pop("reads", 0), counts.pop("hits", 0)
        report.wrong_blocks, report.wrong_bytes = counts.pop("wrong_blocks", 0), counts.pop("wrong_bytes", 0)
        report.hangs += counts.pop("late", 0)
        if counts["corrupt_records"]:
            report.problems.append(f"{counts['corrupt_records']} records arrived damaged")
        report.details = {name: count for name, count in sorted(counts.items()) if count}


def _growth_bytes(samples: list[int]) -> int:
    """How much more private memory a process always has in the last quarter of its life than ever in the first."""
    quarter = len(samples) // 4
    return min(samples[-quarter:]) - max(samples[:quarter]) if quarter > 1 else 0


def _spread(end: float, seconds: float, count: int) -> list[float]:
    """So many moments, evenly in the seconds before the end."""
    return [end - seconds * (1.0 - (number + 1) / (count + 1)) for number in range(count)]


def _uses_of(daemon: StressedDaemon) -> _Uses:
    """What a fresh daemon uses, once its libraries made what they keep for records that are sent."""
    key = b"w" * 32
    with Client(daemon.endpoint, namespace="witness", timeout=TIMEOUT_S, mapped=False) as witness:
        witness.put(key, bytes(MIB // 2))
        witness.get(key)
        witness.clear()
    _, fds, threads = daemon.resources()
    return _Uses(fds, threads)


def _is_served(client: Client, key: bytes, data: bytes) -> bool:
    """Whether a client can put and get through mapped memory. Puts may be refused for a while where all is held."""
    end = time.monotonic() + _SERVED_S
    while time.monotonic() < end:
        client.put(key, data)
        found = client.get(key)
        if found is not None:
            return found == data and client.mapped
        time.sleep(0.05)
    return False


def run_daemon_stage(crew: Crew, profile: str, seconds: float, seed: int) -> StageReport:
    """Run one stage for about so long, and some seconds more for its start and its end."""
    stage = _Stage(crew, profile, seconds, seed)
    try:
        stage.run()
    except KVStoreError as error:
        stage.report.problems.append(str(error))
    return stage.report
