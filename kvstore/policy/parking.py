"""What queue-like policies have in common: only leaves without leases leave, and nothing is looked at twice for it.

A policy keeps an order with a victim end. A block that reaches that end and has children or a lease is *parked*: taken
out of the order, with all that the policy knows of it. It comes back to the victim end when its last child left or its
last lease ended, so that a prefix leaves tail first. Blocks that are condemned are in a stack of their own, and leave
before all others. Blocks that may not leave for the request at hand (``before``) are put aside, until one asks that may
have them.

A block's ``access`` is its mark: the access number of its last use, and flags below it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, Final

from kvstore.policy.base import BEFORE_ALL, Evictable, PolicyContext

GONE: Final = 0
"""Mark of a block that is not held; access numbers begin at 1."""
PARKED: Final = 1
CONDEMNED: Final = 2
FLAG: Final = 4
"""First of the flags that are the policies' own."""
SHIFT: Final = 6
FLAGS: Final = (1 << SHIFT) - 1

_OUT: Final = PARKED | CONDEMNED


class Parking(ABC):
    """Base of these policies. What is amortised O(1) here stays so: each call parks at most what another brought back.

    Subclasses say what their order is. They never see a block that is condemned.
    """

    name: ClassVar[str]

    def __init__(self, context: PolicyContext) -> None:
        self._capacity_bytes = context.capacity_bytes
        self._held = 0
        self._condemned: OrderedDict[Evictable, None] = OrderedDict()
        self._aside: dict[Evictable, None] = {}
        self._aside_before = 0

    @abstractmethod
    def _enter(self, block: Evictable) -> None:
        """A block is new to the order, or was condemned and is used again."""

    @abstractmethod
    def _use(self, block: Evictable) -> None:
        """A block was used once more. It may be parked, and stays so unless the policy moves it by ``_unpark_to``."""

    @abstractmethod
    def _first(self) -> Evictable | None:
        """The block at the victim end, which stays there."""

    @abstractmethod
    def _take(self, block: Evictable) -> None:
        """Take a block out of the order; it is parked, or leaves."""

    @abstractmethod
    def _bring_back(self, block: Evictable) -> None:
        """A parked block belongs to the victim end again."""

    def _spare(self, block: Evictable) -> bool:
        """The block at the victim end may leave. If it gets another chance: give it that, away from the end."""
        return False

    def _leave(self, block: Evictable, *, evicted: bool) -> None:  # noqa: B027 - most need none
        """A block leaves that is not in the order any more: forget it, or remember it if it may be asked for again."""

    def insert(self, block: Evictable, access: int) -> None:
        """See ``EvictionPolicy``."""
        self._held += 1
        block.access = access << SHIFT
        self._enter(block)

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """See ``EvictionPolicy``. Walks up to the first block that this request used already."""
        block: Evictable | None = deepest
        while hits and block is not None:
            mark = block.access
            if mark >> SHIFT >= access:
                break
            if mark & CONDEMNED:
                self._pardon(block)
            block.access = access << SHIFT | block.access & FLAGS
            self._use(block)
            block = block.parent
            hits -= 1
        while block is not None and block.access & CONDEMNED:
            self._pardon(block)
            block = block.parent

    def discard(self, block: Evictable, *, evicted: bool = False) -> None:
        """See ``EvictionPolicy``."""
        self._held -= 1
        mark = block.access
        parent = block.parent
        if mark & CONDEMNED:
            if not mark & PARKED:
                del self._condemned[block]
        else:
            if not mark & PARKED:
                self._take(block)
            elif self._aside:
                self._aside.pop(block, None)
            self._leave(block, evicted=evicted)
            above = parent
            while above is not None and above.access & CONDEMNED:
                self._pardon(above)
                above = above.parent
        block.access = GONE
        if parent is not None and parent.access & PARKED and not parent.leases:
            children = parent.children
            if children is None or len(children) <= 1:
                self._unpark(parent)

    def resized(self, block: Evictable, before_bytes: int) -> None:  # noqa: B027 - most need none
        """See ``EvictionPolicy``. Of no matter to policies without lists of limited size."""

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """See ``EvictionPolicy``."""
        for block in blocks:
            mark = block.access
            if mark & CONDEMNED:
                continue
            if not mark & PARKED:
                self._take(block)
            elif self._aside:
                self._aside.pop(block, None)
            self._leave(block, evicted=False)
            if block.children or block.leases:
                block.access = CONDEMNED | PARKED
            else:
                block.access = CONDEMNED
                self._condemned[block] = None

    def released(self, block: Evictable) -> None:
        """See ``EvictionPolicy``."""
        mark = block.access
        if mark > 0 and mark & PARKED and not block.children and not block.leases:
            self._unpark(block)

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """See ``EvictionPolicy``."""
        if before is not None and before <= BEFORE_ALL:
            return None
        while self._condemned:
            block: Evictable | None = next(reversed(self._condemned))
            assert block is not None
            if not block.children and not block.leases:
                return block
            del self._condemned[block]
            block.access |= PARKED
        if self._aside and (before is None or before > self._aside_before):
            for block in reversed(self._aside):
                block.access ^= PARKED
                self._bring_back(block)
            self._aside.clear()
        while True:
            block = self._first()
            if block is None:
                return None
            if self._spare(block):
                continue
            if block.children or block.leases:
                self._take(block)
                block.access |= PARKED
            elif before is not None and block.access >> SHIFT >= before:
                self._take(block)
                block.access |= PARKED
                self._aside[block] = None
                self._aside_before = before
            else:
                return block

    def used(self, block: Evictable) -> int:
        """See ``EvictionPolicy``. 0 for a block that is condemned."""
        return block.access >> SHIFT

    def held(self) -> int:
        """See ``EvictionPolicy``."""
        return self._held

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return 0

    def _unpark(self, block: Evictable) -> None:
        block.access ^= PARKED
        if block.access & CONDEMNED:
            self._condemned[block] = None
        else:
            if self._aside:
                self._aside.pop(block, None)
            self._bring_back(block)

    def _unpark_to(self, block: Evictable) -> None:
        """For policies that move a block as soon as it is used: it is parked no more, and in the order again."""
        block.access ^= PARKED
        if self._aside:
            self._aside.pop(block, None)

    def _pardon(self, block: Evictable) -> None:
        """A condemned block is one like others again."""
        if not block.access & PARKED:
            del self._condemned[block]
        block.access = GONE
        self._enter(block)
