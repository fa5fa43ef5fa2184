"""A block without bytes, and the clock of a trace."""

from __future__ import annotations

from kvstore.errors import InvalidArgument
from kvstore.format.constants import PAGE_BYTES
from kvstore.policy.base import EvictionPolicy, PolicyContext
from kvstore.policy.registry import make_simulated


class SimulatedBlock:
    """What ``kvstore.policy.base.Evictable`` asks for. As large as the smallest slot; its id is its key."""

    __slots__ = ("access", "children", "depth", "key", "leases", "parent")
    slot_bytes = PAGE_BYTES

    def __init__(self, key: int, parent: SimulatedBlock | None, depth: int) -> None:
        self.key = key
        self.parent = parent
        self.depth = depth
        # Most have one child, which takes no set.
        self.children: set[SimulatedBlock] | tuple[SimulatedBlock] | None = None
        self.leases = 0
        self.access = -1

    def adopt(self, child: SimulatedBlock) -> None:
        """Link a child. Precondition: its parent is this block."""
        children = self.children
        if children is None:
            self.children = (child,)
        elif len(children) == 1:
            self.children = {*children, child}
        else:
            children.add(child)

    def part_from(self, child: SimulatedBlock) -> None:
        """Unlink a child, which has no parent any more."""
        children = self.children
        assert children is not None
        if len(children) == 1:
            self.children = None
        else:
            children.discard(child)
        child.parent = None


class TraceClock:
    """The time of the request that is simulated, in nanoseconds."""

    __slots__ = ("now_ns",)

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        """What ``PolicyContext.clock`` is for."""
        return self.now_ns


def make_policy(policy: str, capacity_blocks: int, clock: TraceClock) -> EvictionPolicy:
    """A new policy for a cache of so many blocks.

    Raises:
        InvalidArgument: the capacity is not positive, or there is no such policy.
    """
    if capacity_blocks < 1:
        raise InvalidArgument(f"capacity_blocks must be at least 1, got {capacity_blocks}")
    return make_simulated(policy, PolicyContext(capacity_blocks * PAGE_BYTES, clock))
