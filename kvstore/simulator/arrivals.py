"""What the simulator is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.simulator.trace import TraceRequest

_NS_PER_MS = 1_000_000


class Arrival(NamedTuple):
    """A request as a policy gets to see it.

    Attributes:
        time_ns: when it arrives, never before the one in front of it.
        ids: its blocks from the first on. Prefix mode: an id stands for a whole prefix, so it always follows the same
            id. Object mode: any.
    """

    time_ns: int
    ids: tuple[int, ...]


def full_block_arrivals(requests: Iterable[TraceRequest]) -> list[Arrival]:
    """A trace's requests for prefix mode: their full blocks; a partial tail is never cached."""
    return [Arrival(request.timestamp_ms * _NS_PER_MS, request.full_blocks) for request in requests]


def all_id_arrivals(requests: Iterable[TraceRequest]) -> list[Arrival]:
    """A trace's requests for object mode: all their ids, the partial tail included."""
    return [Arrival(request.timestamp_ms * _NS_PER_MS, request.hash_ids) for request in requests]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy hit at one capacity.

    Attributes:
        policy: its name.
        capacity_blocks: blocks of equal size that may be resident.
        hits: usable blocks of each request that were resident when it arrived.
        asked: blocks of each request.
    """

    policy: str
    capacity_blocks: int
    hits: Sequence[int]
    asked: Sequence[int]

    @property
    def hit_rate(self) -> float:
        """Blocks hit of blocks asked for, 0 to 1; 0 where nothing was asked for."""
        return _share(self.hits, self.asked)

    @property
    def hit_rate_first_half(self) -> float:
        """Of the first half of the requests, by number: the cache starts empty."""
        half = len(self.hits) // 2
        return _share(self.hits[:half], self.asked[:half])

    @property
    def hit_rate_second_half(self) -> float:
        """Of the second half of the requests, by number: the cache is warm."""
        half = len(self.hits) // 2
        return _share(self.hits[half:], self.asked[half:])


def _share(hits: Sequence[int], asked: Sequence[int]) -> float:
    total = sum(asked)
    return sum(hits) / total if total else 0.0
