"""Blocks that were chosen to leave DRAM and are still there: readable until their room is needed.

One is *clean* when it may leave at once, because its copy below is durable or because it gets none. They leave in the
order in which they became clean, others only where there is no clean one.
"""

from __future__ import annotations

from kvstore.core.block import Block
from kvstore.core.tree import descendants


class Retired:
    """All of them.

    Attributes:
        slot_bytes, clean_bytes: of all, and of clean ones.
        records, clean_records: likewise.
    """

    __slots__ = ("_by_parent", "_clean", "_dirty", "clean_bytes", "clean_records", "records", "slot_bytes")

    def __init__(self) -> None:
        self._clean: dict[Block, None] = {}
        self._dirty: dict[Block, set[int]] = {}
        """With the parts that it waits for."""
        self._by_parent: dict[Block, set[Block]] = {}
        self.slot_bytes = 0
        self.clean_bytes = 0
        self.records = 0
        self.clean_records = 0

    def __len__(self) -> int:
        return len(self._clean) + len(self._dirty)

    def __contains__(self, block: Block) -> bool:
        return block in self._clean or block in self._dirty

    def all(self) -> dict[Block, bool]:
        """All blocks, and whether each is clean."""
        return dict.fromkeys(self._clean, True) | dict.fromkeys(self._dirty, False)

    def add(self, block: Block, parts: set[int]) -> None:
        """A block was chosen, and has left the policy; it is clean once these parts of it were stored below."""
        block.retired = True
        parent = block.parent
        if parent is not None:
            assert parent.children is not None
            parent.children.discard(block)
            self._by_parent.setdefault(parent, set()).add(block)
        self._dirty[block] = parts
        self.slot_bytes += block.slot_bytes
        self.records += len(block.parts)
        tenant = block.namespace.tenant
        if tenant is not None:
            tenant.dirty[block] = None
            tenant.retired_bytes += block.slot_bytes
        if not parts:
            self.clean(block)

    def stored(self, block: Block, part: int) -> None:
        """A part of a retired block was stored below. Whether it stays there is not for this block to wait for."""
        parts = self._dirty.get(block)
        if parts is not None:
            parts.discard(part)
            if not parts:
                self.clean(block)

    def clean(self, block: Block) -> None:
        """A retired block may leave."""
        if block in self._dirty:
            del self._dirty[block]
            self._clean[block] = None
            self.clean_bytes += block.slot_bytes
            self.clean_records += len(block.parts)
            tenant = block.namespace.tenant
            if tenant is not None:
                del tenant.dirty[block]
                tenant.clean[block] = None
                tenant.clean_bytes += block.slot_bytes

    def is_clean(self, block: Block) -> bool:
        """Whether a retired block may leave."""
        return block in self._clean

    def clean_all(self) -> None:
        """All may leave."""
        for block in list(self._dirty):
            self.clean(block)

    def clean_above(self, block: Block) -> tuple[int, int]:
        """Bytes and records that are clean no more when a block and those above it come back."""
        slot_bytes = records = 0
        above: Block | None = block
        while above is not None and above.retired:
            if above in self._clean:
                slot_bytes += above.slot_bytes
                records += len(above.parts)
            above = above.parent
        return slot_bytes, records

    def first(self) -> Block | None:
        """The block that leaves first: a clean one, where there is one."""
        return next(iter(self._clean or self._dirty), None)

    def take(self, block: Block) -> None:
        """A block comes back or leaves: its parent's child again, if that is there."""
        tenant = block.namespace.tenant
        if tenant is not None:
            tenant.retired_bytes -= block.slot_bytes
            if tenant.clean.pop(block, 0) is None:
                tenant.clean_bytes -= block.slot_bytes
            else:
                del tenant.dirty[block]
        if block in self._clean:
            del self._clean[block]
            self.clean_bytes -= block.slot_bytes
            self.clean_records -= len(block.parts)
        else:
            del self._dirty[block]
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
        """A block came that others waited for as their parent: retired ones are no children, but as deep as if."""
        if not parent.children or not self:
            return
        waiting = {child for child in parent.children if child.retired}
        if waiting:
            parent.children -= waiting
            self._by_parent[parent] = waiting
        deeper = [parent, *descendants(parent)]
        while deeper:
            above = deeper.pop()
            for below in self._by_parent.get(above, ()):
                below.depth = above.depth + 1
                deeper.append(below)

    def part_from(self, parent: Block) -> None:
        """A block leaves the tree: those in the queue below it have no parent any more."""
        children = self._by_parent.pop(parent, None)
        if children:
            for child in children:
                child.parent = None
            parent.namespace.orphans.setdefault(parent.key, set()).update(children)
