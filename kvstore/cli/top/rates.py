"""Rates from differences of what a daemon counts. Pure: no clock, no terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from kvstore.protocol.statistics import DaemonStats

__all__ = ["Counters", "Rates", "Sample"]


class Counters(NamedTuple):
    """Counts since a daemon's start, flat; those of a tier that is not there are 0.

    ``ssd_hits`` counts blocks that were brought up and used: for a request, or ahead of it.
    """

    requests: int
    overloaded: int
    matches: int
    match_keys: int
    match_hits: int
    gets: int
    get_keys: int
    get_hits: int
    get_throttled: int
    mapped_reads: int
    bytes_out: int
    stored: int
    exists: int
    throttled: int
    rejected: int
    bytes_in: int
    evicted_blocks: int
    evicted_bytes: int
    removed_blocks: int
    ssd_hits: int
    demoted_blocks: int
    demoted_bytes: int
    promoted_blocks: int
    promoted_bytes: int
    ssd_evicted_blocks: int
    ssd_evicted_bytes: int
    dropped_blocks: int
    refused_loads: int

    @classmethod
    def of(cls, stats: DaemonStats) -> Self:
        """The counts of a snapshot."""
        lookups, puts, eviction, ssd = stats.lookups, stats.puts, stats.eviction, stats.ssd
        return cls(
            requests=stats.server.requests,
            overloaded=stats.server.overloaded,
            matches=lookups.matches,
            match_keys=lookups.match_keys,
            match_hits=lookups.match_hits,
            gets=lookups.gets,
            get_keys=lookups.get_keys,
            get_hits=lookups.get_hits,
            get_throttled=lookups.get_throttled,
            mapped_reads=lookups.mapped_reads,
            bytes_out=lookups.bytes_out,
            stored=puts.stored,
            exists=puts.exists,
            throttled=puts.throttled,
            rejected=puts.rejected,
            bytes_in=puts.bytes_in,
            evicted_blocks=eviction.evicted_blocks,
            evicted_bytes=eviction.evicted_bytes,
            removed_blocks=eviction.removed_blocks,
            ssd_hits=_ssd_hits(stats),
            demoted_blocks=ssd.demoted_blocks if ssd else 0,
            demoted_bytes=ssd.demoted_bytes if ssd else 0,
            promoted_blocks=ssd.promoted_blocks if ssd else 0,
            promoted_bytes=ssd.promoted_bytes if ssd else 0,
            ssd_evicted_blocks=ssd.evicted_blocks if ssd else 0,
            ssd_evicted_bytes=ssd.evicted_bytes if ssd else 0,
            dropped_blocks=ssd.dropped_blocks if ssd else 0,
            refused_loads=ssd.refused_loads if ssd else 0,
        )


def _ssd_hits(stats: DaemonStats) -> int:
    """Blocks that were brought up, without those that were so ahead of their use and nobody has used yet."""
    ssd, prefetch = stats.ssd, stats.prefetch
    if ssd is None:
        return 0
    return ssd.hits if prefetch is None else max(ssd.hits - prefetch.blocks + prefetch.used_blocks, 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """What is kept of one snapshot.

    Attributes:
        incarnation: the daemon's life; counts of two lives have nothing to do with each other.
        uptime_s: the daemon's own clock, which rates are taken by.
        at_s: when it arrived here, on a clock that never goes back.
        counters: counts since the daemon's start.
        misses: blocks missed since then, by cause.
    """

    incarnation: str
    uptime_s: float
    at_s: float
    counters: Counters
    misses: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, stats: DaemonStats, at_s: float) -> Self:
        """The sample of a snapshot that arrived at ``at_s``."""
        causes = {} if stats.misses is None else stats.misses.causes
        misses = {name: counted.blocks for name, counted in causes.items()}
        return cls(stats.incarnation, stats.uptime_s, at_s, Counters.of(stats), misses)


@dataclass(frozen=True, slots=True)
class Rates:
    """What was added between two samples of one daemon's life.

    Attributes:
        seconds: between them, by the daemon's clock; more than 0.
        added: never negative; a count that went down meanwhile adds nothing.
        misses: blocks missed, by cause, of causes that occurred.
    """

    seconds: float
    added: Counters
    misses: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def between(cls, older: Sample, newer: Sample) -> Self | None:
        """None where the two say nothing of each other: another incarnation, or no time between them."""
        seconds = newer.uptime_s - older.uptime_s
        if newer.incarnation != older.incarnation or seconds <= 0:
            return None
        added = (max(new - old, 0) for old, new in zip(older.counters, newer.counters, strict=True))
        missed = {name: count - older.misses.get(name, 0) for name, count in newer.misses.items()}
        return cls(seconds, Counters(*added), {name: count for name, count in missed.items() if count > 0})

    def __add__(self, other: Rates) -> Rates:
        """What was added in both stretches of time."""
        both = (one + more for one, more in zip(self.added, other.added, strict=True))
        misses = Counter(self.misses) + Counter(other.misses)
        return Rates(self.seconds + other.seconds, Counters(*both), misses)

    def per_s(self, name: str) -> float:
        """One count's rate."""
        added: int = getattr(self.added, name)
        return added / self.seconds

    @property
    def asked(self) -> int:
        """Blocks asked for: by matches, or where nobody matched by gets."""
        return self.added.match_keys or self.added.get_keys

    @property
    def hits(self) -> int:
        """Of those, what was there."""
        return min(self.added.match_hits if self.added.match_keys else self.added.get_hits, self.asked)

    @property
    def hit_rate(self) -> float | None:
        """Hits of all blocks asked for, 0 to 1; None where nothing was asked."""
        return self.hits / self.asked if self.asked else None

    @property
    def ssd_rate(self) -> float | None:
        """The part of ``hit_rate`` that came up from the SSD; the rest was in DRAM.

        Blocks come up when they are read, perhaps a moment after they were matched, or are used a while after they were
        brought up: over a second it is about right, over a minute right.
        """
        return min(self.added.ssd_hits, self.hits) / self.asked if self.asked else None

    @property
    def dram_rate(self) -> float | None:
        """The part of ``hit_rate`` that was in DRAM."""
        return max(self.hits - self.added.ssd_hits, 0) / self.asked if self.asked else None
