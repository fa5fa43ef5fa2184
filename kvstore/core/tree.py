"""The prefix tree of one namespace in one tier: blocks by key, linked to their parents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Generic, Self, TypeVar

from kvstore.protocol.keys import ROOT_KEY

ORPHAN_DEPTH: Final = 1 << 32
"""Depth of a block whose parent is in no tier: of a request's blocks it leaves first, since nobody can reach it."""


class TreeBlock:
    """A block's place in a tree. See ``kvstore.policy.base.Evictable`` for the policy's view.

    Attributes:
        branched: there is or was a block behind it.
        held: how many of its marks in ``leases`` are of leases; the rest are of retentions.
    """

    __slots__ = ("access", "branched", "children", "depth", "held", "key", "leases", "parent", "parent_key")

    def __init__(self, key: bytes, parent_key: bytes) -> None:
        self.key = key
        self.parent_key = parent_key
        self.parent: Self | None = None
        self.children: set[Self] | None = None
        self.depth = 0
        self.leases = 0
        self.held = 0
        self.access = -1
        self.branched = False


B = TypeVar("B", bound=TreeBlock)


class PrefixTree(Generic[B]):
    """Blocks by key, linked into a tree.

    Attributes:
        blocks: all of them.
        orphans: blocks whose parent is not in this tree, by the parent's key.
    """

    __slots__ = ("blocks", "orphans")

    def __init__(self) -> None:
        self.blocks: dict[bytes, B] = {}
        self.orphans: dict[bytes, set[B]] = {}

    def closes_circle(self, key: bytes, parent_key: bytes) -> bool:
        """Whether a new block would be its own ancestor. Only possible where children already wait for ``key``."""
        if key == parent_key:
            return True
        if key not in self.orphans:
            return False
        above = self.blocks.get(parent_key)
        while above is not None:
            if above.parent_key == key:
                return True
            above = above.parent
        return False

    def insert(self, block: B, orphan_depth: int = ORPHAN_DEPTH) -> None:
        """Link a new block to its parent, or note it as an orphan, and adopt the children that waited for it.

        Args:
            block: not in the tree.
            orphan_depth: its depth where its parent is not in the tree.
        """
        self.blocks[block.key] = block
        if block.parent_key != ROOT_KEY:
            parent = self.blocks.get(block.parent_key)
            if parent is None:
                block.depth = orphan_depth
                self.orphans.setdefault(block.parent_key, set()).add(block)
            else:
                _link(block, parent)
        for child in self.orphans.pop(block.key, ()):
            _link(child, block)

    def fill(self, blocks: Sequence[B]) -> list[B]:
        """Insert many blocks into an empty tree, in any order and in linear time; those that form circles are left out.

        Returns:
            What was left out.
        """
        by_key = self.blocks
        for block in blocks:
            by_key[block.key] = block
        reached: list[B] = []
        for block in blocks:
            parent = by_key.get(block.parent_key)
            if parent is None:
                if block.parent_key != ROOT_KEY:
                    block.depth = ORPHAN_DEPTH
                    self.orphans.setdefault(block.parent_key, set()).add(block)
                reached.append(block)
            else:
                if parent.children is None:
                    parent.children = set()
                parent.children.add(block)
                parent.branched = True
                block.parent = parent
        # Grows while it is walked: parents before their children.
        for block in reached:
            if block.children:
                depth = block.depth + 1
                for child in block.children:
                    child.depth = depth
                reached += block.children
        if len(reached) == len(blocks):
            return []
        circles = set(blocks).difference(reached)
        for block in circles:
            del by_key[block.key]
            block.parent = block.children = None
        return list(circles)

    def deepen(self, parent_key: bytes, depth: int) -> None:
        """Tell blocks whose parent is not in this tree at what depth that one is."""
        for block in self.orphans.get(parent_key, ()):
            _set_depth(block, depth + 1)

    def remove(self, block: B) -> None:
        """Unlink a block; its children become orphans and keep their depth."""
        del self.blocks[block.key]
        parent = block.parent
        if parent is not None:
            assert parent.children is not None
            parent.children.discard(block)
            block.parent = None
        elif block.parent_key != ROOT_KEY:
            waiting = self.orphans[block.parent_key]
            waiting.discard(block)
            if not waiting:
                del self.orphans[block.parent_key]
        if block.children:
            for child in block.children:
                child.parent = None
            # Some may wait already: those that were on their way out, and nobody's children.
            self.orphans.setdefault(block.key, set()).update(block.children)
            block.children = None


def _link(block: B, parent: B) -> None:
    if parent.children is None:
        parent.children = set()
    parent.children.add(block)
    parent.branched = True
    block.parent = parent
    if block.children:
        _set_depth(block, parent.depth + 1)
    else:
        block.depth = parent.depth + 1


def _set_depth(block: TreeBlock, depth: int) -> None:
    if block.depth != depth:
        block.depth = depth
        for below in descendants(block):
            assert below.parent is not None
            below.depth = below.parent.depth + 1


def descendants(block: B) -> Iterator[B]:
    """All blocks below, parents before their children."""
    stack = list(block.children or ())
    while stack:
        below = stack.pop()
        yield below
        if below.children:
            stack.extend(below.children)
