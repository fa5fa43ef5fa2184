"""Reading stored blocks: copies beside ``ctypes.memmove`` out of the same memory, views beside the bare pin.

Cold: a set of blocks larger than the caches, visited in random order; batches are consecutive blocks of a chain, the
chains in random order. Hot: one block again and again. The baseline reads the same places of the client's own mapping.
Buffers are numpy arrays in page-aligned memory:

- ``one``: the same buffer in every call (in a batch, one for each block), as an engine's staging buffer is used. Each
  side has its own: in a shared one, non-temporal stores of the client would meet lines that the baseline has just left
  dirty in a cache, which costs up to twice the time and does not happen to a client by itself.
- ``rotating``: buffers of 256 MiB in all in random order, as the pages of an engine's own cache; both sides share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove
from time import perf_counter_ns
from typing import Final

from kvstore.cli.bench.local_blocks import Buffers, StoredBlocks, mapping_of, wrong
from kvstore.cli.bench.local_sides import Kind, Side, Walk, chunk_of, row_of, take_turns
from kvstore.cli.bench.report import Row
from kvstore.mapped.context import LOOK
from kvstore.mapped.index_reader import unpin
from kvstore.mapped.reads import pin_one
from kvstore_client import Client

__all__ = ["BATCHES", "HOT_BYTES", "MEMMOVE", "GetInto", "GetManyInto", "Reads"]

BATCHES: Final = (16, 64)
HOT_BYTES: Final = 1 << 20
"""Largest block of which hot reads are measured: beyond, block and buffer do not fit into a core's cache together."""

MEMMOVE: Final = "memmove"
_SMALL_BYTES: Final = 64 << 10
_GET_LIMIT: Final = 0.95
_SMALL_GET_LIMIT: Final = 0.85
_MANY_HOPED: Final = 1.2
_MANY_HOPED_FROM_BYTES: Final = 256 << 10
_VIEW_LIMIT: Final = 1 / 3


