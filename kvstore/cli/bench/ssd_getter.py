"""A process that reads blocks which stay in DRAM, through mapped memory, as often as it is told to."""

from __future__ import annotations

import random
import sys
from statistics import median
from time import perf_counter_ns
from typing import Final

import msgspec

from kvstore.cli.bench.local_blocks import CHAIN_BLOCKS, Buffers, StoredBlocks, touch_mapping, wrong
from kvstore.cli.bench.process import READY
from kvstore.cli.bench.ssd_blocks import BLOCK_BYTES
from kvstore.errors import KVStoreError
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client

__all__ = ["LEASE_S", "Gets"]

LEASE_S: Final = 600.0
"""The daemon's ``limits.max_lease_s`` must allow it."""

_TIMEOUT_S: Final = 60.0
_BUFFERS: Final = 16


class Gets(msgspec.Struct):
    """What a number of ``get_into`` took.

    Attributes:
        count: of blocks.
        seconds: all of them together.
        median_us: of one.
    """

    count: int
    seconds: float
    median_us: float


class _Getter:
    """Reads leased blocks in random order into rotating buffers.

    Args:
        client: mapped.
        count: of blocks.
    """

    def __init__(self, client: Client, count: int) -> None:
        self._client = client
        self._blocks = StoredBlocks(client, BLOCK_BYTES, count)
        self._pool = Buffers(BLOCK_BYTES, _BUFFERS)
        self._random = random.Random(count)
        self._leases: list[int] = []
        self.hold()

    def hold(self) -> None:
        """Have the blocks stay where they are for the next minutes."""
        keys, before, self._leases = self._blocks.keys, self._leases, []
        for begin in range(0, len(keys), CHAIN_BLOCKS):
            chain = keys[begin : begin + CHAIN_BLOCKS]
            held = self._client.match(chain, lease=LEASE_S)
            if held.hits != len(chain):
                raise wrong(f"only {held.hits} of {len(chain)} leased blocks are still in DRAM")
            self._leases.append(held.lease)
        for lease in before:
            self._client.release(lease)

    def run(self, count: int) -> Gets:
        """Read ``count`` blocks, then look at the bytes of as many as there are buffers."""
        self.hold()
        numbers = [self._random.randrange(len(self._blocks)) for _ in range(count)]
        pairs = [
            (self._blocks.keys[number], self._pool.arrays[index % _BUFFERS]) for index, number in enumerate(numbers)
        ]
        get_into, clock, times_ns, missed = self._client.get_into, perf_counter_ns, [0] * count, 0
        began = clock()
        for index, (key, out) in enumerate(pairs):
            started = clock()
            missed += get_into(key, out) != BLOCK_BYTES
            times_ns[index] = clock() - started
        elapsed_ns = clock() - began
        if missed:
            raise wrong(f"{missed} of {count} reads of leased blocks were misses")
        last = numbers[-_BUFFERS:]
        first = count - len(last)
        read = [self._pool.arrays[(first + index) % _BUFFERS].data for index in range(len(last))]
        self._blocks.check(last, read, "get_into")
        return Gets(count, elapsed_ns / 1e9, round(median(times_ns) / 1e3, 2))


def get_when_told(endpoint: str, count: str) -> None:
    """Read until standard input ends; whoever started it reads what went wrong instead of an answer."""
    namespace = Namespace(name="bench ssd gets")
    options = {"namespace": namespace, "timeout": _TIMEOUT_S, "payload_bytes": (BLOCK_BYTES,), "mapped": True}
    try:
        with Client(endpoint, **options) as client:
            client.clear()
            getter = _Getter(client, int(count))
            touch_mapping(client)
            print(READY, flush=True)
            for line in sys.stdin.buffer:
                print(msgspec.json.encode(getter.run(int(line))).decode(), flush=True)
    except KVStoreError as error:
        print(error, flush=True)


if __name__ == "__main__":
    get_when_told(*sys.argv[1:3])
