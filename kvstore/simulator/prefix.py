"""Prefix mode: what a policy hits where a block is of use only behind all blocks before it.

The policy is called as the daemon calls it: one ``touch`` of the deepest block found, then for each missing block,
parents first, one victim leaves if there is no room, and the block is inserted, linked to its parent. Where nothing may
leave, the request's tail leaves again when all of it is there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from kvstore.policy.base import EvictionPolicy
from kvstore.simulator.arrivals import Arrival, Outcome
from kvstore.simulator.block import PROGRESS_REQUESTS, ProgressTold, SimulatedBlock, TraceClock, make_policy


def simulate(
    arrivals: Sequence[Arrival], policy: str, capacity_blocks: int, *, progress: ProgressTold | None = None
) -> Outcome:
    """Replay requests, from an empty cache on.

    Args:
        arrivals: requests in order.
        policy: name of a policy, also one of those that are simulated only.
        capacity_blocks: blocks that may be resident.
        progress: is told every few hundred requests how many are done, and at the end.

    Raises:
        InvalidArgument: the capacity is not positive, or there is no such policy.
    """
    clock = TraceClock()
    chosen = make_policy(policy, capacity_blocks, clock)
    cache = PrefixCache(chosen, capacity_blocks)
    request = cache.request
    hits = []
    for access, (time_ns, ids) in enumerate(arrivals, 1):
        clock.now_ns = time_ns
        hits.append(request(ids, access) if ids else 0)
        if progress is not None and not access % PROGRESS_REQUESTS:
            progress(access)
    if progress is not None:
        progress(len(arrivals))
    return Outcome(policy, capacity_blocks, hits, [len(ids) for _, ids in arrivals])


class PrefixCache:
    """Resident blocks and the policy that chooses among them.

    Attributes:
        resident: blocks by id. A block's parent is always resident.
        evicted: blocks that left so far.
    """

    __slots__ = ("_capacity_blocks", "_policy", "evicted", "resident")

    def __init__(self, policy: EvictionPolicy, capacity_blocks: int) -> None:
        self._policy = policy
        self._capacity_blocks = capacity_blocks
        self.resident: dict[int, SimulatedBlock] = {}
        self.evicted = 0

    def request(self, ids: tuple[int, ...], access: int) -> int:
        """One request for blocks, at least one; the number of leading ones that were resident."""
        resident = self.resident
        # Leaves only leave, so what is resident of a path is its beginning.
        found = len(ids) if ids[-1] in resident else bisect_left(ids, True, key=lambda block: block not in resident)
        parent: SimulatedBlock | None = None
        policy = self._policy
        if found:
            parent = resident[ids[found - 1]]
            policy.touch(parent, found, access)
            if found == len(ids):
                return found
        insert, capacity_blocks = policy.insert, self._capacity_blocks
        for key in ids[found:] if found else ids:
            if len(resident) >= capacity_blocks:
                self._make_way(parent, access)
            block = resident[key] = SimulatedBlock(key, parent)
            if parent is not None:
                if parent.children is None:
                    parent.children = {block}
                else:
                    parent.children.add(block)
            insert(block, access)
            parent = block
        while len(resident) > capacity_blocks:
            # A path that is longer than what may leave for it loses its tail again.
            if not self._evict():
                break
        return found

    def _make_way(self, parent: SimulatedBlock | None, access: int) -> None:
        """Make room for one block behind ``parent``, if anything may leave."""
        if parent is None or parent.children:
            self._evict(access)
            return
        # Until it has this child it must not leave.
        parent.leases = 1
        self._evict(access)
        parent.leases = 0
        self._policy.released(parent)

    def _evict(self, before: int | None = None) -> bool:
        policy = self._policy
        victim = policy.next_victim(before)
        if victim is None:
            return False
        policy.discard(victim, evicted=True)
        # A policy gives back what it was given.
        block: SimulatedBlock = victim  # type: ignore[assignment]
        del self.resident[block.key]
        above = block.parent
        if above is not None:
            above.children.discard(block)  # type: ignore[union-attr]
            block.parent = None
        self.evicted += 1
        return True
