"""Redis beside the store: the same blocks by ``redis-py`` over a unix socket, in the same turns."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Final

from kvstore.cli.bench.local_blocks import Buffers, StoredBlocks, wrong
from kvstore.cli.bench.local_puts import FullTier, Put
from kvstore.cli.bench.local_reads import BATCHES, GetInto, GetManyInto
from kvstore.cli.bench.local_redis_server import Redis
from kvstore.cli.bench.local_sides import Kind, Side, Walk, row_of, take_turns
from kvstore.cli.bench.report import Row
from kvstore_client import Client

__all__ = ["RedisReads", "RedisWrites"]

_ROUND_BYTES: Final = 8 << 20
_MANY: Final = BATCHES[0]


class _Get(Side):
    """``GET``, or ``MGET`` of consecutive blocks."""

    def __init__(self, redis: Redis, blocks: StoredBlocks, batch: int) -> None:
        super().__init__()
        self._redis = redis
        self._blocks = blocks
        self._batch = batch
        self._last: tuple[list[int], list[bytes | None]] = ([], [])

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        get, mget, clock, add = self._redis.get, self._redis.mget, perf_counter_ns, self.times_ns.append
        for number in numbers:
            blocks = list(range(number * self._batch, (number + 1) * self._batch))
            keys = [self._blocks.keys[block] for block in blocks]
            started = clock()
            values = [get(keys[0])] if self._batch == 1 else mget(keys)
            add(clock() - started)
            self._last = (blocks, values)

    def check(self) -> None:
        """Compare what came last."""
        blocks, values = self._last
        for block, value in zip(blocks, values, strict=True):
            if value is None:
                raise wrong("redis has lost a block; it needs as much memory as the set")
            self._blocks.check([block], [value], "redis GET")


class _Set(Side):
    """``SET`` of the keys that are there already, from the client's buffers."""

    def __init__(self, redis: Redis, keys: Sequence[bytes], sources: Buffers) -> None:
        super().__init__()
        self._redis = redis
        self._keys = keys
        self._sources = sources

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        put, clock, add = self._redis.set, perf_counter_ns, self.times_ns.append
        for number, source in zip(numbers, self._sources.take(len(numbers)), strict=True):
            key, data = self._keys[number % len(self._keys)], self._sources.arrays[source].data
            started = clock()
            done = put(key, data)
            add(clock() - started)
            if not done:
                raise wrong("redis refused a SET")

    def check(self) -> None:
        """An answer came for each."""


class RedisReads:
    """``get_into`` beside ``GET``, and ``get_many_into`` beside ``MGET``: cold, into the same buffer each time."""

    def __init__(self, redis: Redis, client: Client, blocks: StoredBlocks, pool: Buffers) -> None:
        size = blocks.size_bytes
        redis.flushall()
        for key in blocks.keys:
            with client.view(key) as data:
                redis.set(key, data)
        self._sides: list[tuple[Kind, str, _Get, Side, Walk]] = []
        for batch, name in ((1, "redis GET"), (_MANY, f"redis MGET of {_MANY}")):
            if batch > len(blocks):
                continue
            buffers = Buffers(size, batch, pool)
            ours = GetInto(client, blocks, buffers) if batch == 1 else GetManyInto(client, blocks, buffers, batch)
            kind = Kind("get_into" if batch == 1 else "get_many_into", size, batch, "cold", "one")
            self._sides.append((kind, name, _Get(redis, blocks, batch), ours, Walk(len(blocks) // batch, -batch)))

    def round(self) -> None:
        """Measure some of each."""
        for kind, _, theirs, ours, walk in self._sides:
            count = max(2, _ROUND_BYTES // ((kind.size_bytes or 1) * kind.batch))
            take_turns((theirs, ours), walk, count, 8)

    def rows(self) -> list[Row]:
        """What was found."""
        return [row_of(kind, ours.times_ns, name, theirs.times_ns) for kind, name, theirs, ours, _ in self._sides]


class RedisWrites:
    """``put(wait=False)`` beside ``SET``, which does wait: see ``put_sustained`` for what waiting costs."""

    def __init__(self, redis: Redis, tier: FullTier, keys: Sequence[bytes], pool: Buffers) -> None:
        self._size = tier.size_bytes
        self._theirs = _Set(redis, keys, pool)
        self._ours = Put(tier, pool)
        self._walk = Walk(len(tier.addresses), -1)

    def round(self) -> None:
        """Measure some of each."""
        take_turns((self._theirs, self._ours), self._walk, max(2, _ROUND_BYTES // self._size), 4)

    def rows(self) -> list[Row]:
        """What was found."""
        kind = Kind("put", self._size, 1, "cold", "rotating")
        return [row_of(kind, self._ours.times_ns, "redis SET", self._theirs.times_ns)]
