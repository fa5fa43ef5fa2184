"""What the store's state machine costs by itself: microseconds a put with eviction and a block touched.

Baseline: the same keys through an ``OrderedDict`` as an LRU (``move_to_end``, ``popitem``), in the same run. No I/O, no
bytes: what the arena's copies and the messages cost is not in here. Prints one JSON object.

Usage: ``python benchmarks/core_put.py [--capacity-blocks N] [--puts N] [--repeat N]``
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import count, islice

import msgspec

from kvstore.cli.bench.machine import machine_facts
from kvstore.core.block import runs_of
from kvstore.core.events import (
    Accessed,
    Committed,
    CommittedRecord,
    Joined,
    LeaseReleased,
    LeaseWanted,
    PopulationEnded,
    Quiesced,
    SessionOpened,
    SlabPopulated,
    SlotWanted,
)
from kvstore.core.instructions import Grant, Leased, Namespaced, Withdraw
from kvstore.core.invariants import validate_state
from kvstore.core.misses import Misses
from kvstore.core.slabs import SlabAllocator
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.policy.base import PolicyContext
from kvstore.policy.curve import LiveCurve
from kvstore.policy.registry import make_policy
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace

SLOT_PAGES = 65
"""Slots of a 256 KiB block and its header."""
SLAB_SLOTS = 63
CHAIN_BLOCKS = 1024
WATCHES = ("", "curve", "causes")
"""Who looks on: nobody, the live curve, and what gives misses their causes."""
EXPLAIN_BYTES = 32 << 20


def _keys() -> Iterator[bytes]:
    return (sha256(number.to_bytes(8, "little")).digest() for number in count())


class Harness:
    """A full store of ``capacity_blocks`` and one client; ``watch``: who looks on, one of ``WATCHES``."""

    def __init__(self, capacity_blocks: int, policy: str, watch: str = "") -> None:
        self.capacity_blocks = capacity_blocks
        slot_bytes = SLOT_PAGES * 4096
        slabs = -(-(capacity_blocks + 2048) // SLAB_SLOTS)
        grant_bytes = 2048 * slot_bytes
        limits = StoreLimits(
            capacity_bytes=capacity_blocks * slot_bytes, grant_bytes=grant_bytes, grant_bytes_per_session=grant_bytes
        )
        self.store = Store(
            limits,
            SlabAllocator(slabs, SLAB_SLOTS * slot_bytes, 512),
            make_policy(policy, PolicyContext(limits.capacity_bytes, lambda: 0)),
        )
        if watch == "curve":
            self.store.watchers.append(LiveCurve(limits.capacity_bytes, time.monotonic_ns))
        if watch == "causes":
            Misses.watch(self.store, EXPLAIN_BYTES)
        for index in range(slabs):
            self.store.handle(SlabPopulated(index), 0)
        self.store.handle(PopulationEnded(), 0)
        self.store.handle(SessionOpened(1), 0)
        self.record_bytes = slot_bytes - 3000
        (answer,) = self.store.handle(Joined(Namespace(name="bench"), (self.record_bytes,)), 0)
        assert isinstance(answer, Namespaced)
        self.namespace = answer.namespace

    def put(self, keys: list[bytes], parent: bytes = ROOT_KEY) -> None:
        """One put of a chain: slots, commit, and what is evicted for it."""
        store, digest, record_bytes = self.store, self.namespace.digest, self.record_bytes
        records = []
        for key in keys:
            (granted,) = store.handle(SlotWanted(1, record_bytes), 0)
            assert isinstance(granted, Grant)
            records.append(CommittedRecord(granted.record.slot, key, parent, digest, 0, record_bytes, 1, 0))
            parent = key
        for instruction in store.handle(Committed(1, self.namespace.id, tuple(records)), 0):
            if isinstance(instruction, Withdraw):
                store.handle(Quiesced(instruction.slots), 0)

    def fill(self, keys: Iterator[bytes], chain: int) -> None:
        while self.store.block_count < self.capacity_blocks:
            self.put(list(islice(keys, chain)))


def _median_us(action: Callable[[], int], repeat: int) -> tuple[float, float]:
    """Median and best microseconds for each unit of ``action``, which returns how many it did."""
    figures = []
    for _ in range(repeat):
        gc.collect()
        begin = time.perf_counter_ns()
        done = action()
        figures.append((time.perf_counter_ns() - begin) / 1000 / done)
    return statistics.median(figures), min(figures)


def _medians_us(actions: list[Callable[[], int]], repeat: int) -> list[tuple[float, float]]:
    """As ``_median_us`` of each of several actions that take turns."""
    figures: list[list[float]] = [[] for _ in actions]
    for _ in range(repeat):
        for action, told in zip(actions, figures, strict=True):
            gc.collect()
            begin = time.perf_counter_ns()
            done = action()
            told.append((time.perf_counter_ns() - begin) / 1000 / done)
    return [(statistics.median(told), min(told)) for told in figures]


def _putting(harness: Harness, keys: Iterator[bytes], batch: int, puts: int) -> Callable[[], int]:
    """Puts of chains of so many blocks."""

    def put() -> int:
        rounds = max(puts // batch, 1)
        for _ in range(rounds):
            harness.put(list(islice(keys, batch)))
        return rounds * batch

    return put


def _chained(capacity_blocks: int, policy: str, watch: str) -> tuple[Harness, list[list[bytes]]]:
    """A store that is full of chains."""
    harness, keys = Harness(capacity_blocks, policy, watch), _keys()
    chains = []
    while harness.store.block_count + CHAIN_BLOCKS <= capacity_blocks:
        chains.append(list(islice(keys, CHAIN_BLOCKS)))
        harness.put(chains[-1])
    return harness, chains


def _accessing(harness: Harness, chains: list[list[bytes]], blocks_each: int, puts: int) -> Callable[[], int]:
    """Matches of the first blocks of chains."""
    store, namespace = harness.store, harness.namespace

    def run() -> int:
        done = 0
        for index in range(max(puts // blocks_each, 1)):
            found = store.leading(namespace.id, chains[index % len(chains)][:blocks_each])
            store.handle(Accessed(1, 0, runs_of(found), len(found), namespace_id=namespace.id), 0)
            done += len(found)
        return done

    return run


def _with(watch: str) -> str:
    return f"_with_{watch}" if watch else ""


def _baseline(capacity_blocks: int, puts: int, repeat: int) -> tuple[float, float]:
    lru: OrderedDict[bytes, int] = OrderedDict()
    keys = _keys()
    for key in islice(keys, capacity_blocks):
        lru[key] = 1

    def run() -> int:
        batch = list(islice(keys, puts))
        for key in batch:
            lru[key] = 1
            lru.move_to_end(key)
            lru.popitem(last=False)
        return puts

    return _median_us(run, repeat)


def measure(capacity_blocks: int, puts: int, repeat: int, policy: str) -> dict[str, object]:
    """All rows."""
    rows: list[dict[str, object]] = []
    baseline_us, baseline_best_us = _baseline(capacity_blocks, puts, repeat)

    def row(op: str, batch: int, figures: tuple[float, float]) -> None:
        median, best = figures
        rows.append(
            {
                "op": op,
                "batch": batch,
                "median_us": round(median, 3),
                "best_us": round(best, 3),
                "ratio": round(baseline_us / median, 3),
            }
        )

    row("ordered_dict_put_and_evict", 1, (baseline_us, baseline_best_us))
    for batch in (1, 16, CHAIN_BLOCKS):
        stores = [(Harness(capacity_blocks, policy, watch), _keys()) for watch in WATCHES]
        for harness, keys in stores:
            harness.fill(keys, 16)
        # By turns: what else the machine does meanwhile disturbs both alike.
        figures = _medians_us([_putting(*one, batch, puts) for one in stores], repeat)
        for watch, figure in zip(WATCHES, figures, strict=True):
            row(f"put_and_evict{_with(watch)}", batch, figure)
        for harness, _ in stores:
            validate_state(harness.store)

    chained = [_chained(capacity_blocks, policy, watch) for watch in WATCHES]
    for blocks_each in (1, 16, CHAIN_BLOCKS):
        figures = _medians_us([_accessing(*one, blocks_each, puts) for one in chained], repeat)
        for watch, figure in zip(WATCHES, figures, strict=True):
            row(f"find_and_touch_block{_with(watch)}", blocks_each, figure)
    harness, chains = chained[0]
    store, namespace = harness.store, harness.namespace

    def lease() -> int:
        rounds = max(puts // CHAIN_BLOCKS, 1)
        for index in range(rounds):
            found = store.leading(namespace.id, chains[index % len(chains)])
            (leased,) = store.handle(LeaseWanted(1, found, 10**9), 0)
            assert isinstance(leased, Leased)
            store.handle(LeaseReleased(1, leased.lease), 0)
        return rounds * CHAIN_BLOCKS

    row("lease_and_release_block", CHAIN_BLOCKS, _median_us(lease, repeat))
    validate_state(store)
    return {
        "machine": msgspec.to_builtins(machine_facts()),
        "baseline": "ordered_dict_put_and_evict",
        "capacity_blocks": capacity_blocks,
        "policy": policy,
        "rows": rows,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capacity-blocks", type=int, default=16_384)
    parser.add_argument("--puts", type=int, default=32_768, help="blocks put, or touched, in each repetition")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--policy", default="lru")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.capacity_blocks, options.puts, options.repeat, options.policy), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