class _Copies(Side):
    """Copies of ``batch`` blocks in a call; a number is a batch's place in the set."""

    def __init__(self, blocks: StoredBlocks, buffers: Buffers, batch: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.buffers = buffers
        self.batch = batch
        self._last: tuple[list[int], list[int]] = ([], [])

    def plan(self, numbers: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Block and buffer numbers of each call."""
        plan = [
            (list(range(number * self.batch, (number + 1) * self.batch)), self.buffers.take(self.batch))
            for number in numbers
        ]
        self._last = plan[-1]
        return plan

    def check(self) -> None:
        """Compare what the last call wrote."""
        blocks, buffers = self._last
        self.blocks.check(blocks, [self.buffers.arrays[at].data for at in buffers], type(self).__name__)


class Memmove(_Copies):
    """The baseline."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        sources, targets, size = self.blocks.addresses, self.buffers.addresses, self.blocks.size_bytes
        clock, add = perf_counter_ns, self.times_ns.append
        for blocks, buffers in self.plan(numbers):
            pairs = [(targets[buffer], sources[block]) for block, buffer in zip(blocks, buffers, strict=True)]
            started = clock()
            for target, source in pairs:
                memmove(target, source, size)
            add(clock() - started)


class GetInto(_Copies):
    """``Client.get_into``."""

    def __init__(self, client: Client, blocks: StoredBlocks, buffers: Buffers) -> None:
        super().__init__(blocks, buffers, 1)
        self._client = client

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        keys, arrays, size = self.blocks.keys, self.buffers.arrays, self.blocks.size_bytes
        get_into, clock, add = self._client.get_into, perf_counter_ns, self.times_ns.append
        for (block,), (buffer,) in self.plan(numbers):
            key, out = keys[block], arrays[buffer]
            started = clock()
            length = get_into(key, out)
            add(clock() - started)
            if length != size:
                raise wrong(f"get_into gave {length} bytes, not {size}")


class GetManyInto(_Copies):
    """``Client.get_many_into``."""

    def __init__(self, client: Client, blocks: StoredBlocks, buffers: Buffers, batch: int) -> None:
        super().__init__(blocks, buffers, batch)
        self._client = client

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        all_keys, arrays = self.blocks.keys, self.buffers.arrays
        get_many_into, clock, add = self._client.get_many_into, perf_counter_ns, self.times_ns.append
        right = [self.blocks.size_bytes] * self.batch
        for blocks, buffers in self.plan(numbers):
            keys, outs = [all_keys[block] for block in blocks], [arrays[buffer] for buffer in buffers]
            started = clock()
            lengths = get_many_into(keys, outs)
            add(clock() - started)
            if lengths != right:
                raise wrong(f"get_many_into gave lengths {lengths}")


class _InPlace(Side):
    def __init__(self, client: Client, blocks: StoredBlocks) -> None:
        super().__init__()
        self._client = client
        self._blocks = blocks
        self._last = 0

    def check(self) -> None:
        """Compare what a view of the last block shows."""
        with self._client.view(self._blocks.keys[self._last]) as data:
            if data is None:
                raise wrong("a view found nothing")
            self._blocks.check([self._last], [data], "view")


class ViewInPlace(_InPlace):
    """``with client.view(key) as data: pass``."""

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        view, clock, add = self._client.view, perf_counter_ns, self.times_ns.append
        keys = [self._blocks.keys[number] for number in numbers]
        self._last = numbers[-1]
        for key in keys:
            started = clock()
            with view(key) as data:
                pass
            add(clock() - started)
            if data is None:
                raise wrong("a view found nothing")


class PinUnpin(_InPlace):
    """The baseline: the compiled functions alone, with a hazard that is set aside for it."""

    def __init__(self, client: Client, blocks: StoredBlocks) -> None:
        super().__init__(client, blocks)
        self._mapped = mapping_of(client)
        self._hazard = self._mapped.free_hazards.pop()

    def close(self) -> None:
        """Give the hazard back."""
        self._mapped.free_hazards.append(self._hazard)

    def run(self, numbers: Sequence[int]) -> None:
        """Time them."""
        mapped, hazard, context = self._mapped, self._hazard, self._mapped.address
        clock, add = perf_counter_ns, self.times_ns.append
        keys = [self._blocks.keys[number] for number in numbers]
        self._last = numbers[-1]
        for key in keys:
            started = clock()
            where = pin_one(context, id(key), hazard, 0, 0, 0)
            unpin(context, hazard)
            elapsed_ns = clock() - started
            if where == LOOK and mapped._look():
                continue  # ten times a second nothing is pinned; the client then looks after the daemon's lock first
            if where < 0:
                raise wrong("a pin found nothing")
            add(elapsed_ns)


class Reads:
    """All reads of one size. ``round`` measures some of each, ``rows`` tells.

    Args:
        client: mapped.
        blocks: stored.
        pool: the client's buffers, at least 64.
        round_bytes: bytes that each side copies in a round, of each kind.
    """

    def __init__(self, client: Client, blocks: StoredBlocks, pool: Buffers, round_bytes: int) -> None:
        size = blocks.size_bytes
        self._blocks = blocks
        self._round_bytes = round_bytes
        self._copies: list[tuple[Kind, Memmove, _Copies, Walk]] = []
        for batch in (1, *BATCHES):
            if batch > len(blocks):
                continue
            op = "get_into" if batch == 1 else "get_many_into"
            one = Buffers(size, batch, pool), Buffers(size, batch, pool, batch)
            rotating = Buffers(size, len(pool.arrays), pool)
            if 2 * batch <= len(pool.arrays):  # else it would be the rotating ones
                self._add(Kind(op, size, batch, "cold", "one"), client, *one)
            self._add(Kind(op, size, batch, "cold", "rotating"), client, rotating, rotating)
        if size <= HOT_BYTES:
            kind = Kind("get_into", size, 1, "hot", "one")
            self._add(kind, client, Buffers(size, 1, pool), Buffers(size, 1, pool, 1))
        self._pin = PinUnpin(client, blocks)
        self._view = ViewInPlace(client, blocks)
        self._view_walk = Walk(len(blocks), -1)

    def _add(self, kind: Kind, client: Client, theirs: Buffers, ours: Buffers) -> None:
        blocks, batch = self._blocks, kind.batch
        get = GetInto(client, blocks, ours) if batch == 1 else GetManyInto(client, blocks, ours, batch)
        walk = Walk(1 if kind.cache == "hot" else len(blocks) // batch, len(self._copies))
        self._copies.append((kind, Memmove(blocks, theirs, batch), get, walk))

    def round(self) -> None:
        """Measure some of each."""
        size = self._blocks.size_bytes
        for kind, memmoves, ours, walk in self._copies:
            call_bytes = size * kind.batch
            take_turns((memmoves, ours), walk, max(1, self._round_bytes // call_bytes), chunk_of(call_bytes))
        count = max(1, min(self._round_bytes // size, 512))
        take_turns((self._pin, self._view), self._view_walk, count, chunk_of(0))

    def finish(self) -> None:
        """Look whether what was read was what it should be, and where it should be."""
        self._pin.close()
        self._blocks.check_places()
        self._blocks.check_all()

    def rows(self) -> list[Row]:
        """What was found."""
        rows = [
            row_of(kind, ours.times_ns, MEMMOVE, memmoves.times_ns, limit=_limit(kind), hoped=_hoped(kind))
            for kind, memmoves, ours, _ in self._copies
        ]
        kind = Kind("view", self._blocks.size_bytes, 1, "cold")
        times = self._view.times_ns, "compiled pin + unpin", self._pin.times_ns
        return [*rows, row_of(kind, *times, limit=_VIEW_LIMIT, moves_bytes=False)]


def _limit(kind: Kind) -> float | None:
    size = kind.size_bytes or 0
    if size < _SMALL_BYTES or kind.cache == "hot" or kind.batch > BATCHES[0]:
        return None
    return _SMALL_GET_LIMIT if kind.batch == 1 and size == _SMALL_BYTES else _GET_LIMIT


def _hoped(kind: Kind) -> float | None:
    at_least = (kind.size_bytes or 0) >= _MANY_HOPED_FROM_BYTES
    return _MANY_HOPED if kind.batch == BATCHES[0] and at_least else None
