"""Object mode: every id of a trace is a block by itself, and every access a hit or a miss.

This is how caches are compared in general; of prefixes nothing is known. The policies are those of prefix mode, on
blocks without parents and children.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.simulator.arrivals import Arrival, Outcome
from kvstore.simulator.block import SimulatedBlock, TraceClock, make_policy
from kvstore.simulator.progress import ProgressTold, numbered


def simulate_objects(
    arrivals: Sequence[Arrival], policy: str, capacity_blocks: int, *, progress: ProgressTold | None = None
) -> Outcome:
    """Replay all ids of the requests in order, from an empty cache on; each is an access of its own.

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
    touch, insert, discard, next_victim = chosen.touch, chosen.insert, chosen.discard, chosen.next_victim
    resident: dict[int, SimulatedBlock] = {}
    find = resident.get
    hits = []
    access = 0
    for _, (time_ns, ids) in numbered(arrivals, progress):
        clock.now_ns = time_ns
        hit = 0
        for key in ids:
            access += 1
            block = find(key)
            if block is not None:
                touch(block, 1, access)
                hit += 1
                continue
            if len(resident) >= capacity_blocks:
                victim = next_victim()
                assert isinstance(victim, SimulatedBlock)
                discard(victim, evicted=True)
                del resident[victim.key]
            block = resident[key] = SimulatedBlock(key, None, 0)
            insert(block, access)
        hits.append(hit)
    return Outcome(policy, capacity_blocks, hits, [len(ids) for _, ids in arrivals])
