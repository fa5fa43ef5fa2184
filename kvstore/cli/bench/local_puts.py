"""Writing blocks into a full tier: ``put(wait=False)`` beside ``ctypes.memmove`` into random slots of the same arena.

The put's own slots are recycled grants: the daemon lent them ahead, out of what it evicted. With the tier full it
evicts what was not used for longest, so they come from all over the tier and are as cold as the baseline's; a tier that
is not full gives the same few slots again and again, and a put then looks better than it is. Before each chunk of puts
the daemon has dealt with the one before it, so the client alone is measured, not the daemon's rate
(``local_sustained``).

The checksum, without which memory cannot be trusted, has rows of its own: the compiled copy with and without it, on the
same kind of memory in the same turns. ``put_checksum`` is the difference of the two medians, ``put_without_checksum``
the put's median less that.

The baseline overwrites blocks in the arena behind the daemon's back. Nobody reads them afterwards; it must never be
done to a daemon that anybody else uses.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from ctypes import memmove
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np

from kvstore.cli.bench.local_blocks import Buffers, Bytes, address_in_place, wrong
from kvstore.cli.bench.local_reads import MEMMOVE
from kvstore.cli.bench.local_sides import Kind, Side, Walk, chunk_of, row_of, take_turns
from kvstore.cli.bench.report import Row
from kvstore.errors import Throttled
from kvstore.mapped.checksum import copy_xxh3_64
from kvstore.mapped.streaming import copy_streaming
from kvstore.protocol.keys import KEY_BYTES
from kvstore.protocol.messages import PutStatus
from kvstore_client import Client

__all__ = ["FullTier", "Put", "Puts"]

_SMALL_BYTES: Final = 64 << 10
_PUT_LIMIT: Final = 0.9
_SMALL_PUT_LIMIT: Final = 0.8
_FILL_PART: Final = 64


class FullTier:
    """A tier filled with blocks of one size until it evicts, and where their payloads lie in the client's mapping.

    Args:
        client: mapped.
        sources: buffers of the payloads' size.
        capacity_bytes: of the tier.
        set_bytes: how much of it the places must cover, at least.

    Raises:
        Throttled: it does not get full.
    """

    def __init__(self, client: Client, sources: Buffers, capacity_bytes: int, set_bytes: int) -> None:
        self.client = client
        self.size_bytes = sources.size_bytes
        self._numbers: Iterator[int] = itertools.count(1)
        self._random = random.Random(self.size_bytes)
        evicted = client.stats().eviction.evicted_blocks
        written: list[bytes] = []
        while client.stats().eviction.evicted_blocks == evicted or len(written) * self.size_bytes < capacity_bytes:
            part = self.fresh_keys(max(1, min(_FILL_PART, capacity_bytes // self.size_bytes)))
            for key in part:
                client.put(key, sources.arrays[0], wait=False)
            flushed = client.flush()
            if flushed.stored != len(part):
                raise Throttled(f"the daemon stored {flushed.stored} of {len(part)} blocks: {flushed}")
            written += part
        self.addresses: list[int] = []
        for key in reversed(written):
            with client.view(key) as data:
                if data is not None:
                    self.addresses.append(address_in_place(data))
        if len(self.addresses) * self.size_bytes < set_bytes:
            raise Throttled(f"a full tier holds {len(self.addresses)} blocks of {self.size_bytes} bytes, too few")

    def fresh_keys(self, count: int) -> list[bytes]:
        """Keys that were never used."""
        return [next(self._numbers).to_bytes(8, "little") + self._random.randbytes(KEY_BYTES - 8) for _ in range(count)]

    def check(self, keys: Sequence[bytes], sources: Sequence[Bytes], *, keyed: bool) -> None:
        """Compare blocks that were put with the buffers that they were put from.

        Args:
            keys: of the blocks.
            sources: a buffer for each.
            keyed: the first 32 bytes were the block's key then.

        Raises:
            RemoteError: one is missing, or a byte is wrong.
        """
        begin = KEY_BYTES if keyed else 0
        for key, source in zip(keys, sources, strict=True):
            with self.client.view(key) as data:
                if data is None:
                    raise wrong(f"block {key.hex()} was stored and is not there")
                right = np.array_equal(np.frombuffer(data, np.uint8)[begin:], source[begin:])
                right = right and (not keyed or data[:begin] == key)
            if not right:
                raise wrong(f"block {key.hex()} is not what was put")


class _Writes(Side):
    """Writes to random slots; a number is a slot's place in ``tier.addresses``."""

    def __init__(self, tier: FullTier, sources: Buffers) -> None:
        super().__init__()
        self.tier = tier
        self.sources = sources

    def pairs(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Target and source address of each write."""
        sources, addresses = self.sources.addresses, self.tier.addresses
        taken = self.sources.take(len(numbers))
        return [(addresses[number], sources[source]) for number, source in zip(numbers, taken, strict=True)]

    def check(self) -> None:
        """Nothing to look at: what a baseline wrote, nobody reads."""


class Memmove(_Writes):
    """The baseline."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        size, clock, add = self.tier.size_bytes, perf_counter_ns, self.times_ns.append
        for target, source in self.pairs(numbers):
            started = clock()
            memmove(target, source, size)
            add(clock() - started)


class ChecksummedCopy(_Writes):
    """The copy that a put does."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        size, clock, add = self.tier.size_bytes, perf_counter_ns, self.times_ns.append
        for target, source in self.pairs(numbers):
            started = clock()
            copy_xxh3_64(target, source, size, 1)
            add(clock() - started)


class PlainCopy(_Writes):
    """The same copy without the checksum."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        size, clock, add = self.tier.size_bytes, perf_counter_ns, self.times_ns.append
        for target, source in self.pairs(numbers):
            started = clock()
            copy_streaming(target, source, size)
            add(clock() - started)


class Put(_Writes):
    """``Client.put(wait=False)`` of fresh keys; the numbers mean nothing to it."""

    def __init__(self, tier: FullTier, sources: Buffers) -> None:
        super().__init__(tier, sources)
        self._last: tuple[list[bytes], list[int]] = ([], [])

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        put, clock, add = self.tier.client.put, perf_counter_ns, self.times_ns.append
        arrays = self.sources.arrays
        self._last = keys, taken = self.tier.fresh_keys(len(numbers)), self.sources.take(len(numbers))
        for key, source in zip(keys, taken, strict=True):
            data = arrays[source]
            data.data[:KEY_BYTES] = key
            started = clock()
            status = put(key, data, wait=False)
            add(clock() - started)
            if status is not PutStatus.PENDING:
                raise wrong(f"put(wait=False) answered {status.name}")

    def check(self) -> None:
        """Wait for the daemon, then compare what it published."""
        keys, sources = self._last
        flushed = self.tier.client.flush()
        if flushed.stored != len(keys):
            raise wrong(f"{flushed.stored} of {len(keys)} puts were stored: {flushed}")
        self.tier.check(keys, [self.sources.arrays[source] for source in sources], keyed=True)


class Puts:
    """All single puts of one size. ``round`` measures some of each, ``rows`` tells.

    Args:
        tier: full.
        pool: the client's buffers, whose contents are put.
        round_bytes: bytes that each side writes in a round.
    """

    def __init__(self, tier: FullTier, pool: Buffers, round_bytes: int) -> None:
        self._size = tier.size_bytes
        self._count = max(1, round_bytes // self._size)
        self._sides: list[tuple[str, Memmove, Put, ChecksummedCopy, PlainCopy]] = []
        for name, count in (("one", 1), ("rotating", len(pool.arrays))):
            sources = Buffers(self._size, count, pool)
            each = Memmove(tier, sources), Put(tier, sources), ChecksummedCopy(tier, sources), PlainCopy(tier, sources)
            self._sides.append((name, *each))
        self._walk = Walk(len(tier.addresses), self._size)

    def round(self) -> None:
        """Measure some of each."""
        for _, *sides in self._sides:
            take_turns(sides, self._walk, self._count, chunk_of(self._size))

    def rows(self) -> list[Row]:
        """What was found."""
        limit = _SMALL_PUT_LIMIT if self._size == _SMALL_BYTES else _PUT_LIMIT if self._size > _SMALL_BYTES else None
        rows: list[Row] = []
        for name, memmoves, put, checksummed, plain in self._sides:
            cost_ns = max(median(checksummed.times_ns) - median(plain.times_ns), 0.0)
            without_ns = [max(time_ns - int(cost_ns), 1) for time_ns in put.times_ns]

            def kind(op: str, name: str = name) -> Kind:
                return Kind(op, self._size, 1, "cold", name)

            rows += [
                row_of(kind("put"), put.times_ns, MEMMOVE, memmoves.times_ns),
                row_of(kind("put_without_checksum"), without_ns, MEMMOVE, memmoves.times_ns, limit=limit),
                Row(
                    op="put_checksum",
                    size_bytes=self._size,
                    batch=1,
                    cache="cold",
                    buffers=name,
                    samples=len(plain.times_ns),
                    median_us=round(cost_ns / 1000, 2),
                ),
            ]
        return rows
