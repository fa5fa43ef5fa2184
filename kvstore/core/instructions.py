"""What the store wants done, in order. The executor carries them out and answers with events."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.core.block import Record
from kvstore.core.namespaces import NamespaceState
from kvstore.protocol.messages import PutStatus, Reason


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Make slots unreadable; answer ``Quiesced`` for each once nobody reads it (at once, or when a transfer ends)."""

    slots: list[int]


@dataclass(frozen=True, slots=True)
class Move:
    """Copy a resident record's slot to another one of equal size; the source is withdrawn by the next instruction."""

    source: int
    target: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Answer to ``SlotWanted``: the slot is lent to the session."""

    record: Record


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Answer to ``SlotWanted``: carry out what stands before this, then ask again."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer to ``SlotWanted``: no slot, and why."""

    status: PutStatus
    reason: Reason


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to ``Committed``: one status and reason a record."""

    statuses: list[PutStatus]
    reasons: list[Reason]


@dataclass(frozen=True, slots=True)
class Namespaced:
    """Answer to ``Joined`` and ``InvalidateWanted``. ``stale``: the client's generation is over."""

    namespace: NamespaceState
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Leased:
    """Answer to ``LeaseWanted``; 0: there was nothing to lease."""

    lease: int


@dataclass(frozen=True, slots=True)
class Count:
    """Answer to ``RemoveWanted``, ``ClearWanted`` and ``LeaseReleased``: how many blocks or leases."""

    count: int


Instruction = Withdraw | Move | Grant | TryAgain | Refuse | Answer | Namespaced | Leased | Count
