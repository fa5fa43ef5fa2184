"""What the store wants done, in order. The executor carries them out and answers with events."""

from __future__ import annotations

import msgspec

from kvstore.core.block import Record
from kvstore.core.namespaces import NamespaceState
from kvstore.protocol.messages import PutStatus, Reason


class Withdraw(msgspec.Struct, frozen=True):
    """Make slots unreadable; answer ``Quiesced`` for each once nobody reads it (at once, or when a transfer ends)."""

    slots: list[int]


class Publish(msgspec.Struct, frozen=True):
    """Make committed records readable without asking. Where there is no place for one, answer ``Displaced``."""

    records: list[Record]


class Replace(msgspec.Struct, frozen=True):
    """Let readers of a published record find a better one of the same block and part in its place.

    The slot of the old one is withdrawn by a later instruction of the same answer.
    """

    slot: int
    record: Record


class EndNamespace(msgspec.Struct, frozen=True):
    """Say that a namespace's generation is over, before its records are withdrawn."""

    namespace_id: int


class Demote(msgspec.Struct, frozen=True):
    """Write resident records below; ``accesses``: when the block of each was last used. Answer ``Demoted``."""

    records: list[Record]
    accesses: list[int]


class Move(msgspec.Struct, frozen=True):
    """Copy a resident record's slot to another one of equal size and let readers find it there.

    The source is withdrawn by a later instruction of the same answer.
    """

    source: int
    target: int
    slot_bytes: int


class Grant(msgspec.Struct, frozen=True):
    """Answer to ``SlotWanted``: the slot is lent to the session."""

    record: Record


class TryAgain(msgspec.Struct, frozen=True):
    """Answer to ``SlotWanted``: carry out what stands before this, then ask again."""


class Refuse(msgspec.Struct, frozen=True):
    """Answer to ``SlotWanted``: no slot, and why."""

    status: PutStatus
    reason: Reason


class Answer(msgspec.Struct, frozen=True):
    """Answer to ``Committed``: one status and reason a record."""

    statuses: list[PutStatus]
    reasons: list[Reason]


class Namespaced(msgspec.Struct, frozen=True):
    """Answer to ``Joined`` and ``InvalidateWanted``. ``stale``: the client's generation is over."""

    namespace: NamespaceState
    stale: bool = False


class Leased(msgspec.Struct, frozen=True):
    """Answer to ``LeaseWanted``; 0: there was nothing to lease, or no room for what leases may hold.

    ``count``: of the blocks, the first ones that are leased.
    """

    lease: int
    count: int = 0


class Count(msgspec.Struct, frozen=True):
    """Answer to ``RemoveWanted``, ``ClearWanted`` and ``LeaseReleased``: how many blocks or leases."""

    count: int


class Retained(msgspec.Struct, frozen=True):
    """Answer to ``RetainWanted``: how many of the blocks are in DRAM and retained, and how many will be when back."""

    count: int
    waiting: int


Instruction = (
    Withdraw
    | Publish
    | Replace
    | EndNamespace
    | Move
    | Demote
    | Grant
    | TryAgain
    | Refuse
    | Answer
    | Namespaced
    | Leased
    | Retained
    | Count
)
