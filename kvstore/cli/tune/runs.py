"""Which simulations a question takes, and carrying them out on all cores.

What LRU hits comes from one pass over the trace, whatever the capacities; where nothing ever leaves the cache, from
counting. Everything else is a run: one policy at one capacity, of all blocks or of a sample of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.context import SpawnContext
from typing import Any, Final, NamedTuple

from kvstore.errors import KVStoreError
from kvstore.simulator.clairvoyant import CLAIRVOYANT, simulate_clairvoyant
from kvstore.simulator.prefix import simulate
from kvstore.simulator.sampling import HitRates, Sample, Workload
from kvstore.simulator.tiered import simulate_tiered

__all__ = ["LRU", "Rates", "Run", "carry_out", "lru_rate", "planned", "sampling_rate"]

LRU: Final = "lru"

_SAMPLED_USES: Final = 60_000
"""Uses of blocks that a sample aims at."""
_LEAST_CAPACITY: Final = 100
"""Sampled blocks that a cache holds at least: below, its grain is too coarse."""
_ALONE_BELOW: Final = 500_000
"""Uses of blocks in all runs together, below which further processes take longer to start than they save."""
_CURVE_USES: Final = 1_500_000
"""Most uses of blocks that the curve of LRU is made of: about 3 us for each."""
_POLL_S: Final = 0.1


class Run(NamedTuple):
    """One simulation.

    Attributes:
        policy: its name.
        dram_blocks, ssd_blocks: capacities; without an SSD 0.
        rate: share of the blocks; 1 for an exact run.
    """

    policy: str
    dram_blocks: int
    ssd_blocks: int
    rate: float


class Rates(NamedTuple):
    """What a run gives: hits in both tiers, the part of them that the SSD serves, and blocks written to it."""

    both: HitRates
    ssd: HitRates
    written_blocks: int = 0


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def sampling_rate(workload: Workload, capacity_blocks: int, *, exact: bool) -> float:
    """Share of the blocks that a run at a capacity takes, a power of a half."""
    cold = max(1, workload.asked.whole - workload.hot_uses)
    room = capacity_blocks - len(workload.hot)
    wanted = max(_SAMPLED_USES / cold, _LEAST_CAPACITY / room if room > 0 else 1.0)
    if exact or wanted > 0.5:
        return 1.0
    rate = 0.5
    while rate / 2 >= wanted:
        rate /= 2
    return rate


def planned(
    workload: Workload, policies: Iterable[str], tiers: Iterable[tuple[int, int]], *, exact: bool
) -> dict[tuple[str, int, int], Run]:
    """The runs that policies take, by policy and blocks in DRAM and on the SSD; none where a count will do.

    The clairvoyant bound knows no tiers: it has a run for DRAM, and one for all blocks together.
    """
    runs = {}
    for dram, ssd in dict.fromkeys(tiers):
        for policy in dict.fromkeys(policies):
            for blocks, below in ((dram + ssd, 0), (dram, 0)) if policy == CLAIRVOYANT else ((dram, ssd),):
                if blocks < workload.distinct_blocks and (below or policy != LRU):
                    rate = sampling_rate(workload, blocks, exact=exact)
                    runs[policy, blocks, below] = Run(policy, blocks, below, rate)
    return runs


def carry_out(
    workload: Workload, runs: Iterable[Run], on_requests: Callable[[int], None] = lambda done: None
) -> dict[Run, Rates]:
    """Carry runs out, the longest first.

    Args:
        workload: of the trace.
        runs: in any order.
        on_requests: is told now and then how many requests of all runs are done.

    Raises:
        KVStoreError: a process ended before it was done.
    """
    runs = sorted(
        runs, key=lambda run: (run.policy == CLAIRVOYANT, -run.rate, not run.ssd_blocks, run.policy != "adaptive")
    )
    workers = min(len(os.sched_getaffinity(0)), len(runs))
    if workers < 2 or sum(workload.asked.whole * run.rate for run in runs) < _ALONE_BELOW:
        return _alone(workload, runs, on_requests)
    # Spawned, not forked: this process may have threads.
    context: SpawnContext = get_context("spawn")
    done, stop = context.Value("q", 0), context.Value("b", 0)
    # Samples are made here, once: they are small, and the trace may be large.
    pool = ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(_requests_of(workload, runs), done, stop)
    )
    try:
        futures: dict[Future[Rates], Run] = {pool.submit(_carry_out_here, run): run for run in runs}
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=_POLL_S)
            on_requests(done.value)
            for future in ended:
                future.result()
        return {run: future.result() for future, run in futures.items()}
    except OSError as error:
        raise KVStoreError(f"cannot simulate in {workers} processes: {error}") from error
    except RuntimeError as error:  # a broken pool is one
        raise KVStoreError(f"a process that simulated ended before it was done ({error}): is there memory?") from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def _alone(workload: Workload, runs: Sequence[Run], on_requests: Callable[[int], None]) -> dict[Run, Rates]:
    requests = _requests_of(workload, runs)
    results = {}
    for number, run in enumerate(runs):
        before = number * len(workload.arrivals)

        def progress(done: int, before: int = before) -> None:
            on_requests(before + done)

        results[run] = _simulated(run, requests[run.rate], progress)
    return results


def _requests_of(workload: Workload, runs: Sequence[Run]) -> dict[float, Workload | Sample]:
    """What runs simulate, by the share of the blocks that they take."""
    rates = {run.rate for run in runs}
    return {rate: workload if rate >= 1 else workload.sample(rate) for rate in rates}


def _simulated(run: Run, requests: Workload | Sample, progress: Callable[[int], None]) -> Rates:
    """A run, on all of a trace or a sample of it."""
    arrivals, dram_blocks, ssd_blocks = requests.arrivals, run.dram_blocks, run.ssd_blocks
    if isinstance(requests, Sample):
        dram_blocks = max(1, requests.capacity_blocks(dram_blocks))
        ssd_blocks = max(1, round(ssd_blocks * run.rate))
    if run.ssd_blocks:
        tiers = simulate_tiered(arrivals, run.policy, dram_blocks, ssd_blocks, progress=progress)
        both, dram = requests.hit_rates([*map(int.__add__, tiers.dram, tiers.ssd)]), requests.hit_rates(tiers.dram)
        ssd = HitRates(both.whole - dram.whole, both.second_half - dram.second_half)
        return Rates(both, ssd, round(tiers.written / run.rate))
    if run.policy == CLAIRVOYANT:
        outcome = simulate_clairvoyant(arrivals, dram_blocks)
        progress(len(arrivals))
    else:
        outcome = simulate(arrivals, run.policy, dram_blocks, progress=progress)
    return Rates(requests.hit_rates(outcome.hits), HitRates(0.0, 0.0))


_requests: dict[float, Workload | Sample] = {}
_done: Any = None
_stop: Any = None


def _begin(requests: dict[float, Workload | Sample], done: Any, stop: Any) -> None:
    """In a new process: what all runs share."""
    global _requests, _done, _stop
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _requests, _done, _stop = requests, done, stop


def _carry_out_here(run: Run) -> Rates:
    told = 0

    def progress(done: int) -> None:
        nonlocal told
        with _done.get_lock():
            _done.value += done - told
        told = done
        if _stop.value:
            raise _Stopped

    return _simulated(run, _requests[run.rate], progress)


def lru_rate(workload: Workload, *, exact: bool) -> float:
    """Share of the blocks that the curve of LRU rests on: all, where that does not take long."""
    rate = 1.0
    while not exact and workload.asked.whole * rate > _CURVE_USES:
        rate /= 2
    return rate
