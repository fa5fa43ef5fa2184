"""The live hit-ratio curve: what hit rate the present load would have in an LRU of other capacities.

Sampled stack distances (Waldspurger et al., "Efficient MRC construction with SHARDS", 2015) with a fixed number of
sampled blocks, and one change that prefix caches need: blocks that at least one request in a hundred uses (the first
blocks of a system prompt) are not sampled but counted, and taken as always resident. One such block may have a
twentieth of all accesses; in the sample or not, it would bend the curve.

A block is sampled where the hash of its key is below a threshold. Where that would be more blocks than there is room
for, the threshold falls; blocks further down the stack than the largest capacity that is asked about are forgotten, so
the threshold settles where the sample reaches down to there. Counts fade with a half-life: the curve is about the last
hour or two.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from kvstore.policy.hot_blocks import MOST_WATCHED, HotBlocks, Ident, Linked, Resident
from kvstore.policy.stack_distance import StackDistances, StackEntry

SAMPLED_BLOCKS: Final = 8192
"""Sampled blocks at most, by default."""

HALF_LIFE_S: Final = 3600.0
REACH: Final = 8
"""Times the capacity that the curve is known for."""

_MOST_REACH: Final = 32
_ENTRY_BYTES: Final = 600
"""Memory of a sampled block, about: its entry, its identity, its place in the dict and in the stack."""

_HASH_BITS: Final = 30
_HASH_RANGE: Final = 1 << _HASH_BITS
_HASH_MASK: Final = _HASH_RANGE - 1
_FALL: Final = 0.8
"""What is left of the threshold when the sample is full."""

_BUSY_TOUCHES: Final = 1024
_BUSY_PER_S: Final = 1000.0
_BUSY_BLOCKS: Final = 1024
"""Where sampled accesses come faster than that the threshold falls too, so that they cost about half a hundredth of a
core; but not below so many sampled blocks."""

_UNIT_BYTES: Final = 4096
_BINS_PER_OCTAVE: Final = 16
_BINS: Final = 40 * _BINS_PER_OCTAVE
"""Distances from 4 KiB to 2**52 bytes, each bin 4.4 % wider than the one before."""

_GROWN_MOST: Final = 1e9
_REQUESTS: Final = 1024
"""Engine requests of which it is remembered what was counted."""

_RESIDENCE_WEIGHT: Final = 1 / 32
_RESIDENCE_SHARE: Final = 4

_SWEEP_REQUESTS: Final = 256


class LiveCurve:
    """Watches a store (``kvstore.core.watching``) and keeps its curve.

    A sampled access costs some microseconds, any other a tenth of one. Memory is fixed: see ``memory_bytes``.

    Args:
        capacity_bytes: of the tier that is asked about first.
        clock: nanoseconds that never go back.
        larger_bytes: a larger capacity that is asked about too; the curve reaches 8 times ``capacity_bytes``, or up to
            32 times for this.
        sampled_blocks: sampled blocks at most.
        key_hash: an integer for a key, 30 bits of which are used; evenly spread.
        half_life_s: after which an access counts half.
    """

    def __init__(
        self,
        capacity_bytes: int,
        clock: Callable[[], int],
        *,
        larger_bytes: int = 0,
        sampled_blocks: int = SAMPLED_BLOCKS,
        key_hash: Callable[[bytes], int] = hash,
        half_life_s: float = HALF_LIFE_S,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.reach_bytes = max(capacity_bytes * REACH, min(larger_bytes, capacity_bytes * _MOST_REACH))
        self.half_life_s = half_life_s
        self._clock = clock
        self._began_ns = self._now_ns = self._touched_ns = clock()
        self._key_hash = key_hash
        self._most = sampled_blocks
        self._threshold = _HASH_RANGE
        self._scale = 1.0
        """Blocks for each that is sampled."""
        self._sampled_reach_bytes = self.reach_bytes
        self._stack: StackDistances[Ident] = StackDistances(sampled_blocks + 1)
        self._sampled: dict[Ident, StackEntry[Ident]] = {}
        self._mean_bytes = 0
        self._distances = [0.0] * _BINS
        self._far = 0.0
        self._grown = 1.0
        """Weight of an access now; those before have less by having been given less."""
        self._weight = 1.0
        """The same over the sampling rate."""
        self._hot = HotBlocks()
        self.residence_s: float | None = None
        """How long blocks stay that nobody uses: their age when they are evicted, moving mean; None: none was yet."""
        self._to_sweep = _SWEEP_REQUESTS
        self._touches = 0
        self._walked: OrderedDict[int, int] = OrderedDict()
        """By engine request: how many of the chain's first blocks were looked at; once more for each unlisted miss."""
        self._unlisted: OrderedDict[int, None] = OrderedDict()

    # -------------------------------------------------------------- watching

    def accessed(
        self,
        namespace_id: int,
        access: int,
        runs: Sequence[tuple[Linked, int]],
        asked: int,
        missing: Sequence[bytes],
    ) -> None:
        """See ``kvstore.core.watching.Watcher``."""
        walked = self._walked.get(access, 0)
        first = access not in self._walked
        if first:
            self._new_request(access)
        chain: list[Linked] = []
        hits = 0
        for deepest, count in runs:
            hits += count
            block: Linked | None = deepest
            left = count
            while left and block is not None and block.depth >= walked:
                chain.append(block)
                block = block.parent
                left -= 1
            if not left or (block is not None and block.depth < walked):
                walked = max(walked, deepest.depth + 1)
        self._walked[access] = walked
        if len(runs) > 1:
            chain.sort(key=_depth, reverse=True)
        if chain or missing:
            chain = self._hot.count(namespace_id, access, chain, missing, self._grown, first=first)
            self._count_sampled(namespace_id, access, chain, missing)
        if asked > hits + len(missing):
            self._unlisted[access] = None
            if len(self._unlisted) > _REQUESTS:
                self._unlisted.popitem(last=False)

    def stored(self, block: Resident, access: int, *, promoted: bool) -> None:
        """See ``kvstore.core.watching.Watcher``. A put is an access where its request missed more than it named."""
        # Most calls end here.
        sample = self._key_hash(block.key) & _HASH_MASK
        if sample < self._threshold:
            self._stored(block, sample, access, promoted=promoted)

    def _stored(self, block: Resident, sample: int, access: int, *, promoted: bool) -> None:
        if promoted:
            # Nobody used it, but its stay begins.
            entry = self._sampled.get((block.namespace.id, block.key))
            if entry is not None:
                entry.used_ns = self._clock()
            return
        namespace_id = block.namespace.id
        if self._hot.is_hot(namespace_id, block.key):
            return
        ident = namespace_id, block.key
        entry = self._sampled.get(ident)
        if access in self._unlisted and (entry is None or entry.access < access):
            self._count(entry)
        size = block.slot_bytes
        self._mean_bytes += (size - self._mean_bytes) // 16 if self._mean_bytes else size
        if entry is None or entry.access < access:
            self._lift(ident, sample, access, size)
        elif entry.slot_bytes != size:
            # It was counted when it was missed; only now its size is known.
            self._stack.resize(entry, size or 1)

    def left(self, block: Resident, cause: str) -> None:
        """See ``kvstore.core.watching.Watcher``. What was removed is as if it had never been there."""
        # Ages at eviction are told well enough by fewer blocks.
        threshold = self._threshold // _RESIDENCE_SHARE if cause == "evicted" else self._threshold
        if self._key_hash(block.key) & _HASH_MASK < threshold:
            self._left(block, cause)

    def _left(self, block: Resident, cause: str) -> None:
        entry = self._sampled.get((block.namespace.id, block.key))
        if entry is None:
            return
        if cause != "evicted":
            self._drop(entry)
            return
        age_s = (self._clock() - entry.used_ns) / 1e9
        before = self.residence_s
        self.residence_s = age_s if before is None else before + (age_s - before) * _RESIDENCE_WEIGHT

    # -------------------------------------------------------------- the curve

    @property
    def accesses(self) -> float:
        """Block accesses that the curve is about: estimated, and faded."""
        return (sum(self._distances) + self._far + self._hot.accesses) / self._grown

    @property
    def hot_blocks(self) -> int:
        """Blocks that are counted, not sampled."""
        return self._hot.blocks

    @property
    def hot_bytes(self) -> int:
        """Their slots."""
        return self._hot.bytes

    @property
    def hot_share(self) -> float:
        """Share of the accesses that go to hot blocks."""
        total = self.accesses
        return self._hot.accesses / self._grown / total if total else 0.0

    @property
    def sampling_rate(self) -> float:
        """Share of the blocks that is sampled."""
        return self._threshold / _HASH_RANGE

    @property
    def sampled_blocks(self) -> int:
        """Blocks in the sample."""
        return len(self._sampled)

    @property
    def memory_bytes(self) -> int:
        """Most memory that all this takes, about."""
        return self._most * _ENTRY_BYTES + _BINS * 32 + (MOST_WATCHED + 2 * _REQUESTS) * 300

    @property
    def age_s(self) -> float:
        """How long it has been watching."""
        return (self._clock() - self._began_ns) / 1e9

    def hit_rates(self, capacities_bytes: Iterable[int]) -> list[float]:
        """For each capacity the share of block accesses that an LRU of it would hit, 0 without any.

        Beyond ``reach_bytes`` it grows no more.
        """
        distances = list(self._distances)
        total = sum(distances) + self._far + self._hot.accesses
        below = [0.0]
        for count in distances:
            below.append(below[-1] + count)
        rates: list[float] = []
        for capacity_bytes in capacities_bytes:
            if not total or capacity_bytes <= 0:
                rates.append(0.0)
                continue
            cold_bytes = capacity_bytes - self._hot.bytes
            if cold_bytes <= 0:
                rates.append(self._hot.accesses * capacity_bytes / self._hot.bytes / total)
                continue
            at = min(max(math.log2(cold_bytes / _UNIT_BYTES) * _BINS_PER_OCTAVE, 0.0), _BINS - 1.0)
            whole = int(at)
            rates.append((self._hot.accesses + below[whole] + (at - whole) * distances[whole]) / total)
        return rates

    # -------------------------------------------------------------- sampled blocks

    def _count_sampled(self, namespace_id: int, access: int, chain: list[Linked], missing: Sequence[bytes]) -> None:
        key_hash, threshold, known = self._key_hash, self._threshold, self._sampled.get
        fresh: list[tuple[Ident, int, int]] = []
        # Deepest first, as a tail-first LRU has it; all are looked up before any of them moves.
        for key in reversed(missing):
            sample = key_hash(key) & _HASH_MASK
            if sample < threshold and not self._hot.is_hot(namespace_id, key):
                ident = namespace_id, key
                entry = known(ident)
                if entry is None or entry.access < access:
                    self._count(entry)
                    fresh.append((ident, sample, entry.slot_bytes if entry else self._mean_bytes or _UNIT_BYTES))
        for block in chain:
            key = block.key
            sample = key_hash(key) & _HASH_MASK
            if sample < threshold:
                ident = namespace_id, key
                entry = known(ident)
                if entry is None or entry.access < access:
                    self._count(entry)
                    fresh.append((ident, sample, block.slot_bytes))
        for ident, sample, slot_bytes in fresh:
            self._lift(ident, sample, access, slot_bytes)

    def _count(self, entry: StackEntry[Ident] | None) -> None:
        """Count an access to a sampled block, by where it lies now."""
        if entry is None:
            self._far += self._weight
            return
        distance = (self._stack.bytes_above(entry) * self._scale + entry.slot_bytes) / _UNIT_BYTES
        index = int(math.log2(distance) * _BINS_PER_OCTAVE) if distance > 1.0 else 0
        self._distances[index if index < _BINS else _BINS - 1] += self._weight

    def _lift(self, ident: Ident, sample: int, access: int, slot_bytes: int) -> None:
        """Lay a block on top of the sample, unless it is not sampled any more."""
        if sample >= self._threshold:
            return
        stack = self._stack
        entry = self._sampled.get(ident)
        if entry is None:
            entry = self._sampled[ident] = StackEntry(ident, sample, slot_bytes or 1, access)
        else:
            if entry.slot_bytes != slot_bytes:
                stack.resize(entry, slot_bytes or 1)
            if entry.access < access:
                entry.access = access
        entry.used_ns = self._now_ns
        stack.push(entry)
        self._touches += 1
        while stack.total_bytes > self._sampled_reach_bytes and len(stack) > 1:
            lowest = stack.lowest()
            assert lowest is not None
            self._drop(lowest)
        if len(self._sampled) > self._most:
            self._lower_threshold(_FALL)
        if self._touches >= _BUSY_TOUCHES:
            self._look_at_speed()

    def _look_at_speed(self) -> None:
        """Take fewer blocks where sampled accesses come too fast."""
        now_ns = self._clock()
        allowed = _BUSY_PER_S * (now_ns - self._touched_ns) / 1e9
        if self._touches > allowed and len(self._sampled) > _BUSY_BLOCKS:
            self._lower_threshold(max(allowed / self._touches, _BUSY_BLOCKS / len(self._sampled), 0.5))
        self._touches, self._touched_ns = 0, now_ns

    def _drop(self, entry: StackEntry[Ident]) -> None:
        self._stack.remove(entry)
        del self._sampled[entry.ident]

    def _drop_hot(self, ident: Ident) -> None:
        entry = self._sampled.get(ident)
        if entry is not None:
            self._drop(entry)

    def _lower_threshold(self, by: float) -> None:
        self._threshold = max(int(self._threshold * by), 1)
        self._scale = _HASH_RANGE / self._threshold
        self._sampled_reach_bytes = int(self.reach_bytes / self._scale)
        self._weight = self._grown * self._scale
        for entry in [entry for entry in self._sampled.values() if entry.sample >= self._threshold]:
            self._drop(entry)

    # -------------------------------------------------------------- requests

    def _new_request(self, access: int) -> None:
        now_ns = self._clock()
        # Fades everything by giving what comes from now on more weight.
        grown = self._grown * 2.0 ** ((now_ns - self._now_ns) / (self.half_life_s * 1e9))
        self._now_ns = now_ns
        if grown > _GROWN_MOST:
            self._distances = [count / grown for count in self._distances]
            self._far /= grown
            self._hot.scale(grown)
            grown = 1.0
        self._grown = grown
        self._weight = grown * self._scale
        self._hot.request(grown)
        self._walked[access] = 0
        if len(self._walked) > _REQUESTS:
            self._walked.popitem(last=False)
        self._to_sweep -= 1
        if not self._to_sweep:
            self._to_sweep = _SWEEP_REQUESTS
            # Where all blocks are in the sample, it is exact as it is.
            self._hot.sweep(grown, heat=self._threshold < _HASH_RANGE, on_hot=self._drop_hot)


def _depth(block: Linked) -> int:
    return block.depth
