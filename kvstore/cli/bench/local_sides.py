"""How the sides of the local benchmark take turns, and the rows that come of their times."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from kvstore.cli.bench.report import Row, percentile

__all__ = ["Kind", "Side", "Walk", "chunk_of", "row_of", "take_turns"]

_CHUNK_BYTES: Final = 4 << 20
_CHUNK: Final = 32


class Side(ABC):
    """One of those that are compared. Notes the nanoseconds of each operation in ``times_ns``."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []

    @abstractmethod
    def run(self, numbers: Sequence[int]) -> None:
        """Do the operations with these numbers; what they need is made before the clock runs."""

    @abstractmethod
    def check(self) -> None:
        """Look at what the last run left behind, outside of the timing.

        Raises:
            RemoteError: it is wrong.
        """


class Walk:
    """A way through ``count`` places in random order, again and again."""

    def __init__(self, count: int, seed: int) -> None:
        self._order = random.Random(seed).sample(range(count), count)
        self._at = 0

    def forward(self, steps: int) -> None:
        """Begin so much further on from now on."""
        self._at += steps

    def part(self, begin: int, count: int, lead: float) -> list[int]:
        """Places from ``begin`` on, seen by one who is ahead by a share of the whole way."""
        total = len(self._order)
        at = self._at + begin + int(lead * total)
        return [self._order[(at + index) % total] for index in range(count)]


def chunk_of(operation_bytes: int) -> int:
    """Operations that a side does before it is another's turn."""
    return max(1, min(_CHUNK, _CHUNK_BYTES // max(operation_bytes, 1)))


def take_turns(sides: Sequence[Side], walk: Walk, count: int, chunk: int) -> None:
    """Let each side do ``count`` operations, a chunk at a time, so that a change of load meets all of them.

    All go the same way, each ahead of the next by an equal share of it: what one has just brought into a cache
    another does not find there.
    """
    for begin in range(0, count, chunk):
        for offset in range(len(sides)):
            which = (begin // chunk + offset) % len(sides)
            side = sides[which]
            side.run(walk.part(begin, min(chunk, count - begin), which / len(sides)))
            side.check()
    walk.forward(count)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a row is about: see ``Row``."""

    op: str
    size_bytes: int | None = None
    batch: int = 1
    cache: str | None = None
    buffers: str | None = None


def row_of(
    kind: Kind,
    ours_ns: Sequence[int],
    baseline: str,
    baseline_ns: Sequence[int],
    *,
    limit: float | None = None,
    hoped: float | None = None,
    moves_bytes: bool = True,
) -> Row:
    """A row of medians. ``moves_bytes``: whether a rate in bytes means something."""
    ours, theirs = median(ours_ns), median(baseline_ns)
    moved = (kind.size_bytes or 0) * kind.batch if moves_bytes else 0
    return Row(
        op=kind.op,
        size_bytes=kind.size_bytes,
        batch=kind.batch,
        cache=kind.cache,
        buffers=kind.buffers,
        samples=len(ours_ns),
        median_us=round(ours / 1000, 2),
        p99_us=round(percentile(sorted(ours_ns), 0.99) / 1000, 2),
        gb_per_s=round(moved / ours, 3) if moved else None,
        baseline=baseline,
        baseline_median_us=round(theirs / 1000, 2),
        ratio=round(theirs / ours, 4),
        limit=None if limit is None else round(limit, 4),
        hoped=hoped,
    )
