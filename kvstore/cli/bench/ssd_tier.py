"""A daemon with an SSD tier that the benchmark drives: putting without end, waiting for what it wrote, bringing it up.

Covers: what is done to the daemon, what the tier's counters say of it, and the checks that a figure rests on (nothing
was lost, no error, direct I/O). Does not cover fio, rounds, or rows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from kvstore.cli.bench.local_blocks import wrong
from kvstore.cli.bench.local_sustained import machine_busy_ns, process_cpu_ns
from kvstore.cli.bench.process import ChildProcess
from kvstore.cli.bench.ssd_blocks import CHAIN_BLOCKS, Blocks, blocks_of, keys_of
from kvstore.cli.bench.ssd_putter import GO, STOP
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.protocol.statistics import SsdStats
from kvstore_client import Client

__all__ = ["ASKERS", "Moved", "SsdDaemon", "ssd_daemon"]

ASKERS: Final = 2
"""Clients that ask for promotions, a chain each at a time: as one chain ends the other keeps the SSD busy."""

_POLL_S: Final = 0.005
_PATIENCE_S: Final = 120.0
_SETTLED_POLLS: Final = 10
_WARM_UP_BLOCKS: Final = 2 * CHAIN_BLOCKS
_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Moved:
    """What went to the SSD or came from it.

    Attributes:
        blocks: how many.
        seconds: that took.
        cpu_ns: of the daemon, all threads.
        others_share: cores that processes used which the benchmark did not start.
    """

    blocks: int
    seconds: float
    cpu_ns: int
    others_share: float


@contextlib.contextmanager
def ssd_daemon(endpoint: str, pid: int, codec: str) -> Iterator[SsdDaemon]:
    """A daemon, with clients of its own and a process that puts.

    Args:
        endpoint: of the daemon.
        pid: its process.
        codec: of the blocks, "" for plain bytes.
    """
    with contextlib.ExitStack() as stack:
        putter = stack.enter_context(
            ChildProcess("the putting client", "kvstore.cli.bench.ssd_putter", codec, endpoint)
        )
        blocks = blocks_of(codec, endpoint)
        stack.callback(blocks.close)
        askers = [
            stack.enter_context(Client(endpoint, namespace=blocks.namespace, timeout=_TIMEOUT_S, mapped=False))
            for _ in range(ASKERS)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(ASKERS, "bench-ssd"))
        putter.wait_until_ready(time.monotonic() + _PATIENCE_S)
        yield SsdDaemon(pid, blocks, putter, askers, pool)


class SsdDaemon:
    """A daemon and what drives it.

    Args:
        pid: the daemon's process.
        blocks: of the kind that is put.
        putter: process that puts such blocks, ready.
        askers: clients that ask for promotions, in threads of ``pool``.
        pool: with a thread for each of them.

    Attributes:
        blocks: as given.
        measured_pids: processes that belong to the benchmark; add those that others start.
    """

    def __init__(
        self,
        pid: int,
        blocks: Blocks,
        putter: ChildProcess,
        askers: Sequence[Client],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.blocks = blocks
        self.measured_pids = [pid, putter.pid]
        self._pid = pid
        self._client = blocks.client
        self._putter = putter
        self._askers = askers
        self._pool = pool
        self._chains = 0

    # ------------------------------------------------------------------ what the tier says

    def stats(self) -> SsdStats:
        """Of the SSD tier.

        Raises:
            RemoteError: there is none, or it is not in order.
        """
        ssd = self._client.stats().ssd
        if ssd is None:
            raise wrong("the daemon has no SSD tier")
        if ssd.state != "ok" or ssd.write_errors or ssd.read_errors or ssd.corrupt_records:
            raise wrong(
                f"the SSD tier is {ssd.state} ({ssd.problem or 'no problem named'}): {ssd.write_errors} write errors, "
                f"{ssd.read_errors} read errors, {ssd.corrupt_records} corrupt records"
            )
        if not ssd.direct:
            raise wrong("the SSD tier does not use direct I/O: its figures would be those of the page cache")
        return ssd

    def check_nothing_was_dropped(self) -> None:
        """Whether every block that left DRAM was written first.

        Raises:
            RemoteError: some were not.
        """
        ssd = self.stats()
        if ssd.dropped_blocks or ssd.not_admitted_blocks:
            raise wrong(f"{ssd.dropped_blocks + ssd.not_admitted_blocks} blocks left DRAM without a copy on the SSD")

    # ------------------------------------------------------------------ putting

    def start_putting(self) -> None:
        """Have chains put without end; returns when blocks are committed at the pace at which they come."""
        begin = self.stats().demoted_blocks
        self._putter.tell(GO)
        self._wait(lambda: self.stats().demoted_blocks - begin >= _WARM_UP_BLOCKS, "blocks to be demoted")

    def stop_putting(self) -> None:
        """Have the putting end, and wait until the tier has written what it had to."""
        self._putter.tell(STOP)
        answer = self._putter.answer(time.monotonic() + _PATIENCE_S)
        if not answer.isdigit():
            raise KVStoreError(f"the putting client: {answer}")
        self._chains = int(answer)
        self.settle()

    def fill(self) -> None:
        """Put until the SSD is full and blocks leave it: then all of its slabs are formatted and written through."""
        begin = self.stats().evicted_blocks
        self.start_putting()
        self._wait(lambda: self.stats().evicted_blocks - begin >= CHAIN_BLOCKS, "the SSD tier to be full")
        self.stop_putting()

    def settle(self) -> None:
        """Wait until the SSD is left alone."""
        quiet = 0
        before = -1

        def settled() -> bool:
            nonlocal quiet, before
            ssd = self.stats()
            now = ssd.demoted_blocks + ssd.promoted_blocks
            quiet = quiet + 1 if now == before and not ssd.waiting_blocks and not ssd.writing_bytes else 0
            before = now
            return quiet >= _SETTLED_POLLS

        self._wait(settled, "the SSD tier to have nothing to do", watch_putter=False)

    def demoted(self, count: int) -> Moved:
        """What is committed while blocks are being put: at least ``count``, from one commit to another."""
        first = self._next_commit(self.stats().demoted_blocks)
        usage = _Usage(self._pid, self.measured_pids)
        begin = last = first
        began = ended = time.perf_counter()
        while last - begin < count:
            last = self._next_commit(last)
            ended = time.perf_counter()
        cpu_ns, others = usage.since()
        return Moved(last - begin, ended - began, cpu_ns, others)

    def demoted_blocks(self) -> int:
        """Committed so far."""
        return self.stats().demoted_blocks

    def _next_commit(self, known: int) -> int:
        found = known

        def changed() -> bool:
            nonlocal found
            found = self.stats().demoted_blocks
            return found != known

        self._wait(changed, "a commit of the SSD tier")
        return found

    # ------------------------------------------------------------------ bringing up

    def chains_below(self, least_bytes: int) -> list[int]:
        """Numbers of chains that are whole on the SSD and not in DRAM, the last put ones first.

        Args:
            least_bytes: of their records.

        Raises:
            RemoteError: there are not so many.
        """
        needed = -(-least_bytes // (CHAIN_BLOCKS * self.blocks.record_bytes))
        found: list[int] = []
        for chain in range(self._chains - 1, -1, -1):
            known = self._client.match(keys_of(chain))
            if known.hits == CHAIN_BLOCKS and set(known.tiers) == {"ssd"}:
                found.append(chain)
                if len(found) == needed:
                    return found
        raise wrong(f"of {self._chains} chains {len(found)} are whole on the SSD alone; {needed} are needed")

    def promote(self, chains: Sequence[int]) -> Moved:
        """Bring chains up, and wait for all.

        Raises:
            RemoteError: fewer blocks came up from the SSD than they have.
        """
        before = self.stats().promoted_blocks
        usage, started = _Usage(self._pid, self.measured_pids), time.perf_counter()
        self._promote_while(chains, lambda: True, once=True)
        seconds = time.perf_counter() - started
        cpu_ns, others = usage.since()
        count = len(chains) * CHAIN_BLOCKS
        promoted = self.stats().promoted_blocks - before
        if promoted < count:
            raise wrong(f"only {promoted} of {count} blocks came up from the SSD")
        return Moved(count, seconds, cpu_ns, others)

    def promote_while(self, chains: Sequence[int], going: Callable[[], bool]) -> int:
        """Bring chains up, again and again, while a condition holds; how many blocks came."""
        before = self.stats().promoted_blocks
        self._promote_while(chains, going, once=False)
        return self.stats().promoted_blocks - before

    def _promote_while(self, chains: Sequence[int], going: Callable[[], bool], *, once: bool) -> None:
        todo, lock = deque(chains), threading.Lock()

        def ask(client: Client) -> None:
            while going():
                with lock:
                    if not todo:
                        return
                    chain = todo.popleft()
                    if not once:
                        todo.append(chain)
                client.prefetch(keys_of(chain), wait=True)

        for answer in [self._pool.submit(ask, asker) for asker in self._askers]:
            answer.result(_PATIENCE_S)

    # ------------------------------------------------------------------ waiting

    def _wait(self, condition: Callable[[], bool], what: str, *, watch_putter: bool = True) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            if watch_putter and self._putter.has_answer():
                raise KVStoreError(f"the putting client: {self._putter.answer(deadline)}")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"waited {_PATIENCE_S:g} s for {what}; is the disk in order?")
            time.sleep(_POLL_S)


class _Usage:
    """CPU time from now on."""

    def __init__(self, daemon_pid: int, measured_pids: Sequence[int]) -> None:
        self._daemon_pid = daemon_pid
        self._pids = list(measured_pids)
        self._started = time.perf_counter_ns()
        self._busy_ns = machine_busy_ns()
        self._own_ns = time.process_time_ns()
        self._ns = [process_cpu_ns(pid) for pid in self._pids]

    def since(self) -> tuple[int, float]:
        """CPU time of the daemon, and cores that other processes used."""
        ns = [process_cpu_ns(pid) - before for pid, before in zip(self._pids, self._ns, strict=True)]
        ours_ns = sum(ns) + time.process_time_ns() - self._own_ns
        others_ns = machine_busy_ns() - self._busy_ns - ours_ns
        elapsed_ns = time.perf_counter_ns() - self._started
        return ns[self._pids.index(self._daemon_pid)], max(others_ns / elapsed_ns, 0.0)
