"""The interface of an eviction policy and what it may know of a block.

A policy keeps an order and nothing else: no bytes, no slots, no I/O, no clock. Time is the *access number*: it grows
by one with each engine request, and all blocks of a request carry the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Protocol

BEFORE_ALL: Final = 0
"""An access number before all others."""


class Evictable(Protocol):
    """What a policy sees of a block.

    Attributes:
        depth: blocks above it in its prefix (0 for a first block; beyond all others where the parent is not there).
        parent: the resident parent, or None.
        children: resident children, or None where there never was one.
        leases: clients' leases on it; while not 0 it must not be chosen.
        access: the policy's own mark; nobody else writes it.
    """

    depth: int
    leases: int
    access: int

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
        """A block became resident. Precondition: the policy does not hold it."""

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """The engine request ``access`` used a block and the ``hits - 1`` ancestors next above it.

        Precondition: the policy holds ``deepest``. Ancestors were resident when they were used, but a report through
        mapped memory comes later, and some may have left by then: who walks up ends at the first missing parent. A
        policy for which one use is a use of all ancestors need not walk up.
        """

    def discard(self, block: Evictable) -> None:
        """A block leaves, for whatever reason. Precondition: held, and still linked to its parent and children."""

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """Blocks became useless (an ancestor was removed): they leave before all others, until touched again."""

    def released(self, block: Evictable) -> None:
        """The last lease on a block ended: it may be chosen again."""

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """The block to evict next: a leaf without leases; None where there is none.

        The block stays in the policy until ``discard``. Calling again without a change in between gives the same.

        Args:
            before: room is made for a block of this engine request: none of its own blocks leave for it, nor any that
                is worth keeping more than they are. With ``BEFORE_ALL`` nothing leaves.
        """

    def used(self, block: Evictable) -> int:
        """Access number of the last use of a block that is held, as far as the policy knows."""

    def held(self) -> int:
        """Blocks the policy holds, for ``validate_state()``."""
