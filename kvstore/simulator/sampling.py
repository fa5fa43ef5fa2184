"""Simulation of a sample of the blocks: any policy at any capacity in a fraction of the time.

A block is in the sample if a hash of its id is below a share of all hashes, and the cache is smaller by the same share
(Waldspurger et al., "Cache modeling and optimization using miniature simulations", USENIX ATC 2017). A request keeps
what the sample has of its path, so paths, turns and their times stay what they were; only blocks are fewer.

What bends such a simulation are single blocks in many requests, a system prompt above all: in the sample they count
for many others, outside it they are missing. So blocks of at least one request in a hundred are *hot*: counted
exactly, taken as resident, and not sampled. And what a sample can hit at all is known of the whole trace, so hits are
scaled by that, not by the share: uses of blocks that were used before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import Arrival

__all__ = ["HOT_SHARE", "Halves", "HitRates", "Sample", "Workload"]

HOT_SHARE: Final = 0.01
"""Of the requests that a hot block is in."""

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_FACTORS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))


class HitRates(NamedTuple):
    """Blocks hit of blocks asked for, 0 to 1: of all requests, and of the second half of them, by number."""

    whole: float
    second_half: float


class Halves(NamedTuple):
    """A count over all requests, and over the second half."""

    whole: int
    second_half: int


class Workload:
    """All requests of a trace, and what must be known of them before a sample means something.

    Attributes:
        arrivals: as given.
        distinct_blocks: of all requests.
        hot: ids of hot blocks.
        hot_uses: of those.
        asked: blocks that were asked for.
    """

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self.arrivals = arrivals
        uses = Counter(key for _, ids in arrivals for key in ids)
        self.distinct_blocks = len(uses)
        self._distinct = np.fromiter(uses, np.uint64, len(uses))
        self.hot = frozenset(key for key, count in uses.items() if count >= HOT_SHARE * len(arrivals) and count > 1)
        self.hot_uses = sum(uses[key] for key in self.hot)
        self.asked = Halves(
            sum(len(ids) for _, ids in arrivals), sum(len(ids) for _, ids in arrivals[len(arrivals) // 2 :])
        )
        self._reuses = _reuses(arrivals, frozenset())
        self._cold_reuses = _reuses(arrivals, self.hot)

    @property
    def unlimited(self) -> HitRates:
        """What a cache hits that nothing leaves."""
        return _rates(self._reuses, self.asked)

    def hit_rates(self, hits: Sequence[int]) -> HitRates:
        """Hit rates, from what an exact simulation hit in each request."""
        return _rates((sum(hits), sum(hits[len(hits) // 2 :])), self.asked)

    def sample(self, rate: float, seed: int = 0) -> Sample:
        """A sample of the blocks that are not hot.

        Args:
            rate: share of the blocks, above 0 and at most 1.
            seed: another one gives another sample.

        Raises:
            InvalidArgument: the rate is no share.
        """
        if not 0 < rate <= 1:
            raise InvalidArgument(f"a sample is a share above 0 and at most 1 of the blocks, got {rate}")
        salt = _mixed(np.array([seed + 1], np.uint64))
        below = np.uint64(min(int(rate * (1 << 64)), (1 << 64) - 1))
        taken = frozenset(self._distinct[_mixed(self._distinct ^ salt) <= below].tolist()) - self.hot
        arrivals = [Arrival(time_ns, tuple([key for key in ids if key in taken])) for time_ns, ids in self.arrivals]
        return Sample(
            arrivals, rate, len(self.hot), self.asked, self._reuses, self._cold_reuses, _reuses(arrivals, frozenset())
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """Requests with the blocks of a sample.

    Attributes:
        arrivals: to simulate; some have no blocks.
        rate: share of the blocks that are not hot.
        hot_blocks: that are left out.
        asked: blocks of all requests that were asked for.
        reuses: those of them that were used before.
        cold_reuses: the same of blocks that are not hot.
        sampled_reuses: the same of blocks in the sample.
    """

    arrivals: Sequence[Arrival]
    rate: float
    hot_blocks: int
    asked: Halves
    reuses: Halves
    cold_reuses: Halves
    sampled_reuses: Halves

    def capacity_blocks(self, capacity_blocks: int) -> int:
        """Sampled blocks that stand for a capacity; 0 where hot blocks take all of it."""
        return round((capacity_blocks - self.hot_blocks) * self.rate)

    def hit_rates(self, hits: Sequence[int]) -> HitRates:
        """Hit rates of the whole, from what a simulation of the sample hit in each request."""
        return self.scaled(sum(hits), sum(hits[len(hits) // 2 :]))

    def scaled(self, hits: int, hits_second_half: int) -> HitRates:
        """Hit rates of the whole, from hits of the sample."""
        return _rates(
            [
                every - cold + (cold * hit / sampled if sampled else cold)
                for every, cold, sampled, hit in zip(
                    self.reuses, self.cold_reuses, self.sampled_reuses, (hits, hits_second_half), strict=True
                )
            ],
            self.asked,
        )


def _reuses(arrivals: Sequence[Arrival], without: frozenset[int]) -> Halves:
    """Uses of blocks that were used before, but for some blocks."""
    seen: set[int] = set()
    counts = [0, 0]
    half = len(arrivals) // 2
    for number, (_, ids) in enumerate(arrivals):
        keys = [key for key in ids if key not in without] if without else ids
        before = len(seen)
        seen.update(keys)
        counts[number >= half] += len(keys) - (len(seen) - before)
    return Halves(sum(counts), counts[1])


def _rates(hits: Sequence[float], asked: Halves) -> HitRates:
    return HitRates(*(hit / of if of else 0.0 for hit, of in zip(hits, asked, strict=True)))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: neighbouring ids get unrelated hashes."""
    mixed = values * _GOLDEN
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        mixed = (mixed ^ mixed >> shift) * factor
    return mixed ^ mixed >> _SHIFTS[-1]
