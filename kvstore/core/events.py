"""What can happen to the store. Events carry batches; times come with ``Store.handle``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstore.core.block import Block
from kvstore.core.ssd_record import SsdBlock, SsdRecord
from kvstore.policy.admission import Admission
from kvstore.policy.base import EvictionPolicy
from kvstore.protocol.namespace import Namespace


class SlabPopulated(msgspec.Struct, frozen=True):
    """A slab's memory is there; slots may be cut from it."""

    index: int


class PopulationEnded(msgspec.Struct, frozen=True):
    """No more slabs will come: all are there, or the memory is full."""


class SessionOpened(msgspec.Struct, frozen=True):
    """A client greeted."""

    session: int


class SessionClosed(msgspec.Struct, frozen=True):
    """A client said goodbye, died or expired: its leases end, its grants go to limbo."""

    session: int


class LeasesEnded(msgspec.Struct, frozen=True):
    """A client is going: its leases end. Its grants are its own until nobody can write into them any more."""

    session: int


class Joined(msgspec.Struct, frozen=True):
    """A client joins a namespace; ``generation`` is -1 for the current one, or the one it was in before.

    ``record_bytes``: sizes of records the client is going to write, for exact slots. ``session``: the client's, 0 for
    none; as long as it is open the namespace is not forgotten.
    """

    description: Namespace
    record_bytes: tuple[int, ...] = ()
    generation: int = -1
    session: int = 0


class SlotWanted(msgspec.Struct, frozen=True):
    """A session wants a slot to write a record of ``record_bytes`` into.

    Attributes:
        session, record_bytes: whose record, and how large.
        ahead: it would be for later; refuse it rather than make room for it.
        access: the engine request, as in ``Committed``: nothing that it used leaves for it.
        namespace_id, parent_key: the block before it, which must not leave for it either; one that nobody can reach
            makes no room. An empty key: the client does not say, and where it names no request either all may leave.
        slot_bytes: the slot's size, 0 for the one that records of that length get.
    """

    session: int
    record_bytes: int
    ahead: bool = False
    access: int = 0
    namespace_id: int = 0
    parent_key: bytes = b""
    slot_bytes: int = 0


class CommittedRecord(msgspec.Struct, frozen=True):
    """A granted slot that was written, and what its header says; ``fidelity`` is the effective one."""

    slot: int
    key: bytes
    parent_key: bytes
    namespace_digest: bytes
    part: int
    record_bytes: int
    checksum: int
    fidelity: int
    codec: int = 1


class Committed(msgspec.Struct, frozen=True):
    """A session wrote granted slots.

    ``access`` is the engine request, 0 for one of their own: of all records together, or where they are ``separate``
    of each. ``promoted``: they are wanted here at this moment, whether or not their chain leads to them. ``used``:
    nobody uses them at this moment; number of the access that did last, 0: this one.
    """

    session: int
    namespace_id: int
    records: tuple[CommittedRecord, ...]
    access: int = 0
    separate: bool = False
    promoted: bool = False
    used: int = 0


class GrantsReturned(msgspec.Struct, frozen=True):
    """A session gives granted slots back unwritten."""

    session: int
    slots: tuple[int, ...]


class Accessed(msgspec.Struct, frozen=True):
    """An access report: what an engine request asked for and got.

    Attributes:
        session, access: who asked, for which engine request (0: a request of its own).
        runs: the hits as runs of parents and children: each run's deepest block and its length.
        asked: how many keys were asked for.
        missing: the first keys that were not there, bounded by the sender; the rest is only counted.
        namespace_id: where it was asked.
        missed: how many keys were not there, -1 where ``missing`` names all of them.
        matched: the keys are a chain, of which only leading blocks are of use.
        refused: so many of the missing keys, the first ones, are below and were not worth loading.
    """

    session: int
    access: int
    runs: list[tuple[Block, int]] | list[tuple[Block | SsdBlock, int]]
    asked: int
    missing: tuple[bytes, ...] = ()
    namespace_id: int = 0
    missed: int = -1
    matched: bool = False
    refused: int = 0


class LeaseWanted(msgspec.Struct, frozen=True):
    """A session wants blocks (a chain's leading run) to stay until released or expired."""

    session: int
    blocks: Sequence[Block | SsdBlock]
    duration_ns: int


class LeaseReleased(msgspec.Struct, frozen=True):
    """A session gives a lease back."""

    session: int
    lease: int


class RemoveWanted(msgspec.Struct, frozen=True):
    """A client removes blocks by key."""

    namespace_id: int
    keys: tuple[bytes, ...] | list[bytes]


class ClearWanted(msgspec.Struct, frozen=True):
    """A client removes all blocks of a namespace."""

    namespace_id: int


class InvalidateWanted(msgspec.Struct, frozen=True):
    """What a client in a generation of a namespace computes from now on differs from before; it joins the next one."""

    namespace_id: int
    session: int = 0


class Displaced(msgspec.Struct, frozen=True):
    """There is no place in the index for a record's slot unless one of the other slots' records leaves."""

    slot: int
    others: list[int]


class FoundCorrupt(msgspec.Struct, frozen=True):
    """A resident record's bytes are not what was committed."""

    slot: int
    why: str


class Quiesced(msgspec.Struct, frozen=True):
    """Nobody reads these withdrawn slots any more."""

    slots: tuple[int, ...] | list[int]


class Demoted(msgspec.Struct, frozen=True):
    """Records became readable on the SSD; those of blocks that were given up will not, and their blocks may leave."""

    records: list[SsdRecord]
    given_up: list[Block] = []


class SsdChanged(msgspec.Struct, frozen=True):
    """The SSD can be written from now on, or cannot any more."""

    writable: bool


class PersistWanted(msgspec.Struct, frozen=True):
    """Blocks, and their ancestors in DRAM, are to be written below although they stay."""

    namespace_id: int
    keys: list[bytes]


class PolicyChanged(msgspec.Struct, frozen=True):
    """Another policy, which holds nothing yet, chooses from now on what leaves; ``ssd``: the SSD, else DRAM."""

    policy: EvictionPolicy
    ssd: bool = False


class AdmissionChanged(msgspec.Struct, frozen=True):
    """Another admission policy decides from now on what is written below."""

    admission: Admission


class RetainWanted(msgspec.Struct, frozen=True):
    """A client wants blocks to leave later than others, or earlier.

    Attributes:
        namespace_id, keys: of the blocks.
        priority: 0 to 100, see ``kvstore.core.retention``.
        ttl_ns: for how long, 0 for no end.
        drop: the blocks are removed then.
    """

    namespace_id: int
    keys: Sequence[bytes]
    priority: int
    ttl_ns: int = 0
    drop: bool = False


class Hinted(msgspec.Struct, frozen=True):
    """A client says of a chain that it is needed soon, which counts for ``ttl_ns``, or that its session is over."""

    namespace_id: int
    keys: Sequence[bytes]
    soon: bool
    ttl_ns: int = 0


class Ticked(msgspec.Struct, frozen=True):
    """Time passed; leases may have expired."""


Event = (
    SlabPopulated
    | PopulationEnded
    | SessionOpened
    | SessionClosed
    | LeasesEnded
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
    | Displaced
    | FoundCorrupt
    | Quiesced
    | RetainWanted
    | Hinted
    | Ticked
    | Demoted
    | SsdChanged
    | PersistWanted
    | PolicyChanged
    | AdmissionChanged
)
