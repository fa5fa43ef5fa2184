"""Prefix mode: what a policy hits where a block is of use only behind all blocks before it.

The policy is called as the daemon calls it: one ``touch`` of the deepest block found, then for each missing block,
parents first, one victim leaves if there is no room, and the block is inserted, linked to its parent. Where nothing may
leave, the request's tail leaves again when all of it is there. The loop is written out, without calls of its own: it is
run for every block of a trace, and policies are called as often as it can bear.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from kvstore.policy.base import EvictionPolicy
from kvstore.simulator.arrivals import Arrival, Outcome
from kvstore.simulator.block import SimulatedBlock, TraceClock, make_policy
from kvstore.simulator.progress import ProgressTold, numbered


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
    for access, (time_ns, ids) in numbered(arrivals, progress):
        clock.now_ns = time_ns
        hits.append(request(ids, access) if ids else 0)
    return Outcome(policy, capacity_blocks, hits, [len(ids) for _, ids in arrivals])


class PrefixCache:
    """Resident blocks and the policy that chooses among them.

    The object of a block that left comes again as another block's: it is by its key that a policy knows one again.

    Attributes:
        resident: blocks by id. A block's parent is always resident.
    """

    __slots__ = ("_capacity_blocks", "_policy", "resident")

    def __init__(self, policy: EvictionPolicy, capacity_blocks: int) -> None:
        self._policy = policy
        self._capacity_blocks = capacity_blocks
        self.resident: dict[int, SimulatedBlock] = {}

    def request(self, ids: tuple[int, ...], access: int) -> int:
        """One request for blocks, at least one; the number of leading ones that were resident."""
        resident, policy = self.resident, self._policy
        # Leaves only leave, so what is resident of a path is its beginning.
        found = len(ids) if ids[-1] in resident else bisect_left(ids, True, key=lambda block: block not in resident)
        parent: SimulatedBlock | None = None
        if found:
            parent = resident[ids[found - 1]]
            policy.touch(parent, found, access)
            if found == len(ids):
                return found
        insert, next_victim, discard = policy.insert, policy.next_victim, policy.discard
        released = policy.released
        free = self._capacity_blocks - len(resident)
        victim: SimulatedBlock | None
        for depth, key in enumerate(ids[found:] if found else ids, found):
            if free > 0:
                free -= 1
                block = SimulatedBlock(key, parent, depth)
            else:
                # Until it has this child the parent must not leave.
                leaf = None if parent is None or parent.children else parent
                if leaf is not None:
                    leaf.leases = 1
                # A policy gives back what it was given.
                victim = next_victim(access)  # type: ignore[assignment]
                if victim is None:
                    free -= 1
                    block = SimulatedBlock(key, parent, depth)
                else:
                    discard(victim, evicted=True)
                    del resident[victim.key]
                    above = victim.parent
                    if above is not None:
                        children = above.children
                        if len(children) == 1:  # type: ignore[arg-type]
                            above.children = None
                        else:
                            children.discard(victim)  # type: ignore[union-attr]
                    # What left comes again as the next block: to make one takes as long as many a policy does.
                    block = victim
                    block.key = key
                    block.parent = parent
                    block.depth = depth
                if leaf is not None:
                    leaf.leases = 0
                    released(leaf)
            resident[key] = block
            if parent is not None:
                children = parent.children
                if children is None:
                    parent.children = (block,)
                elif len(children) == 1:
                    parent.children = {*children, block}
                else:
                    children.add(block)
            insert(block, access)
            parent = block
        if free < 0:
            self._shorten()
        return found

    def _shorten(self) -> None:
        """A path that is longer than what may leave for it loses its tail again."""
        policy, resident = self._policy, self.resident
        while len(resident) > self._capacity_blocks:
            victim: SimulatedBlock | None = policy.next_victim()  # type: ignore[assignment]
            if victim is None:
                break
            policy.discard(victim, evicted=True)
            del resident[victim.key]
            if victim.parent is not None:
                victim.parent.part_from(victim)
