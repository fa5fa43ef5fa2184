"""Condemned blocks: they leave before all others, deepest first, until they are used again."""

from __future__ import annotations

from kvstore.policy.base import Evictable


class Condemned:
    """Those that may leave, and those that have children or leases. For policies that know blocks by other means.

    Attributes:
        blocks: all of them; whether each is parked.
    """

    __slots__ = ("_leaves", "blocks")

    def __init__(self) -> None:
        self.blocks: dict[Evictable, bool] = {}
        self._leaves: dict[Evictable, None] = {}

    def add(self, block: Evictable) -> None:
        """A block became useless; does nothing for one that is."""
        if block not in self.blocks:
            parked = self.blocks[block] = bool(block.children or block.leases)
            if not parked:
                self._leaves[block] = None

    def first(self) -> Evictable | None:
        """The one that leaves next."""
        while self._leaves:
            block = next(reversed(self._leaves))
            if not block.children and not block.leases:
                return block
            del self._leaves[block]
            self.blocks[block] = True
        return None

    def discard(self, block: Evictable) -> None:
        """A block leaves, condemned or not: its ancestors are of use if it was."""
        condemned = self.blocks.pop(block, None)
        self._leaves.pop(block, None)
        parent = block.parent
        if parent is None:
            return
        if condemned is None:
            self.pardon(parent)
        elif not parent.leases and len(parent.children or ()) <= 1:
            self._unpark(parent)

    def released(self, block: Evictable) -> None:
        """A block without children has no leases any more."""
        self._unpark(block)

    def pardon(self, block: Evictable) -> None:
        """A block was used, and so were its ancestors."""
        above: Evictable | None = block
        while above is not None and self.blocks:
            if self.blocks.pop(above, True) is False:
                del self._leaves[above]
            above = above.parent

    def _unpark(self, block: Evictable) -> None:
        if self.blocks.get(block):
            self.blocks[block] = False
            self._leaves[block] = None
