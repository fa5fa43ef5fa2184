"""The interface of an eviction policy and what it may know of a block.

A policy keeps an order and nothing else: no slots, no I/O; its clock is passed in. *Access numbers* order engine
requests: the number grows by one with each, and all blocks of a request carry the same one. The daemon and the
simulator (``kvstore.simulator``) run the same policies and call them in the same order: for each request one ``touch``
of what it found, then for each missing block, parents first: victims leave until there is room, then ``insert``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

BEFORE_ALL: Final = 0
"""An access number before all others."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is made for.

    Attributes:
        capacity_bytes: slots that the tier's resident blocks may occupy together. The tier enforces it; a policy may
            scale its lists by it.
        clock: nanoseconds that never go back; of the daemon, or of the trace that is simulated.
    """

    capacity_bytes: int
    clock: Callable[[], int]


class Evictable(Protocol):
    """What a policy sees of a block.

    Attributes:
        key: its block key; unlike the object, the same when the block comes back. Anything hashable to a policy.
        depth: blocks above it in its prefix (0 for a first block; beyond all others where the parent is not there).
        parent: the resident parent, or None.
        children: resident children, or None where there never was one.
        leases: clients' leases on it; while not 0 it must not be chosen.
        slot_bytes: what it occupies, at least 1; see ``EvictionPolicy.resized``.
        access: the policy's own mark; nobody else writes it.
    """

    access: int

    @property
    def key(self) -> Hashable:
        """Its block key."""

    @property
    def depth(self) -> int:
        """Blocks above it."""

    @property
    def leases(self) -> int:
        """Leases on it."""

    @property
    def slot_bytes(self) -> int:
        """What it occupies."""

    @property
    def parent(self) -> Evictable | None:
        """The resident parent."""

    @property
    def children(self) -> Collection[Evictable] | None:
        """Resident children."""


class EvictionPolicy(Protocol):
    """Chooses the block that leaves next. Preconditions are the caller's duty and are not checked here."""

    @property
    def name(self) -> str:
        """Name in the settings and in statistics."""

    def insert(self, block: Evictable, access: int) -> None:
        """A block became resident, and is linked to its parent and children. Precondition: the policy does not hold it.

        Access numbers come in order, but for one that is late (a report through mapped memory), and where a policy
        takes over blocks that another one held.
        """

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """The engine request ``access`` used a block and the ``hits - 1`` ancestors next above it.

        A request may tell the same use twice (its match, then its get); it is one use of a block all the same.
        Precondition: the policy holds ``deepest``. Ancestors were resident when they were used, but a report through
        mapped memory comes later, and some may have left by then: who walks up ends at the first missing parent. A
        policy for which one use is a use of all ancestors need not walk up.
        """

    def discard(self, block: Evictable, *, evicted: bool = False) -> None:
        """A block leaves. Precondition: held, and still linked to its parent and children.

        Args:
            block: the block.
            evicted: it leaves for others, so it may be asked for again: a policy with ghosts remembers it. Otherwise it
                was removed, or is over.
        """

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """``block.slot_bytes`` changed from ``before_bytes``: a part came, or went. Precondition: held."""

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """Blocks became useless (an ancestor was removed): they leave before all others, until touched again."""

    def released(self, block: Evictable) -> None:
        """The last lease on a block ended: it may be chosen again. Does nothing for a block that is not held."""

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """The block to evict next: a leaf without leases; None where there is none.

        The block stays in the policy until ``discard``. Calling again without a change in between gives the same.

        Args:
            before: room is made for a block of this engine request: none that was used by this request, or by a later
                one, leaves for it. With ``BEFORE_ALL`` nothing leaves. A policy that is simulated only may turn it
                away: None, although there is a block that might leave.
        """

    def used(self, block: Evictable) -> int:
        """Access number of the last use of a block that is held, as far as the policy knows."""

    def held(self) -> int:
        """Blocks the policy holds, for ``validate_state()``."""

    def ghost_bytes(self) -> int:
        """Memory that what it remembers of blocks that left takes, about; bounded by each policy's own bound."""


@runtime_checkable
class Choosing(Protocol):
    """A policy that has several orders and follows one of them at a time."""

    @property
    def following(self) -> str:
        """Which one now, in a word for people."""


def following(policy: EvictionPolicy) -> str:
    """Which of its orders a policy follows now; "" of one that has a single one."""
    return policy.following if isinstance(policy, Choosing) else ""
