"""A block without bytes, and the clock of a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore.errors import InvalidArgument
from kvstore.policy.base import EvictionPolicy, PolicyContext
from kvstore.policy.registry import make_simulated

ProgressTold = Callable[[int], None]
"""Is given the number of requests done."""

PROGRESS_REQUESTS: Final = 256
"""Requests between two calls of ``ProgressTold``."""


class SimulatedBlock:
    """What ``kvstore.policy.base.Evictable`` asks for. One unit in size, never leased; its id is its key."""

    # Not its size and leases: a block is made for every miss.
    __slots__ = ("access", "children", "depth", "key", "parent")
    leases = 0
    slot_bytes = 1

    def __init__(self, key: int, parent: SimulatedBlock | None) -> None:
        self.key = key
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: set[SimulatedBlock] | None = None
        self.access = -1


class TraceClock:
    """The time of the request that is simulated, in nanoseconds."""

    __slots__ = ("now_ns",)

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        """What ``PolicyContext.clock`` is for."""
        return self.now_ns


def make_policy(policy: str, capacity_blocks: int, clock: TraceClock) -> EvictionPolicy:
    """A new policy for a cache of blocks of one unit.

    Raises:
        InvalidArgument: the capacity is not positive, or there is no such policy.
    """
    if capacity_blocks < 1:
        raise InvalidArgument(f"capacity_blocks must be at least 1, got {capacity_blocks}")
    return make_simulated(policy, PolicyContext(capacity_blocks, clock))
