"""What the store must hold, as plain dicts: every rule written the obvious, slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fakes.retention_model import NORMAL, Kept

from kvstore.core.events import CommittedRecord
from kvstore.core.tree import ORPHAN_DEPTH
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason

Identity = tuple[int, bytes, int, int]
"""Content of a slot: namespace id, key, part, and a number of its own."""


@dataclass(eq=False)
class ModelBlock:
    """A block; ``number`` is the last engine request that used it or a child that left."""

    key: bytes
    parent_key: bytes
    number: int
    parts: dict[int, Identity] = field(default_factory=dict)
    fidelities: dict[int, int] = field(default_factory=dict)
    depth: int = 0
    leases: int = 0
    tenant: str | None = None
    space: str = ""
    kept: Kept | None = None
    parent: ModelBlock | None = None
    children: list[ModelBlock] = field(default_factory=list)

    def descendants(self) -> Iterator[ModelBlock]:
        for child in self.children:
            yield child
            yield from child.descendants()

    @property
    def is_retained(self) -> bool:
        return self.kept is not None and self.kept.priority > NORMAL

    @property
    def rank(self) -> tuple[int, int, int, int]:
        assert self.kept is not None
        return self.kept.rank

    @property
    def due(self) -> tuple[int, int]:
        assert self.kept is not None
        return self.kept.due

    @property
    def is_held(self) -> bool:
        return bool(self.leases) or any(child.is_held for child in self.children)

    def __repr__(self) -> str:
        return f"<{self.key.hex()[:4]} of {self.number} at {self.depth}, {self.leases} leases>"


@dataclass(eq=False)
class ModelNamespace:
    """A generation of a namespace."""

    id: int
    parts: int
    digest: bytes
    generation: int
    codecs: frozenset[int] = frozenset({1})
    exact: bool = False
    tenant: str | None = None
    name: str = ""
    current: bool = True
    blocks: dict[bytes, ModelBlock] = field(default_factory=dict)

    def leading(self, keys: Sequence[bytes]) -> list[ModelBlock]:
        found = []
        for key in keys:
            block = self.blocks.get(key)
            if block is None or len(block.parts) < self.parts:
                break
            found.append(block)
        return found

    def closes_circle(self, key: bytes, parent_key: bytes) -> bool:
        while parent_key != key:
            above = self.blocks.get(parent_key)
            if above is None:
                return False
            parent_key = above.parent_key
        return True


@dataclass(eq=False)
class ModelLease:
    """Blocks that must stay."""

    session: int
    blocks: list[ModelBlock]
    expires_ns: int


@dataclass
class StoreModel:
    """Blocks by namespace, grants by session, leases; what it does not know is what the store will evict."""

    namespaces: dict[int, ModelNamespace] = field(default_factory=dict)
    grants: dict[int, dict[int, int]] = field(default_factory=dict)
    leases: dict[int, ModelLease] = field(default_factory=dict)
    slots: dict[int, tuple[int, ModelBlock, int]] = field(default_factory=dict)
    replaced: dict[int, tuple[int, Identity, int]] = field(default_factory=dict)
    """By the slot of each record of the last commit that took another one's place: slot, content, fidelity of that."""
    _fresh: set[int] = field(default_factory=set)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    _newest: int = 0

    # ------------------------------------------------------------ the tree

    def blocks(self) -> list[tuple[int, ModelBlock]]:
        return [(space.id, block) for space in self.namespaces.values() for block in space.blocks.values()]

    def insert(self, space: ModelNamespace, key: bytes, parent_key: bytes, number: int) -> ModelBlock:
        block = space.blocks[key] = ModelBlock(key, parent_key, number, tenant=space.tenant, space=space.name)
        parent = None if parent_key == ROOT_KEY else space.blocks.get(parent_key)
        if parent is not None:
            self._link(block, parent)
        elif parent_key != ROOT_KEY:
            block.depth = ORPHAN_DEPTH
        for child in space.blocks.values():
            if child.parent_key == key and child is not block:
                self._link(child, block)
        if block.depth < ORPHAN_DEPTH:
            for below in block.descendants():
                below.number = max(below.number, number)
        return block

    def _link(self, block: ModelBlock, parent: ModelBlock) -> None:
        block.parent = parent
        parent.children.append(block)
        block.depth = parent.depth + 1
        for below in block.descendants():
            assert below.parent is not None
            below.depth = below.parent.depth + 1

    def leave(self, namespace_id: int, block: ModelBlock) -> None:
        """Take a block out: its uses count for its parent, its children stay where they are."""
        del self.namespaces[namespace_id].blocks[block.key]
        if block.parent is not None:
            block.parent.number = max(block.parent.number, block.number)
            block.parent.children.remove(block)
        for child in block.children:
            child.parent = None
        block.parent, block.children, block.parts, block.fidelities, block.kept = None, [], {}, {}, None
        self.slots = {slot: held for slot, held in self.slots.items() if held[1] is not block}

    def victims(self, before: int | None = None, tenant: str | None = None) -> list[ModelBlock]:
        """Blocks of which one must be evicted next: leaves without leases.

        Those of low priority first, then the oldest, of these the deepest, and only then those that are retained.

        Args:
            before: for a block of this access, for which nothing of it or of a later one leaves.
            tenant: only of this one.
        """
        leaves = [
            block
            for _, block in self.blocks()
            if not block.children
            and not block.leases
            and (before is None or block.number < before)
            and (tenant is None or block.tenant == tenant)
        ]
        low = [block for block in leaves if block.kept is not None and block.kept.priority < NORMAL]
        plain = [block for block in leaves if not block.is_retained]
        if low or not plain:
            least = min((block.rank[:2] for block in low or leaves), default=None)
            return [block for block in low or leaves if block.rank[:2] == least]
        oldest = min(block.number for block in plain)
        # Each tenant's policy offers its deepest block of the oldest request.
        deepest: dict[str | None, int] = {}
        for block in plain:
            if block.number == oldest:
                deepest[block.tenant] = max(deepest.get(block.tenant, 0), block.depth)
        return [block for block in plain if block.number == oldest and block.depth == deepest[block.tenant]]

    def bytes_of(self, slot_bytes: dict[int, int]) -> dict[ModelBlock, int]:
        """Slots of all blocks."""
        sizes = dict.fromkeys((block for _, block in self.blocks()), 0)
        for slot, (_, block, _) in self.slots.items():
            sizes[block] += slot_bytes[slot]
        return sizes

    def is_orphan(self, block: ModelBlock) -> bool:
        """Whether a block is there that nobody can reach, and may leave."""
        marked = block.leases or block.is_retained
        return bool(block.parts) and block.depth >= ORPHAN_DEPTH and not block.children and not marked

    def reaches(self, namespace_id: int, parent_key: bytes) -> bool:
        """Whether a block behind this parent can be reached."""
        parent = self.namespaces[namespace_id].blocks.get(parent_key)
        return parent_key == ROOT_KEY or (parent is not None and parent.depth < ORPHAN_DEPTH)

    def unreached(self, blocks: Sequence[ModelBlock]) -> list[ModelBlock]:
        """Those of these blocks that are there and that nobody can reach."""
        return [block for block in blocks if block.parts and block.depth >= ORPHAN_DEPTH]

    def begin_commit(self) -> None:
        self.replaced.clear()
        self._fresh.clear()

    def take_back(self, slot: int) -> None:
        """A record of the last commit does not stay; what it had replaced, if anything, is there again."""
        namespace_id, block, part = self.slots.pop(slot)
        del block.parts[part], block.fidelities[part]
        before = self.replaced.pop(slot, None)
        if before is not None:
            self.slots[before[0]] = (namespace_id, block, part)
            block.parts[part], block.fidelities[part] = before[1:]
        elif not block.parts:
            self.leave(namespace_id, block)

    # ------------------------------------------------------------ requests

    def access_number(self, session: int, access: int) -> int:
        if not access:
            self._newest += 1
            return self._newest
        if (session, access) not in self._numbers:
            self._newest += 1
            self._numbers[session, access] = self._newest
        return self._numbers[session, access]

    def wanted(self, session: int, access: int, namespace_id: int, parent_key: bytes) -> int | None:
        """Number of the access that a slot is wanted for, None where nobody says; the block before it is used."""
        if not access and not parent_key:
            return None
        number = self.access_number(session, access)
        if parent_key in (b"", ROOT_KEY):
            return number
        space = self.namespaces.get(namespace_id)
        parent = None if space is None else space.blocks.get(parent_key)
        if parent is None or parent.depth >= ORPHAN_DEPTH:
            return 0
        parent.number = max(parent.number, number)
        return number

    def put_again(self, blocks: Sequence[ModelBlock], number: int) -> None:
        """Blocks that were there were put again; that makes nothing of one that nobody can reach."""
        for block in blocks:
            if block.depth < ORPHAN_DEPTH:
                block.number = max(block.number, number)

    def used(self, blocks: Sequence[ModelBlock], number: int) -> None:
        """Blocks were read, in this order: each run of parents and children is one use of its deepest block."""
        for index, block in enumerate(blocks):
            if index + 1 == len(blocks) or blocks[index + 1].parent is not block:
                block.number = max(block.number, number)

    def place(
        self,
        namespace_id: int,
        record: CommittedRecord,
        slot_bytes: int,
        number: int,
        content: Identity,
        make_way: Callable[[], tuple[PutStatus, Reason] | None],
        grow: Callable[[ModelBlock], tuple[PutStatus, Reason] | None],
    ) -> tuple[PutStatus, Reason, ModelBlock | None]:
        """What a commit of a granted slot does.

        ``make_way`` and ``grow``: what leaves before a new block comes, or one gets another record; why it may not.
        """
        space = self.namespaces.get(namespace_id)
        if space is None or not space.current:
            return PutStatus.REJECTED, Reason.STALE_NAMESPACE, None
        if record.namespace_digest != space.digest or record.record_bytes > slot_bytes:
            return PutStatus.REJECTED, Reason.BAD_RECORD, None
        if record.part >= space.parts:
            return PutStatus.REJECTED, Reason.BAD_PART, None
        if record.codec not in space.codecs:
            return PutStatus.REJECTED, Reason.OTHER_CODEC, None
        if space.exact and record.fidelity < 255:
            return PutStatus.REJECTED, Reason.NOT_EXACT, None
        block = space.blocks.get(record.key)
        if block is None:
            if space.closes_circle(record.key, record.parent_key):
                return PutStatus.REJECTED, Reason.BAD_PARENT, None
            refusal = make_way()
            if refusal is not None:
                return *refusal, None
            block = self.insert(space, record.key, record.parent_key, number)
        elif block.fidelities.get(record.part, -1) >= record.fidelity:
            return PutStatus.EXISTS, Reason.NONE, block
        elif block.parent_key != record.parent_key:
            return PutStatus.REJECTED, Reason.BAD_PARENT, block
        else:
            refusal = grow(block)
            if refusal is not None:
                return *refusal, block
        if record.part in block.parts:
            (slot,) = [slot for slot, held in self.slots.items() if held[1:] == (block, record.part)]
            before = (slot, block.parts[record.part], block.fidelities[record.part])
            del self.slots[slot]
            # One that came with the same commit was never there; what it had replaced was.
            if slot not in self._fresh:
                self.replaced[record.slot] = before
            elif slot in self.replaced:
                self.replaced[record.slot] = self.replaced.pop(slot)
        self._fresh.add(record.slot)
        block.parts[record.part] = content
        block.fidelities[record.part] = record.fidelity
        self.slots[record.slot] = (namespace_id, block, record.part)
        return PutStatus.STORED, Reason.NONE, block

    def lease(self, identity: int, session: int, blocks: list[ModelBlock], expires_ns: int) -> None:
        """Blocks are leased, each once, and with them those before them."""
        assert identity not in self.leases
        held: list[ModelBlock] = []
        for block in blocks:
            above: ModelBlock | None = block
            while above is not None and above not in held:
                held.append(above)
                above = above.parent
        self.leases[identity] = ModelLease(session, held, expires_ns)
        for block in held:
            block.leases += 1

    def end_lease(self, identity: int) -> None:
        for block in self.leases.pop(identity).blocks:
            block.leases -= 1

    def fitting(self, blocks: list[ModelBlock], limit_bytes: int, sizes: dict[ModelBlock, int]) -> int:
        """How many of a chain's leading blocks leases may hold, with those before them."""
        held = {block for _, block in self.blocks() if block.is_held}
        for count, block in enumerate(blocks):
            above: ModelBlock | None = block
            while above is not None:
                held.add(above)
                above = above.parent
            if sum(map(sizes.__getitem__, held)) > limit_bytes:
                return count
        return len(blocks)

    def remove(self, namespace_id: int, keys: Sequence[bytes]) -> int:
        """Remove blocks; what was below them and stays is condemned, and not retained any more."""
        space = self.namespaces[namespace_id]
        condemned: set[ModelBlock] = set()
        removed = 0
        for key in keys:
            block = space.blocks.get(key)
            if block is not None:
                condemned.update(block.descendants())
                self.leave(namespace_id, block)
                removed += 1
        for block in condemned:
            if space.blocks.get(block.key) is block:
                block.number = 0
                block.kept = None
        return removed
