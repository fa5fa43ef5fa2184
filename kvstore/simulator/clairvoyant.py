"""The clairvoyant bound: what a policy would hit that knew the whole trace.

All blocks of a request enter; then, while there are more than may be resident, the one whose next use is furthest
leaves, by request number, among equals the deepest. A block that is never used again leaves at once, and so may one
that has just entered. For blocks of equal size this is the most hits that any policy can have (Belady, "A study of
replacement algorithms for a virtual-storage computer", 1966, with the liberty to keep nothing), and it leaves no block
without its parent: a parent's next use is never after its child's.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import Arrival, Outcome

CLAIRVOYANT: Final = "opt"
"""Name of the bound in tables; it is no policy."""


def simulate_clairvoyant(arrivals: Sequence[Arrival], capacity_blocks: int) -> Outcome:
    """The bound in prefix mode.

    Raises:
        InvalidArgument: the capacity is not positive.
    """
    paths = [ids for _, ids in arrivals]
    return Outcome(CLAIRVOYANT, capacity_blocks, _hits(paths, capacity_blocks), [len(ids) for ids in paths])


def simulate_clairvoyant_objects(arrivals: Sequence[Arrival], capacity_blocks: int) -> Outcome:
    """The bound in object mode, where every id is an access of its own.

    Raises:
        InvalidArgument: the capacity is not positive.
    """
    asked = [len(ids) for _, ids in arrivals]
    every = iter(_hits([(key,) for _, ids in arrivals for key in ids], capacity_blocks))
    hits = [sum(next(every) for _ in range(count)) for count in asked]
    return Outcome(CLAIRVOYANT, capacity_blocks, hits, asked)


def _hits(paths: Sequence[tuple[int, ...]], capacity_blocks: int) -> list[int]:
    if capacity_blocks < 1:
        raise InvalidArgument(f"capacity_blocks must be at least 1, got {capacity_blocks}")
    # Next use of each block of each path, as a path number; 0 where there is none.
    coming: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for number in range(len(paths) - 1, -1, -1):
        path = paths[number]
        next_uses.append([coming.get(key, 0) for key in path])
        coming.update(dict.fromkeys(path, number))
    next_uses.reverse()
    resident: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = []
    for path, uses in zip(paths, next_uses, strict=True):
        hits.append(bisect_left(path, True, key=lambda key: key not in resident))
        for depth, (key, use) in enumerate(zip(path, uses, strict=True)):
            if use:
                resident[key] = use
                heapq.heappush(heap, (-use, -depth, key))
            else:
                resident.pop(key, None)
        while len(resident) > capacity_blocks:
            use, _, key = heapq.heappop(heap)
            # Entries of uses that are over, or of blocks that left, are stale.
            if resident.get(key) == -use:
                del resident[key]
    return hits
