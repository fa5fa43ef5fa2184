"""A block, its records, and the life of a record as an explicit transition table."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from kvstore.core.journal import UNTOLD
from kvstore.core.tree import TreeBlock

if TYPE_CHECKING:
    from kvstore.core.namespaces import NamespaceState
    from kvstore.core.tenants import Tenant


class RecordState(IntEnum):
    """Where a record is in its life.

    ``GRANTED``: its slot is lent for writing. ``RESIDENT``: published, readable. ``LIMBO``: withdrawn, the slot waits
    until nobody can read it any more. ``FREE``: the slot is the allocator's again; the record is over.
    """

    GRANTED = 1
    RESIDENT = 2
    LIMBO = 3
    FREE = 4


TRANSITIONS: Final = frozenset(
    {
        (RecordState.GRANTED, RecordState.RESIDENT),  # commit
        (RecordState.GRANTED, RecordState.FREE),  # returned, refused, or the key existed: never published
        (RecordState.GRANTED, RecordState.LIMBO),  # its client is gone: it may still be writing
        (RecordState.RESIDENT, RecordState.LIMBO),  # evicted, removed, moved, replaced, or found corrupt
        (RecordState.LIMBO, RecordState.FREE),  # quiesced
    }
)
"""All changes of state that may happen; anything else is a bug and raises ``InvalidTransition``."""


class Record:
    """One part of a block in one slot.

    Attributes:
        slot: first page in the arena.
        slot_bytes, record_bytes: size of the slot, and of header and sections in it.
        codec: id of the numerics of its sections.
        fidelity: its effective fidelity, 255 for exact.
        tenant: for whose quota it counts while it is granted, None where that is nobody's or not known.
        session: who writes it while it is granted, 0 afterwards.
    """

    __slots__ = (
        "block",
        "checksum",
        "codec",
        "fidelity",
        "part",
        "record_bytes",
        "session",
        "slot",
        "slot_bytes",
        "state",
        "tenant",
    )

    def __init__(self, slot: int, slot_bytes: int, session: int) -> None:
        self.slot = slot
        self.slot_bytes = slot_bytes
        self.session = session
        self.state = RecordState.GRANTED
        self.block: Block | None = None
        self.part = 0
        self.record_bytes = 0
        self.checksum = 0
        self.codec = 0
        self.fidelity = 0
        self.tenant: Tenant | None = None


class Block(TreeBlock):
    """A block with at least one resident record.

    Attributes:
        born, turn: see ``kvstore.policy.admission.Admissible``.
        told: the journal's: its place among the blocks that were told of.
        retired: it was chosen to leave, and left the policy; it can be read until its room is needed. No block that is
            not retired has a retired ancestor, and retired blocks are not their parents' children. Of one that is gone:
            it left before its copy below was durable.
    """

    __slots__ = ("born", "namespace", "parts", "retired", "slot_bytes", "told", "turn")

    def __init__(self, namespace: NamespaceState, key: bytes, parent_key: bytes) -> None:
        # As ``TreeBlock`` does; each put makes one, and a call of that costs a fiftieth of it.
        self.key = key
        self.parent_key = parent_key
        self.parent: Block | None = None
        self.children: set[Block] | None = None
        self.depth = 0
        self.leases = 0
        self.held = 0
        self.access = -1
        self.branched = False
        self.namespace = namespace
        self.parts: dict[int, Record] = {}
        self.slot_bytes = 0
        self.told = UNTOLD
        self.retired = False
        self.born = 0
        self.turn = 1

    @property
    def complete(self) -> bool:
        """Whether every part of the namespace is there."""
        return len(self.parts) == self.namespace.parts


def runs_of(blocks: list[Block]) -> list[tuple[Block, int]]:
    """Blocks in the order of a chain, as runs of parents and children: each run's deepest block and its length."""
    if not blocks:
        return []
    count = len(blocks)
    # The usual case, one chain, at the speed of C.
    if [block.parent for block in blocks[1:]] == blocks[:-1]:
        return [(blocks[-1], count)]
    runs: list[tuple[Block, int]] = []
    length = 0
    for index, block in enumerate(blocks):
        length += 1
        if index + 1 == count or blocks[index + 1].parent is not block:
            runs.append((block, length))
            length = 0
    return runs
