"""Namespaces in one incarnation: ids, generations, and the prefix tree of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from kvstore.core.block import Block
from kvstore.core.ssd_record import SsdBlock, SsdNamespace
from kvstore.core.tree import ORPHAN_DEPTH, PrefixTree
from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace, namespace_digest

if TYPE_CHECKING:
    from kvstore.core.retention import Retained
    from kvstore.core.tenants import Tenant

MAX_NAMESPACE_ID: Final = (1 << 16) - 1

MOST_IDLE: Final = 64
"""Namespaces that are remembered although they have neither blocks nor members, the latest ones. Each is about 1 KiB;
one that was forgotten and is joined again costs another id."""

MOST_RESTORED: Final = MAX_NAMESPACE_ID // 2
"""Namespaces that are taken over from the SSD, so that ids are left for others."""


class NamespaceState(PrefixTree[Block]):
    """One generation of a namespace: its blocks in DRAM by key, linked into a tree, and what the SSD holds of it.

    Attributes:
        canonical: its description, as a key.
        current: False once the namespace was invalidated; it then holds no blocks for ever.
        members: sessions that joined it and are open.
        codecs: ids of the codecs that its records may be of.
        exact: only records of effective fidelity 255 may be in it.
        lossy_records: resident records whose effective fidelity is below 255.
        ssd: its blocks on the SSD, None where there never were any.
        tenant: whose quota its blocks in DRAM count for, None where nobody's.
        retained: retentions by key.
        ended: grows whenever something of it is removed while the SSD knows nothing of it; see ``SsdNamespace``.
    """

    __slots__ = (
        "canonical",
        "codecs",
        "current",
        "description",
        "digest",
        "ended",
        "exact",
        "generation",
        "id",
        "lossy_records",
        "members",
        "parts",
        "retained",
        "salt",
        "slot_bytes",
        "ssd",
        "tenant",
    )

    def __init__(
        self,
        identity: int,
        description: Namespace,
        generation: int,
        canonical: bytes,
        tenant: Tenant | None = None,
    ) -> None:
        super().__init__()
        self.id = identity
        self.canonical = canonical
        self.salt = hash(canonical)
        self.description = description
        self.generation = generation
        self.digest = namespace_digest(canonical, generation)
        self.parts = description.parts
        self.codecs = frozenset(map(int, description.codecs))
        self.exact = description.fidelity == "exact"
        self.slot_bytes = 0
        self.lossy_records = 0
        self.members = 0
        self.current = True
        self.ssd: SsdNamespace | None = None
        self.tenant = tenant
        self.retained: dict[bytes, Retained] = {}
        self.ended = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is lost with it: a later generation that is current must be remembered."""
        if self.blocks or self.members or (self.current and self.generation):
            return False
        return self.ssd is None or not (self.ssd.tree.blocks or self.ssd.writing)

    def leading(self, keys: Iterable[bytes]) -> list[Block]:
        """The longest run of blocks from the first key on that are complete in DRAM."""
        found = list(map(self.blocks.get, keys))
        if not all(found):
            del found[found.index(None) :]
        blocks: list[Block] = found  # type: ignore[assignment]
        if self.parts > 1:
            for index, block in enumerate(blocks):
                if not block.complete:
                    return blocks[:index]
        return blocks

    def below(self, key: bytes) -> SsdBlock | None:
        """The block on the SSD where it is complete there, or together with what DRAM has of it."""
        ssd = self.ssd
        found = None if ssd is None else ssd.tree.blocks.get(key)
        if found is None or len(found.parts) == self.parts:
            return found
        block = self.blocks.get(key)
        above = () if block is None else block.parts
        return found if all(part in found.parts or part in above for part in range(self.parts)) else None

    def upward(self, key: bytes) -> Iterator[tuple[bytes, Block | None]]:
        """A block and those before it, last first, while either tier knows them: the key, and the block in DRAM.

        Of a chain its beginning may be in DRAM only and its middle on the SSD only.
        """
        at = key
        while True:
            block = self.blocks.get(at)
            known = block if block is not None or self.ssd is None else self.ssd.tree.blocks.get(at)
            if known is None:
                return
            yield at, block
            at = known.parent_key

    def leading_in_tiers(self, keys: list[bytes]) -> list[Block | SsdBlock]:
        """The longest run of blocks from the first key on that are complete; where in DRAM, that one is meant."""
        found: list[Block | SsdBlock] = []
        found += self.leading(keys)
        if self.ssd is not None and self.ssd.tree.blocks:
            for key in keys[len(found) :]:
                above = self.blocks.get(key)
                block = above if above is not None and above.complete else self.below(key)
                if block is None:
                    break
                found.append(block)
        return found

    def depth_below(self, key: bytes) -> int:
        """Depth of a block on the SSD, that of an orphan's parent where there is none."""
        block = None if self.ssd is None else self.ssd.tree.blocks.get(key)
        return ORPHAN_DEPTH - 1 if block is None else block.depth

    def reaches(self, parent_key: bytes) -> bool:
        """Whether a block behind this parent can be reached from the beginning of its prefix, in DRAM or below."""
        if parent_key == ROOT_KEY:
            return True
        parent = self.blocks.get(parent_key)
        depth = self.depth_below(parent_key) if parent is None else parent.depth
        return depth + 1 < ORPHAN_DEPTH

    def adopt(self, block: Block) -> None:
        """Insert a block; one whose parent is on the SSD is no orphan, and those there that waited for it no more."""
        if self.ssd is None:
            self.insert(block)
            return
        self.insert(block, min(self.depth_below(block.parent_key) + 1, ORPHAN_DEPTH))
        below = self.ssd.tree.blocks
        if block.parent is None and block.parent_key in below:
            below[block.parent_key].branched = True
        if block.key in below and below[block.key].branched:
            block.branched = True
        if block.key in self.ssd.tree.orphans and block.depth < ORPHAN_DEPTH:
            self.ssd.tree.deepen(block.key, block.depth)


