"""Leases: blocks that must not be evicted until a client releases them, or a time, or the client's end."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.core.block import Block
from kvstore.core.ssd_record import SsdBlock


@dataclass(slots=True)
class Lease:
    """Blocks held for a session until ``expires_ns``."""

    id: int
    session: int
    blocks: list[Block | SsdBlock]
    expires_ns: int


class Leases:
    """All leases. Every block of a lease is marked: it stays also where one behind it is removed or found corrupt."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._expiry: list[tuple[int, int]] = []
        self._of_session: dict[int, set[int]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._leases)

    def count_of(self, session: int) -> int:
        """Leases that a session holds."""
        return len(self._of_session.get(session, ()))

    def all(self) -> list[Lease]:
        """Every lease, for ``validate_state()``."""
        return list(self._leases.values())

    def take(self, session: int, blocks: Sequence[Block | SsdBlock], expires_ns: int) -> int:
        """Lease blocks; returns the lease's id."""
        for block in blocks:
            block.leases += 1
        lease = Lease(self._next, session, list(blocks), expires_ns)
        self._next += 1
        self._leases[lease.id] = lease
        self._of_session.setdefault(session, set()).add(lease.id)
        heapq.heappush(self._expiry, (expires_ns, lease.id))
        return lease.id

    def end(self, identity: int, session: int) -> list[Block | SsdBlock] | None:
        """End one lease of a session; the blocks that no lease holds any more, or None if there is no such lease."""
        lease = self._leases.get(identity)
        if lease is None or lease.session != session:
            return None
        return self._end(lease)

    def end_session(self, session: int) -> list[Block | SsdBlock]:
        """End all leases of a session; the blocks that no lease holds any more."""
        freed: list[Block | SsdBlock] = []
        for identity in list(self._of_session.get(session, ())):
            freed += self._end(self._leases[identity])
        return freed

    def expire(self, now_ns: int) -> list[Block | SsdBlock]:
        """End all leases whose time is over; the blocks that no lease holds any more."""
        freed: list[Block | SsdBlock] = []
        while self._expiry and self._expiry[0][0] <= now_ns:
            _, identity = heapq.heappop(self._expiry)
            lease = self._leases.get(identity)
            if lease is not None:
                freed += self._end(lease)
        return freed

    def _end(self, lease: Lease) -> list[Block | SsdBlock]:
        del self._leases[lease.id]
        held = self._of_session[lease.session]
        held.discard(lease.id)
        if not held:
            del self._of_session[lease.session]
        if len(self._expiry) > 64 and len(self._expiry) > 4 * len(self._leases):
            self._expiry = [entry for entry in self._expiry if entry[1] in self._leases]
            heapq.heapify(self._expiry)
        freed = []
        for block in lease.blocks:
            block.leases -= 1
            if not block.leases and block.parts:
                freed.append(block)
        return freed
