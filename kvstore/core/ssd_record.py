"""A record on the SSD, its block and namespace, and its life as an explicit transition table."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from kvstore.core.tree import PrefixTree, TreeBlock
from kvstore.protocol.namespace import Namespace, namespace_digest

if TYPE_CHECKING:
    from kvstore.core.tenants import Tenant


class SsdState(IntEnum):
    """Where a record on the SSD is in its life.

    ``WRITING``: its slot is taken, its bytes or its log entry are not durable yet; nobody reads it. ``STORED``:
    durable, readable. ``LEAVING``: over, but its slot is not used again before the log says so durably, and nobody
    reads or writes it any more. ``FREE``: the slot is the allocator's again.
    """

    WRITING = 1
    STORED = 2
    LEAVING = 3
    FREE = 4


SSD_TRANSITIONS: Final = frozenset(
    {
        (SsdState.WRITING, SsdState.STORED),  # its group is in the log
        (SsdState.WRITING, SsdState.LEAVING),  # removed meanwhile, or its write or group failed
        (SsdState.STORED, SsdState.LEAVING),  # evicted, removed, replaced, or found corrupt
        (SsdState.LEAVING, SsdState.FREE),  # its end is in the log, or it was never in the log
    }
)
"""All changes of state that may happen; anything else is a bug and raises ``InvalidTransition``."""


class SsdRecord:
    """One part of a block in one slot of the slab file.

    Attributes:
        slot, slot_bytes: first page in the slab file, and size.
        home_bytes: size of the slot that it gets in memory.
        depth, access: of its block, when its slot was taken.
        logged: the log may have a put of it, so its end must be logged too.
        busy: transfers that read or write it now.
    """

    __slots__ = (
        "access",
        "busy",
        "checksum",
        "codec",
        "depth",
        "fidelity",
        "home_bytes",
        "key",
        "logged",
        "namespace",
        "parent_key",
        "part",
        "record_bytes",
        "slot",
        "slot_bytes",
        "state",
        "token_count",
    )

    def __init__(self, namespace: SsdNamespace, key: bytes, parent_key: bytes, part: int) -> None:
        self.namespace = namespace
        self.key = key
        self.parent_key = parent_key
        self.part = part
        self.slot = 0
        self.slot_bytes = 0
        self.home_bytes = 0
        self.record_bytes = 0
        self.checksum = 0
        self.codec = 0
        self.fidelity = 0
        self.token_count = 0
        self.depth = 0
        self.access = 0
        self.state = SsdState.WRITING
        self.logged = False
        self.busy = 0


class SsdBlock(TreeBlock):
    """A block with at least one stored record on the SSD; ``used``: the access number of its last use."""

    __slots__ = ("namespace", "parts", "slot_bytes", "used")

    def __init__(self, namespace: SsdNamespace, key: bytes, parent_key: bytes) -> None:
        super().__init__(key, parent_key)
        self.namespace = namespace
        self.parts: dict[int, SsdRecord] = {}
        self.slot_bytes = 0
        self.used = 0


class SsdNamespace:
    """What the SSD holds of the current generation of a namespace.

    Attributes:
        number: its number in the log.
        block_tokens: tokens a block, 0 where that is unknown.
        state: id of the namespace's current generation in this incarnation.
        description: canonical.
        digest: of this generation; what records must carry.
        salt: as of ``NamespaceState``.
        tree: blocks with stored records.
        writing: records on their way, by key and part.
        tenant: whose quota on the SSD its records count for, None where nobody's.
        ended: grows whenever something of it is removed.
        told: the log knows its number and generation, or will with the next group.
        logged_generation: the generation that the log has durably, -1 for none.
    """

    __slots__ = (
        "block_tokens",
        "description",
        "digest",
        "ended",
        "generation",
        "logged_generation",
        "number",
        "salt",
        "slot_bytes",
        "state",
        "tenant",
        "told",
        "tree",
        "writing",
    )

    def __init__(
        self, number: int, description: bytes, generation: int, tenants: Mapping[str, Tenant] | None = None
    ) -> None:
        self.number = number
        self.description = description
        self.salt = hash(description)
        described = Namespace.from_canonical(description)
        self.block_tokens = described.block_tokens
        self.tenant = (tenants or {}).get(described.name)
        self.state = 0
        self.ended = 0
        self.told = False
        self.logged_generation = -1
        self.begin_generation(generation)

    def begin_generation(self, generation: int) -> None:
        """Begin empty; the caller ended all records that there were."""
        self.generation = generation
        self.digest = namespace_digest(self.description, generation)
        self.tree: PrefixTree[SsdBlock] = PrefixTree()
        self.writing: dict[tuple[bytes, int], SsdRecord] = {}
        self.slot_bytes = 0

    def stored(self, key: bytes, part: int) -> SsdRecord | None:
        """The stored record of one part of a block."""
        block = self.tree.blocks.get(key)
        return None if block is None else block.parts.get(part)
