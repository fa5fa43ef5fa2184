"""A process that reads blocks which stay in DRAM, through mapped memory, for as long as it is told to."""

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

__all__ = ["LIMITS", "Gets"]

LEASE_S: Final = 600.0
_LEASE_SHARE: Final = 0.9

LIMITS: Final = ("--set", f"limits.max_lease_s={LEASE_S:g}", "--set", f"limits.lease_share={_LEASE_SHARE:g}")
"""What the daemon must allow."""

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
        self._order = random.Random(count).sample(range(count), count)
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

    def run(self, seconds: float) -> Gets:
        """Read for so long, then look at the bytes of as many blocks as there are buffers."""
        self.hold()
        keys, arrays, order = self._blocks.keys, self._pool.arrays, self._order
        get_into, clock, times_ns, missed = self._client.get_into, perf_counter_ns, list[int](), 0
        began = started = clock()
        end = began + int(seconds * 1e9)
        while started < end:
            count = len(times_ns)
            length = get_into(keys[order[count % len(order)]], arrays[count % _BUFFERS])
            missed += length != BLOCK_BYTES
            ended = clock()
            times_ns.append(ended - started)
            started = ended
        if missed:
            raise wrong(f"{missed} of {len(times_ns)} reads of leased blocks were misses")
        last = range(max(0, len(times_ns) - _BUFFERS), len(times_ns))
        read = [arrays[number % _BUFFERS].data for number in last]
        self._blocks.check([order[number % len(order)] for number in last], read, "get_into")
        return Gets(len(times_ns), (started - began) / 1e9, round(median(times_ns) / 1e3, 2))


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
                print(msgspec.json.encode(getter.run(float(line))).decode(), flush=True)
    except KVStoreError as error:
        print(error, flush=True)


if __name__ == "__main__":
    get_when_told(*sys.argv[1:3])
