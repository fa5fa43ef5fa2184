"""What eviction policies cost: microseconds an accessed block, simulated in prefix mode with the daemon's own policies.

Baseline: an LRU on an ``OrderedDict`` in the same run, with the same requests: it counts the leading blocks that are
there, then moves or inserts each block of the request, deepest first, and evicts (``move_to_end``, ``popitem``). The
simulator's blocks, their tree and their dict are part of what is measured for policies; the row ``simulator`` is a run
of it that was told LRU's victims beforehand, and ``own_us`` of a policy is what it takes beyond that. Time is the
process's own, and policies take turns, so that what else the machine does disturbs all alike. Prints one JSON object.

Usage: ``python benchmarks/policy_cost.py [--trace FILE] [--capacity-blocks N] [--policies a,b] [--repeat N]``
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

import msgspec

from kvstore.cli.bench.machine import machine_facts
from kvstore.errors import InvalidArgument
from kvstore.policy.base import Evictable
from kvstore.policy.lru import Lru
from kvstore.policy.registry import POLICIES, SIMULATED
from kvstore.simulator.arrivals import Arrival, full_block_arrivals
from kvstore.simulator.block import SimulatedBlock
from kvstore.simulator.prefix import PrefixCache, simulate
from kvstore.simulator.trace import read_trace

BASELINE = "ordered_dict_lru"
SIMULATOR = "simulator"
LIMITS = {"lru": 1 / 3, "adaptive": 1 / 25}


def synthetic_arrivals(count: int) -> list[Arrival]:
    """Chat sessions that share system prompts, grow with each turn, and mostly have one or two turns."""
    draw = random.Random(1)
    unused = iter(range(1 << 40))
    systems = [[next(unused) for _ in range(draw.randint(1, 4))] for _ in range(4)]
    sessions: list[list[int]] = []
    arrivals = []
    for now in range(count):
        if not sessions or draw.random() < 0.6:
            sessions.append(list(draw.choice(systems)))
        session = sessions[-1 - min(int(draw.expovariate(0.002)), len(sessions) - 1)]
        session.extend(next(unused) for _ in range(min(int(draw.expovariate(0.06)), 240 - len(session))))
        arrivals.append(Arrival(now * 300_000_000, tuple(session)))
    return arrivals


def ordered_dict_hits(arrivals: Sequence[Arrival], capacity_blocks: int) -> list[int]:
    """The baseline."""
    lru: OrderedDict[int, None] = OrderedDict()
    hits = []
    for _, ids in arrivals:
        hits.append(sum(1 for _ in takewhile(lru.__contains__, ids)))
        for key in reversed(ids):
            if key in lru:
                lru.move_to_end(key)
            else:
                if len(lru) >= capacity_blocks:
                    lru.popitem(last=False)
                lru[key] = None
    return hits


class _Told:
    """A policy that decides nothing: it has a list of victims."""

    name = "told"

    def __init__(self, victims: Sequence[int | None]) -> None:
        self._victims = iter(victims)
        self.resident: dict[int, SimulatedBlock] = {}

    def insert(self, block: Evictable, access: int) -> None:
        pass

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        pass

    def discard(self, block: Evictable, *, evicted: bool = False) -> None:
        pass

    def released(self, block: Evictable) -> None:
        pass

    def next_victim(self, before: int | None = None) -> Evictable | None:
        key = next(self._victims)
        return None if key is None else self.resident[key]


class _Telling(Lru):
    """LRU that notes its victims."""

    def __init__(self) -> None:
        super().__init__()
        self.victims: list[int | None] = []

    def next_victim(self, before: int | None = None) -> Evictable | None:
        victim = super().next_victim(before)
        self.victims.append(None if victim is None else victim.key)
        return victim


def _told_hits(arrivals: Sequence[Arrival], capacity_blocks: int, victims: Sequence[int | None]) -> list[int]:
    """The simulator, without a policy to wait for."""
    told = _Told(victims)
    cache = PrefixCache(told, capacity_blocks)
    told.resident = cache.resident
    return [cache.request(ids, access) if ids else 0 for access, (_, ids) in enumerate(arrivals, 1)]


def _seconds(action: Callable[[], object]) -> float:
    gc.collect()
    begin = time.process_time()
    action()
    return time.process_time() - begin


def measure(
    arrivals: Sequence[Arrival], trace: str, capacities: Sequence[int], policies: Sequence[str], repeat: int
) -> dict[str, object]:
    """All rows."""
    blocks = sum(len(arrival.ids) for arrival in arrivals)
    rows: list[dict[str, object]] = []
    for capacity_blocks in capacities:
        actions: dict[str, Callable[[], object]] = {BASELINE: partial(ordered_dict_hits, arrivals, capacity_blocks)}
        telling = _Telling()
        cache = PrefixCache(telling, capacity_blocks)
        hits = [cache.request(ids, access) if ids else 0 for access, (_, ids) in enumerate(arrivals, 1)]
        if hits != _told_hits(arrivals, capacity_blocks, telling.victims):
            raise AssertionError("the simulator hits otherwise when it is told the victims")
        actions[SIMULATOR] = partial(_told_hits, arrivals, capacity_blocks, telling.victims)
        for policy in policies:
            actions[policy] = partial(simulate, arrivals, policy, capacity_blocks)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeat):
            for name, action in actions.items():
                seconds[name].append(_seconds(action))
        baseline_us, simulator_us = (statistics.median(seconds[name]) / blocks * 1e6 for name in (BASELINE, SIMULATOR))
        for name, told in seconds.items():
            median_us = statistics.median(told) / blocks * 1e6
            row: dict[str, object] = {
                "op": name,
                "capacity_blocks": capacity_blocks,
                "median_us": round(median_us, 3),
                "best_us": round(min(told) / blocks * 1e6, 3),
                "baseline_median_us": round(baseline_us, 3),
                "ratio": round(baseline_us / median_us, 4),
            }
            if name not in (BASELINE, SIMULATOR):
                row["own_us"] = round(median_us - simulator_us, 3)
            if name in LIMITS:
                row["limit"] = round(LIMITS[name], 4)
            rows.append(row)
    return {
        "machine": msgspec.to_builtins(machine_facts()),
        "baseline": BASELINE,
        "trace": trace,
        "requests": len(arrivals),
        "blocks": blocks,
        "rows": rows,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", default="", help="a trace in the Mooncake format; without it, a synthetic one")
    parser.add_argument("--requests", type=int, default=12_000, help="the first so many of the trace")
    parser.add_argument("--capacity-blocks", default="2000,10000", help="capacities, separated by commas")
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"of {','.join(SIMULATED)}")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        if options.trace:
            arrivals = full_block_arrivals(read_trace(options.trace, options.requests))
        else:
            arrivals = synthetic_arrivals(options.requests)
        capacities = [int(capacity) for capacity in options.capacity_blocks.split(",")]
        report = measure(
            arrivals, options.trace or "synthetic", capacities, options.policies.split(","), options.repeat
        )
    except (InvalidArgument, ValueError) as error:
        print(f"policy_cost: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
