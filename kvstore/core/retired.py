"""Blocks that were chosen to leave DRAM and are still there: readable until their room is needed.

They leave in the order in which they were chosen, so children before their parents. One is *clean* when it may leave
at once, because its copy below is durable or because it gets none.
"""

from __future__ import annotations

from kvstore.core.block import Block


class Retired:
    """The queue.

    Attributes:
        slot_bytes, clean_bytes: of all blocks in it, and of clean ones.
        records: of all blocks in it.
    """

    __slots__ = ("_blocks", "_by_parent", "clean_bytes", "records", "slot_bytes")

    def __init__(self) -> None:
        self._blocks: dict[Block, bool] = {}
        self._by_parent: dict[Block, set[Block]] = {}
        self.slot_bytes = 0
        self.clean_bytes = 0
        self.records = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: Block) -> bool:
        return block in self._blocks

    def all(self) -> dict[Block, bool]:
        """All blocks in order, and whether each is clean."""
        return dict(self._blocks)

    def add(self, block: Block, *, clean: bool) -> None:
        """A block was chosen, and has left the policy."""
        block.retired = True
        parent = block.parent
        if parent is not None:
            assert parent.children is not None
            parent.children.discard(block)
            self._by_parent.setdefault(parent, set()).add(block)
        self._blocks[block] = clean
        self.slot_bytes += block.slot_bytes
        self.records += len(block.parts)
        if clean:
            self.clean_bytes += block.slot_bytes

    def clean(self, block: Block) -> None:
        """A block in it may leave."""
        if not self._blocks[block]:
            self._blocks[block] = True
            self.clean_bytes += block.slot_bytes

    def is_clean(self, block: Block) -> bool:
        """Whether a block in it may leave."""
        return self._blocks[block]

    def clean_all(self) -> None:
        """All may leave."""
        for block in self._blocks:
            self.clean(block)

    def clean_bytes_above(self, block: Block) -> int:
        """Clean bytes that are none any more when a block and those above it come back."""
        found = 0
        above: Block | None = block
        while above is not None and above.retired:
            if self._blocks[above]:
                found += above.slot_bytes
            above = above.parent
        return found

    def first(self) -> Block | None:
        """The block that leaves first."""
        return next(iter(self._blocks), None)

    def take(self, block: Block) -> None:
        """A block comes back or leaves: its parent's child again, if that is there."""
        if self._blocks.pop(block):
            self.clean_bytes -= block.slot_bytes
        self.slot_bytes -= block.slot_bytes
        self.records -= len(block.parts)
        block.retired = False
        parent = block.parent
        if parent is not None:
            siblings = self._by_parent[parent]
            siblings.discard(block)
            if not siblings:
                del self._by_parent[parent]
            assert parent.children is not None
            parent.children.add(block)

    def adopted(self, parent: Block) -> None:
        """A block came that blocks in the queue waited for as their parent."""
        waiting = {child for child in parent.children or () if child.retired}
        if waiting:
            assert parent.children is not None
            parent.children -= waiting
            self._by_parent[parent] = waiting

    def part_from(self, parent: Block) -> None:
        """A block leaves the tree: those in the queue below it have no parent any more."""
        children = self._by_parent.pop(parent, None)
        if children:
            for child in children:
                child.parent = None
            parent.namespace.orphans.setdefault(parent.key, set()).update(children)
