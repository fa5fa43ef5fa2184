"""The hit-rate curve of tail-first LRU as requests come, from a sample of the blocks and in bounded memory.

A block is in the sample if a hash of its key is below a share of all hashes; distances among sampled blocks are
distances among all, times that share (Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015). One
system prompt in many requests bends such a curve by as much as its share of the uses, whether it is in the sample or
not. So blocks of at least one request in a hundred are *hot*: counted exactly, taken as resident, and not sampled.
They are found on the way: the ancestors of a hot block are hot, so only what follows the hot part of a request is
counted, by the heavy hitters of Misra and Gries ("Finding repeated elements", 1982).

Older uses weigh less, so that the curve is of the load of now. Blocks are taken as equally large.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from kvstore.errors import InvalidArgument
from kvstore.simulator.curve import FIRST_USE, StackDistances

__all__ = ["SampledCurve"]

_HOT_SHARE: Final = 0.01
_MOST_HOT: Final = 1 << 14
_COUNTED_PER_REQUEST: Final = 16
"""Blocks after the hot part that are counted: a long prompt that many share becomes hot in steps of this."""
_COUNTED: Final = 1 << 14
_SURELY_HOT_REQUESTS: Final = 800
"""Before so many requests nothing is hot: a few uses would be enough."""
_COOL_EVERY: Final = 1000
_RESCALE_AT: Final = 1e12
"""Weight of a use; looked at a few times in a half-life."""
_BYTES_PER_BLOCK: Final = 400
"""Key, place in the order, share of the tree; measured."""


class SampledCurve:
    """An estimate of what LRU would hit at other capacities. A request costs about 1 us and 0.1 us a block.

    Args:
        largest_blocks: the largest capacity that is asked about.
        sampled_blocks: most blocks that are kept; with so many as ``largest_blocks`` none is left out.
        half_life_requests: after how many requests a use counts half.
        seed: of the sample.

    Raises:
        InvalidArgument: an argument below 1.
    """

    def __init__(
        self, largest_blocks: int, sampled_blocks: int = 8192, half_life_requests: int = 20_000, seed: int = 0
    ) -> None:
        if min(largest_blocks, sampled_blocks, half_life_requests) < 1:
            raise InvalidArgument(
                f"a curve up to {largest_blocks} blocks, of {sampled_blocks} sampled ones, that forgets in "
                f"{half_life_requests} requests: all three must be 1 or more"
            )
        self.rate = min(1.0, sampled_blocks / largest_blocks)
        self._threshold = int(self.rate * (1 << 32))
        self._keep = max(1, round(largest_blocks * self.rate))
        self._seed = seed
        self._growth = 2.0 ** (1.0 / half_life_requests)
        self._weight = 1.0
        self._stack: StackDistances[bytes] = StackDistances()
        self._hits_at = [0.0] * self._keep
        self._sampled = 0.0
        self._cold = 0.0
        self._hot_uses = 0.0
        self._requests = 0.0
        self._seen = 0
        self._cool_every = min(_COOL_EVERY, max(1, half_life_requests // 8))
        self._hot: dict[bytes, float] = {}
        self._counted: dict[bytes, float] = {}

    @property
    def hot_blocks(self) -> int:
        """Blocks that are in one request of a hundred or more."""
        return len(self._hot)

    @property
    def uses(self) -> float:
        """Uses of blocks that the curve rests on, older ones counted less."""
        return (self._cold + self._hot_uses) / self._weight

    def memory_bytes(self) -> int:
        """What it takes, about."""
        return _BYTES_PER_BLOCK * (len(self._stack) + len(self._hot) + len(self._counted)) + 8 * self._keep

    def access(self, keys: Sequence[bytes]) -> None:
        """One request uses these blocks: a whole prefix, parents first."""
        self._weight *= self._growth
        self._seen += 1
        if self._seen % self._cool_every == 0:
            self._cool()
        weight, hot = self._weight, self._hot
        self._requests += weight
        first = 0
        for key in keys:
            if key not in hot:
                break
            hot[key] += weight
            first += 1
        self._count(keys[first : first + _COUNTED_PER_REQUEST])
        self._hot_uses += weight * first
        self._cold += weight * (len(keys) - first)
        crc, seed, threshold = zlib.crc32, self._seed, self._threshold
        sample = [key for key in keys[first:] if crc(key, seed) < threshold]
        if not sample:
            return
        self._sampled += weight * len(sample)
        hits_at, keep = self._hits_at, self._keep
        for distance in self._stack.access(sample):
            if distance != FIRST_USE and distance < keep:
                hits_at[distance] += weight
        while len(self._stack) > keep:
            self._stack.discard_oldest()

    def hit_rates(self, capacities_blocks: Sequence[int]) -> list[float]:
        """What LRU would hit at these capacities, 0 to 1; 0 before the first request."""
        total = self._cold + self._hot_uses
        if not total:
            return [0.0] * len(capacities_blocks)
        below = [0.0, *accumulate(self._hits_at)]
        scale = self._cold / self._sampled if self._sampled else 0.0
        rates = []
        for capacity in capacities_blocks:
            room = capacity - len(self._hot)
            if room < 0:
                rates.append(self._hot_uses / total * capacity / len(self._hot))
                continue
            at = min(room * self.rate, float(self._keep))
            whole = int(at)
            more = self._hits_at[whole] * (at - whole) if whole < self._keep else 0.0
            rates.append(min(1.0, (self._hot_uses + scale * (below[whole] + more)) / total))
        return rates

    def _count(self, keys: Sequence[bytes]) -> None:
        """Look for blocks that became hot."""
        counted, weight = self._counted, self._weight
        surely = self._seen >= _SURELY_HOT_REQUESTS
        wanted = _HOT_SHARE * self._requests
        for key in keys:
            count = counted.get(key, 0.0) + weight
            if surely and count >= wanted and len(self._hot) < _MOST_HOT:
                counted.pop(key, None)
                self._stack.discard(key)
                self._hot[key] = count
            else:
                counted[key] = count
        if len(counted) > _COUNTED:
            # Everything loses as much as leaves the smaller half with nothing.
            lost = sorted(counted.values())[len(counted) // 2]
            self._counted = {key: count - lost for key, count in counted.items() if count > lost}

    def _cool(self) -> None:
        """What is hot no longer is sampled again; numbers stay small."""
        wanted = _HOT_SHARE * self._requests / 2
        self._hot = {key: count for key, count in self._hot.items() if count >= wanted}
        if self._weight < _RESCALE_AT:
            return
        by = 1.0 / self._weight
        self._weight = 1.0
        self._hits_at = [count * by for count in self._hits_at]
        self._sampled *= by
        self._cold *= by
        self._hot_uses *= by
        self._requests *= by
        self._counted = {key: count * by for key, count in self._counted.items()}
        self._hot = {key: count * by for key, count in self._hot.items()}