class Namespaces:
    """All namespaces of one incarnation. Ids begin at 1 and are never used twice.

    Args:
        tenants: those with a quota in DRAM, by the name of their namespaces.
    """

    def __init__(self, tenants: Mapping[str, Tenant] | None = None) -> None:
        self._tenants = tenants or {}
        self.by_id: dict[int, NamespaceState] = {}
        self._current: dict[bytes, NamespaceState] = {}
        self._idle: dict[int, NamespaceState] = {}
        self._last_id = 0

    def join(self, description: Namespace) -> NamespaceState:
        """The current generation of a namespace, made if it is new.

        Raises:
            InvalidArgument: there are no ids left.
        """
        canonical = description.canonical()
        state = self._current.get(canonical)
        if state is None:
            return self._add(description, 0, canonical)
        # One that was found on the SSD knows only the digest of its tenant's salt.
        state.description = description
        return state

    def restore(self, ssd: SsdNamespace) -> NamespaceState:
        """A namespace of which the SSD holds blocks, in their generation; members come later.

        Raises:
            InvalidArgument: there are no ids left, or its description is none.
        """
        state = self._add(Namespace.from_canonical(ssd.description), ssd.generation, ssd.description)
        state.ssd = ssd
        ssd.state = state.id
        return state

    def advance(self, state: NamespaceState, generation: int) -> NamespaceState:
        """A later generation of a namespace. The caller removes the blocks of the old one.

        Raises:
            InvalidArgument: there are no ids left; nothing has changed.
        """
        successor = self._add(state.description, generation, state.canonical)
        state.current = False
        successor.ssd, state.ssd = state.ssd, None
        return successor

    def current_of(self, state: NamespaceState) -> NamespaceState:
        """The current generation of the namespace that ``state`` is or was."""
        return self._current[state.canonical]

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
                    del self._current[state.canonical]
                    state.current = False
                    forgotten.append(state)
        return forgotten

    def _add(self, description: Namespace, generation: int, canonical: bytes) -> NamespaceState:
        identity = self._last_id + 1
        if identity > MAX_NAMESPACE_ID:
            raise InvalidArgument(
                f"this daemon has given out all {MAX_NAMESPACE_ID} namespace ids (namespaces and invalidations "
                "together); restart it"
            )
        self._last_id = identity
        state = NamespaceState(identity, description, generation, canonical, self._tenants.get(description.name))
        self.by_id[identity] = state
        self._current[canonical] = state
        return state
