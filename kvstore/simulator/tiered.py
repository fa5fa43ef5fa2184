"""Prefix mode with an SSD below DRAM, each with a policy of its own, as the daemon moves blocks between them.

What leaves DRAM is written below unless it is there; what is hit below comes up into DRAM, and its copy below stays. A
use is a use of the copy below, too. Reads and writes take no time here: a block is in a tier at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.policy.base import EvictionPolicy
from kvstore.simulator.arrivals import Arrival
from kvstore.simulator.block import SimulatedBlock, TraceClock, make_policy
from kvstore.simulator.progress import ProgressTold, numbered

__all__ = ["TieredHits", "simulate_tiered"]


@dataclass(frozen=True, slots=True)
class TieredHits:
    """What was hit.

    Attributes:
        dram: leading blocks of each request that were in DRAM when it arrived.
        ssd: blocks behind them that were on the SSD.
        written: blocks that were written to the SSD.
    """

    dram: Sequence[int]
    ssd: Sequence[int]
    written: int


def simulate_tiered(
    arrivals: Sequence[Arrival],
    policy: str,
    dram_blocks: int,
    ssd_blocks: int,
    *,
    progress: ProgressTold | None = None,
) -> TieredHits:
    """Replay requests, from empty tiers on.

    Args:
        arrivals: requests in order.
        policy: of both tiers, by name.
        dram_blocks: blocks that may be in DRAM.
        ssd_blocks: blocks that may be on the SSD.
        progress: is told every few hundred requests how many are done, and at the end.

    Raises:
        InvalidArgument: a capacity is not positive, or there is no such policy.
    """
    clock = TraceClock()
    below = _Below(make_policy(policy, ssd_blocks, clock), ssd_blocks)
    above = _Above(make_policy(policy, dram_blocks, clock), dram_blocks, below)
    dram, ssd = [], []
    for access, (time_ns, ids) in numbered(arrivals, progress):
        clock.now_ns = time_ns
        in_dram, on_ssd = above.request(ids, access) if ids else (0, 0)
        dram.append(in_dram)
        ssd.append(on_ssd)
    return TieredHits(dram, ssd, below.written)


class _Below:
    """The SSD: a block may be there before its parent is."""

    def __init__(self, policy: EvictionPolicy, capacity_blocks: int) -> None:
        self.resident: dict[int, SimulatedBlock] = {}
        self.written = 0
        self._policy = policy
        self._capacity_blocks = capacity_blocks
        self._orphans: dict[int, dict[SimulatedBlock, None]] = {}
        self._parent_of: dict[int, int] = {}

    def touch(self, ids: Sequence[int], access: int) -> None:
        """A request used these blocks, some of which may be here."""
        count = 0
        deepest: SimulatedBlock | None = None
        for key in reversed(ids):
            block = self.resident.get(key)
            if block is not None:
                deepest = deepest or block
                count += 1
            elif deepest is not None:
                self._policy.touch(deepest, count, access)
                deepest, count = None, 0
        if deepest is not None:
            self._policy.touch(deepest, count, access)

    def write(self, key: int, parent_key: int | None, depth: int, access: int) -> None:
        """A block leaves DRAM."""
        if key in self.resident:
            return
        if len(self.resident) >= self._capacity_blocks and not self._evict():
            return
        parent = None if parent_key is None else self.resident.get(parent_key)
        block = SimulatedBlock(key, parent, depth)
        if parent is not None:
            parent.adopt(block)
        elif parent_key is not None:
            self._orphans.setdefault(parent_key, {})[block] = None
            self._parent_of[key] = parent_key
        for child in self._orphans.pop(key, ()):
            child.parent = block
            del self._parent_of[child.key]
            block.adopt(child)
        self.resident[key] = block
        self.written += 1
        self._policy.insert(block, access)

    def _evict(self) -> bool:
        victim = self._policy.next_victim()
        if victim is None:
            return False
        self._policy.discard(victim, evicted=True)
        assert isinstance(victim, SimulatedBlock)
        del self.resident[victim.key]
        if victim.parent is not None:
            victim.parent.part_from(victim)
        parent_key = self._parent_of.pop(victim.key, None)
        if parent_key is not None:
            siblings = self._orphans[parent_key]
            del siblings[victim]
            if not siblings:
                del self._orphans[parent_key]
        return True


class _Above:
    """DRAM: a block's parent is always there."""

    def __init__(self, policy: EvictionPolicy, capacity_blocks: int, below: _Below) -> None:
        self.resident: dict[int, SimulatedBlock] = {}
        self._policy = policy
        self._capacity_blocks = capacity_blocks
        self._below = below

    def request(self, ids: Sequence[int], access: int) -> tuple[int, int]:
        """Leading blocks that were here, and those behind them that were below."""
        resident, below, policy = self.resident, self._below, self._policy
        here = 0
        for key in ids:
            if key not in resident:
                break
            here += 1
        found = here
        for key in ids[here:]:
            if key not in below.resident:
                break
            found += 1
        below.touch(ids[:found], access)
        parent: SimulatedBlock | None = None
        if here:
            parent = resident[ids[here - 1]]
            policy.touch(parent, here, access)
        for depth, key in enumerate(ids[here:], here):
            block = SimulatedBlock(key, parent, depth)
            if parent is not None:
                parent.adopt(block)
            if len(resident) >= self._capacity_blocks and not self._evict():
                if parent is not None:
                    parent.part_from(block)
                    policy.released(parent)
                break
            resident[key] = block
            policy.insert(block, access)
            parent = block
        return here, found - here

    def _evict(self) -> bool:
        victim = self._policy.next_victim()
        if victim is None:
            return False
        used = self._policy.used(victim)
        self._policy.discard(victim, evicted=True)
        assert isinstance(victim, SimulatedBlock)
        del self.resident[victim.key]
        parent = victim.parent
        if parent is not None:
            parent.part_from(victim)
        self._below.write(victim.key, None if parent is None else parent.key, victim.depth, used)
        return True
