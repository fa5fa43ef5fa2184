"""What prefetching saves: how long an engine waits for a chain that lies on the SSD when it comes to need it.

A request matches a chain, waits in the engine's queue for so long, then gets all blocks: the stall is the time of those
gets. Baseline: the same without a prefetch (``none``). ``arrival``: the match prefetches. ``hint``: a hint was given
half a second before the request came. ``resident``: the chain is in DRAM. The kinds take turns on other chains, so that
what else the machine does disturbs all alike. Queue times are multiples of the baseline's median stall.

``urgent``: the get of one block from the SSD while prefetches of other chains wait, beside the same without them.
``warm``: filling empty memory by a list, beside gets of the same blocks one chain after the other.

Usage: ``python benchmarks/prefetch.py --dir DIR [--rounds N] [--chains N]``; one JSON object. It writes about a GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from random import Random

import msgspec

from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore_client import Client, Namespace, chain_keys

BLOCK_BYTES = 256 << 10
CHAIN_BLOCKS = 32
DRAM_BYTES = 128 << 20
QUEUE_FACTORS = (0.0, 0.5, 1.0, 2.0)
HINT_AHEAD_S = 0.5


class Chains:
    """Chains that do not all fit into DRAM, each used in turn."""

    def __init__(self, client: Client, count: int) -> None:
        self.client = client
        self.outs = [bytearray(BLOCK_BYTES) for _ in range(CHAIN_BLOCKS)]
        self.all = [chain_keys([number] * 64 * CHAIN_BLOCKS, 64) for number in range(1, count + 1)]
        for number, keys in enumerate(self.all):
            data = [Random(number << 8 | at).randbytes(BLOCK_BYTES) for at in range(CHAIN_BLOCKS)]
            client.put_many(keys, data, durable=True)
        self._turn = cycle(self.all)

    def next(self) -> list[bytes]:
        """The chain that was used longest ago, which is on the SSD only."""
        return next(self._turn)

    def get(self, keys: list[bytes], request: int | None = None) -> float:
        """Seconds to get a chain."""
        begin = time.perf_counter()
        lengths = self.client.get_many_into(keys, self.outs[: len(keys)], request=request)
        elapsed = time.perf_counter() - begin
        if lengths != [BLOCK_BYTES] * len(keys):
            raise SystemExit("a block is not there: the SSD is too small for this benchmark")
        return elapsed


def _stall(chains: Chains, kind: str, queue_s: float) -> float:
    """Seconds that the engine waits for the blocks of a request."""
    client, keys = chains.client, chains.next()
    if kind == "hint":
        client.hint(keys, within_s=2 * HINT_AHEAD_S)
        time.sleep(HINT_AHEAD_S)
    if kind == "resident":
        chains.get(keys)
    found = client.match(keys, prefetch=kind == "arrival")
    time.sleep(queue_s)
    return chains.get(keys, found.request)


def _rows(chains: Chains, rounds: int) -> list[dict[str, object]]:
    kinds = ("none", "arrival", "hint", "resident")
    for _ in range(8):
        _stall(chains, "none", 0.0)
    plain_s = statistics.median(_stall(chains, "none", 0.0) for _ in range(rounds))
    rows: list[dict[str, object]] = []
    for factor in QUEUE_FACTORS:
        told: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                told[kind].append(_stall(chains, kind, factor * plain_s))
        base_s = statistics.median(told["none"])
        for kind in kinds:
            median_s = statistics.median(told[kind])
            rows.append(
                {
                    "op": f"stall_{kind}",
                    "queue": factor,
                    "size_bytes": BLOCK_BYTES,
                    "batch": CHAIN_BLOCKS,
                    "median_us": round(median_s * 1e6, 1),
                    "p90_us": round(statistics.quantiles(told[kind], n=10)[-1] * 1e6, 1),
                    "ratio": round(base_s / median_s, 3),
                }
            )
    return rows


def _urgent(chains: Chains, rounds: int) -> list[dict[str, object]]:
    """A get of one block, alone and while prefetches wait."""
    client = chains.client

    def measured(before: Callable[[], None]) -> list[float]:
        told = []
        for _ in range(rounds):
            key = chains.next()[0]
            before()
            told.append(chains.get([key]))
            # What was prefetched is up before the next one.
            while (stats := client.stats().prefetch) is not None and stats.waiting_bytes + stats.flying_bytes:
                time.sleep(0.002)
        return told

    def crowd() -> None:
        for _ in range(4):
            client.prefetch(chains.next())

    alone, crowded = measured(lambda: None), measured(crowd)
    base_s = statistics.median(alone)
    return [
        {
            "op": op,
            "size_bytes": BLOCK_BYTES,
            "batch": 1,
            "median_us": round(statistics.median(told) * 1e6, 1),
            "p90_us": round(statistics.quantiles(told, n=10)[-1] * 1e6, 1),
            "ratio": round(base_s / statistics.median(told), 3),
        }
        for op, told in (("urgent_alone", alone), ("urgent_behind_prefetches", crowded))
    ]


def _warm(arguments: tuple[str, ...], chains: list[list[bytes]]) -> list[dict[str, object]]:
    """Empty memory is filled once by a list, and once by gets; each by a daemon that was just started."""
    seconds: dict[str, float] = {}
    some = chains[: DRAM_BYTES * 5 // 8 // (BLOCK_BYTES * CHAIN_BLOCKS)]
    for op in ("warm_by_gets", "warm_by_list"):
        with PrivateDaemon(capacity_bytes=DRAM_BYTES, arguments=arguments) as daemon, _client(daemon) as client:
            outs = [bytearray(BLOCK_BYTES) for _ in range(CHAIN_BLOCKS)]
            begin = time.perf_counter()
            if op == "warm_by_list":
                result = client.warm(some)
                if result.brought != len(some) * CHAIN_BLOCKS:
                    raise SystemExit(f"not everything came up: {result}")
            else:
                for keys in some:
                    client.get_many_into(keys, outs)
            seconds[op] = time.perf_counter() - begin
    size_bytes = len(some) * CHAIN_BLOCKS * BLOCK_BYTES
    return [
        {
            "op": op,
            "size_bytes": size_bytes,
            "batch": len(some) * CHAIN_BLOCKS,
            "median_us": round(elapsed_s * 1e6, 1),
            "gb_per_s": round(size_bytes / elapsed_s / 1e9, 3),
            "ratio": round(seconds["warm_by_gets"] / elapsed_s, 3),
        }
        for op, elapsed_s in seconds.items()
    ]


def _client(daemon: PrivateDaemon) -> Client:
    return Client(daemon.endpoint, namespace=Namespace(name="prefetch", block_tokens=64), timeout=60)


def measure(directory: Path, rounds: int, count: int) -> dict[str, object]:
    """All rows."""
    ssd_bytes = (count + 8) * CHAIN_BLOCKS * BLOCK_BYTES * 5 // 4
    sizes = ("--ssd", str(directory / "tier"), "--ssd-capacity", str(ssd_bytes))
    arguments = (*sizes, "--set", "ssd.reserve_bytes=0")
    with PrivateDaemon(capacity_bytes=DRAM_BYTES, arguments=arguments) as daemon, _client(daemon) as client:
        chains = Chains(client, count)
        rows = [*_rows(chains, rounds), *_urgent(chains, rounds * 2)]
        stats = client.stats()
    rows += _warm(arguments, chains.all)
    return {
        "machine": msgspec.to_builtins(machine_facts()),
        "baseline": "stall_none of the same queue time; urgent_alone; warm_by_gets",
        "rows": rows,
        "prefetch": msgspec.to_builtins(stats.prefetch),
        "loading": msgspec.to_builtins(stats.loading),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, required=True, help="an empty directory on the SSD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--chains", type=int, default=60)
    options = parser.parse_args(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure(options.dir, options.rounds, options.chains), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
