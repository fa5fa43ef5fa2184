"""A prefix tree of blocks without records, as an eviction policy sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.policy.base import EvictionPolicy


@dataclass(eq=False)
class FakeBlock:
    """What ``Evictable`` asks for, and a name."""

    name: int
    parent_name: int | None
    depth: int = 0
    slot_bytes: int = 4096
    leases: int = 0
    access: int = -1
    parent: FakeBlock | None = None
    children: set[FakeBlock] | None = None

    @property
    def key(self) -> bytes:
        return self.name.to_bytes(32, "little")

    def __repr__(self) -> str:
        return f"<block {self.name} depth {self.depth} access {self.access} leases {self.leases}>"

    def ancestors(self) -> Iterator[FakeBlock]:
        above = self.parent
        while above is not None:
            yield above
            above = above.parent

    def descendants(self) -> Iterator[FakeBlock]:
        for child in self.children or ():
            yield child
            yield from child.descendants()


@dataclass
class PrefixTree:
    """Links blocks as the store does, and tells a policy what it would be told. Children may come before parents."""

    policy: EvictionPolicy
    blocks: dict[int, FakeBlock] = field(default_factory=dict)
    orphans: dict[int, set[FakeBlock]] = field(default_factory=dict)

    def insert(self, name: int, parent_name: int | None, access: int, slot_bytes: int = 4096) -> FakeBlock:
        block = self.blocks[name] = FakeBlock(name, parent_name, slot_bytes=slot_bytes)
        parent = None if parent_name is None else self.blocks.get(parent_name)
        if parent is not None:
            self._link(block, parent)
        elif parent_name is not None:
            self.orphans.setdefault(parent_name, set()).add(block)
        for orphan in self.orphans.pop(name, ()):
            self._link(orphan, block)
        self.policy.insert(block, access)
        return block

    def remove(self, block: FakeBlock, *, evicted: bool = False) -> None:
        self.policy.discard(block, evicted=evicted)
        del self.blocks[block.name]
        if block.parent is not None:
            assert block.parent.children is not None
            block.parent.children.discard(block)
            block.parent = None
        elif block.parent_name is not None:
            self.orphans[block.parent_name].discard(block)
        for child in block.children or ():
            child.parent = None
            self.orphans.setdefault(block.name, set()).add(child)
        block.children = None

    def release(self, block: FakeBlock) -> None:
        block.leases -= 1
        if not block.leases:
            self.policy.released(block)

    def resize(self, block: FakeBlock, slot_bytes: int) -> None:
        before_bytes, block.slot_bytes = block.slot_bytes, slot_bytes
        self.policy.resized(block, before_bytes)

    def chain(self, length: int, access: int, *, first: int = 0, parent: int | None = None) -> list[FakeBlock]:
        """A chain of new blocks, named from ``first`` on."""
        chain = []
        for name in range(first, first + length):
            chain.append(self.insert(name, parent, access))
            parent = name
        return chain

    def evict_all(self) -> list[FakeBlock]:
        """Evict until the policy has no victim; the victims."""
        victims = []
        while (victim := self.policy.next_victim()) is not None:
            assert isinstance(victim, FakeBlock)
            self.remove(victim, evicted=True)
            victims.append(victim)
        return victims

    def evictable(self) -> list[FakeBlock]:
        """Leaves without leases."""
        return [block for block in self.blocks.values() if not block.children and not block.leases]

    def _link(self, block: FakeBlock, parent: FakeBlock) -> None:
        if parent.children is None:
            parent.children = set()
        parent.children.add(block)
        block.parent = parent
        block.depth = parent.depth + 1
        for below in block.descendants():
            assert below.parent is not None
            below.depth = below.parent.depth + 1
