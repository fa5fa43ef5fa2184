"""What can happen to the store. Events carry batches; times come with ``Store.handle``."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.core.block import Block
from kvstore.protocol.namespace import Namespace


@dataclass(frozen=True, slots=True)
class SlabPopulated:
    """A slab's memory is there; slots may be cut from it."""

    index: int


@dataclass(frozen=True, slots=True)
class PopulationEnded:
    """No more slabs will come: all are there, or the memory is full."""


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A client greeted."""

    session: int


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A client said goodbye, died or expired: its leases end, its grants go to limbo."""

    session: int


@dataclass(frozen=True, slots=True)
class Joined:
    """A client joins a namespace; ``generation`` is -1 for the current one, or the one it was in before.

    ``record_bytes``: sizes of records the client is going to write, for exact slots.
    """

    description: Namespace
    record_bytes: tuple[int, ...] = ()
    generation: int = -1


@dataclass(frozen=True, slots=True)
class SlotWanted:
    """A session wants a slot to write a record of ``record_bytes`` into."""

    session: int
    record_bytes: int


@dataclass(frozen=True, slots=True)
class CommittedRecord:
    """A granted slot that was written, and what its header says."""

    slot: int
    key: bytes
    parent_key: bytes
    namespace_digest: bytes
    part: int
    record_bytes: int
    checksum: int
    fidelity: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A session wrote granted slots. ``access``: the engine request, 0 for none."""

    session: int
    namespace_id: int
    records: tuple[CommittedRecord, ...]
    access: int = 0


@dataclass(frozen=True, slots=True)
class GrantsReturned:
    """A session gives granted slots back unwritten."""

    session: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Accessed:
    """An access report: what an engine request asked for and got.

    Attributes:
        session, access: who asked, for which engine request (0: a request of its own).
        blocks: the blocks that were hit, parents before children.
        asked: how many keys were asked for.
        missing: the first keys that were not there, bounded by the sender; the rest is only counted.
    """

    session: int
    access: int
    blocks: tuple[Block, ...] | list[Block]
    asked: int
    missing: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class LeaseWanted:
    """A session wants blocks (a chain's leading run) to stay until released or expired."""

    session: int
    blocks: tuple[Block, ...] | list[Block]
    duration_ns: int


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """A session gives a lease back."""

    session: int
    lease: int


@dataclass(frozen=True, slots=True)
class RemoveWanted:
    """A client removes blocks by key."""

    namespace_id: int
    keys: tuple[bytes, ...] | list[bytes]


@dataclass(frozen=True, slots=True)
class ClearWanted:
    """A client removes all blocks of a namespace."""

    namespace_id: int


@dataclass(frozen=True, slots=True)
class InvalidateWanted:
    """What a client in ``generation`` of a namespace computes from now on differs from before."""

    namespace_id: int


@dataclass(frozen=True, slots=True)
class FoundCorrupt:
    """A resident record's bytes are not what was committed."""

    slot: int
    why: str


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Nobody reads these withdrawn slots any more."""

    slots: tuple[int, ...] | list[int]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed; leases may have expired."""


Event = (
    SlabPopulated
    | PopulationEnded
    | SessionOpened
    | SessionClosed
    | Joined
    | SlotWanted
    | Committed
    | GrantsReturned
    | Accessed
    | LeaseWanted
    | LeaseReleased
    | RemoveWanted
    | ClearWanted
    | InvalidateWanted
    | FoundCorrupt
    | Quiesced
    | Ticked
)
