"""Namespaces in one incarnation: ids, generations, and the prefix tree of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from kvstore.core.block import Block
from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace

MAX_NAMESPACE_ID: Final = (1 << 16) - 1

MOST_IDLE: Final = 64
"""Namespaces that are remembered although they have neither blocks nor members, the latest ones. Each is about 1 KiB;
one that was forgotten and is joined again costs another id."""

ORPHAN_DEPTH: Final = 1 << 32
"""Depth of a block whose parent is not there: of a request's blocks it leaves first, since nobody can reach it."""


class NamespaceState:
    """One generation of a namespace: its blocks by key, linked into a tree.

    Attributes:
        current: False once the namespace was invalidated; it then holds no blocks for ever.
        members: sessions that joined it and are open.
        codecs: ids of the codecs that its records may be of.
        exact: only records of effective fidelity 255 may be in it.
        lossy_records: resident records whose effective fidelity is below 255.
        orphans: blocks whose parent is not resident, by the parent's key.
    """

    __slots__ = (
        "blocks",
        "codecs",
        "current",
        "description",
        "digest",
        "exact",
        "generation",
        "id",
        "lossy_records",
        "members",
        "orphans",
        "parts",
        "slot_bytes",
    )

    def __init__(self, identity: int, description: Namespace, generation: int) -> None:
        self.id = identity
        self.description = description
        self.generation = generation
        self.digest = description.digest(generation)
        self.parts = description.parts
        self.codecs = frozenset(map(int, description.codecs))
        self.exact = description.fidelity == "exact"
        self.blocks: dict[bytes, Block] = {}
        self.orphans: dict[bytes, set[Block]] = {}
        self.slot_bytes = 0
        self.lossy_records = 0
        self.members = 0
        self.current = True

    @property
    def idle(self) -> bool:
        """Whether nothing is lost with it: a later generation that is current must be remembered."""
        return not self.blocks and not self.members and not (self.current and self.generation)

    def leading(self, keys: Iterable[bytes]) -> list[Block]:
        """The longest run of complete blocks from the first key on."""
        found = list(map(self.blocks.get, keys))
        if not all(found):
            del found[found.index(None) :]
        blocks: list[Block] = found  # type: ignore[assignment]
        if self.parts > 1:
            for index, block in enumerate(blocks):
                if not block.complete:
                    return blocks[:index]
        return blocks

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

    def insert(self, block: Block) -> None:
        """Link a new block to its parent, or note it as an orphan, and adopt the children that waited for it."""
        self.blocks[block.key] = block
        if block.parent_key != ROOT_KEY:
            parent = self.blocks.get(block.parent_key)
            if parent is None:
                block.depth = ORPHAN_DEPTH
                self.orphans.setdefault(block.parent_key, set()).add(block)
            else:
                _link(block, parent)
        for child in self.orphans.pop(block.key, ()):
            _link(child, block)

    def remove(self, block: Block) -> None:
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
            self.orphans[block.key] = block.children
            block.children = None


def _link(block: Block, parent: Block) -> None:
    if parent.children is None:
        parent.children = set()
    parent.children.add(block)
    block.parent = parent
    if block.depth != parent.depth + 1:
        block.depth = parent.depth + 1
        for below in descendants(block):
            assert below.parent is not None
            below.depth = below.parent.depth + 1


def descendants(block: Block) -> Iterator[Block]:
    """All blocks below, parents before their children."""
    stack = list(block.children or ())
    while stack:
        below = stack.pop()
        yield below
        if below.children:
            stack.extend(below.children)


class Namespaces:
    """All namespaces of one incarnation. Ids begin at 1 and are never used twice."""

    def __init__(self) -> None:
        self.by_id: dict[int, NamespaceState] = {}
        self._current: dict[bytes, NamespaceState] = {}
        self._idle: dict[int, NamespaceState] = {}
        self._last_id = 0

    def join(self, description: Namespace) -> NamespaceState:
        """The current generation of a namespace, made if it is new.

        Raises:
            InvalidArgument: there are no ids left.
        """
        state = self._current.get(description.canonical())
        return state if state is not None else self._add(description, 0)

    def advance(self, state: NamespaceState, generation: int) -> NamespaceState:
        """A later generation of a namespace. The caller removes the blocks of the old one.

        Raises:
            InvalidArgument: there are no ids left; nothing has changed.
        """
        successor = self._add(state.description, generation)
        state.current = False
        return successor

    def current_of(self, state: NamespaceState) -> NamespaceState:
        """The current generation of the namespace that ``state`` is or was."""
        return self._current[state.description.canonical()]

    def note_idle(self, state: NamespaceState) -> None:
        """A namespace has no blocks or no members any more; it may be forgotten when there are too many like it."""
        if state.idle:
            self._idle.pop(state.id, None)
            self._idle[state.id] = state

    def forget_idle(self) -> list[NamespaceState]:
        """Forget the namespaces that have been idle for longest, but for so many; those that were current."""
        forgotten: list[NamespaceState] = []
        while len(self._idle) > MOST_IDLE:
            state = self._idle.pop(next(iter(self._idle)))
            if state.idle:
                del self.by_id[state.id]
                if state.current:
                    del self._current[state.description.canonical()]
                    state.current = False
                    forgotten.append(state)
        return forgotten

    def _add(self, description: Namespace, generation: int) -> NamespaceState:
        identity = self._last_id + 1
        if identity > MAX_NAMESPACE_ID:
            raise InvalidArgument(
                f"this daemon has given out all {MAX_NAMESPACE_ID} namespace ids (namespaces and invalidations "
                "together); restart it"
            )
        self._last_id = identity
        state = NamespaceState(identity, description, generation)
        self.by_id[identity] = state
        self._current[description.canonical()] = state
        return state
