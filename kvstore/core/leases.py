"""Leases: blocks that must not be evicted until a client releases them, or a time, or the client's end.

Together they may hold a part of each tier only, so that there is always something that can leave. What counts is all
that cannot leave for them: the blocks of leases, those before them (a lease takes them in), and blocks that come as
parents of leased ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.core.block import Block
from kvstore.core.ssd_record import SsdBlock

Leasable = Block | SsdBlock

_NO_LIMIT: Final = 1 << 62


@dataclass(slots=True)
class Lease:
    """Blocks held for a session until ``expires_ns``."""

    id: int
    session: int
    blocks: list[Leasable]
    expires_ns: int


class Leases:
    """All leases. Every block of a lease is marked: it stays also where one behind it is removed or found corrupt.

    Args:
        limit_bytes: slots in DRAM that leases may hold together.
        ssd_limit_bytes: likewise on the SSD.

    Attributes:
        held_bytes, ssd_held_bytes: slots that they do hold.
        cut, refused: leases that were given for the first blocks only, or for none, since the start.
    """

    def __init__(self, limit_bytes: int = _NO_LIMIT, ssd_limit_bytes: int = _NO_LIMIT) -> None:
        self.limit_bytes = limit_bytes
        self.ssd_limit_bytes = ssd_limit_bytes
        self.held_bytes = 0
        self.ssd_held_bytes = 0
        self.cut = 0
        self.refused = 0
        self._leases: dict[int, Lease] = {}
        self._expiry: list[tuple[int, int]] = []
        self._of_session: dict[int, set[int]] = {}
        self._next = 1
        self._ssd_bytes: dict[SsdBlock, int] = {}
        """Slots of blocks on the SSD that are held, as they were when that began."""
        self._parents: dict[Block, int] = {}
        """Held for their children: how many of these are held. They came after their children, or are above such."""

    def __len__(self) -> int:
        return len(self._leases)

    def count_of(self, session: int) -> int:
        """Leases that a session holds."""
        return len(self._of_session.get(session, ()))

    def all(self) -> list[Lease]:
        """Every lease, for ``validate_state()``."""
        return list(self._leases.values())

    def parents(self) -> dict[Block, int]:
        """Blocks that are held for their children, and how many of these are held, for ``validate_state()``."""
        return self._parents

    def has_room(self, slot_bytes: int) -> bool:
        """Whether so much more of DRAM may be held."""
        return self.held_bytes + slot_bytes <= self.limit_bytes

    # -------------------------------------------------------------- taking and ending

    def fitting(self, blocks: Sequence[Leasable]) -> tuple[Sequence[Leasable], int]:
        """What a lease on a chain takes in: its leading blocks that fit, and those before them; how many fit."""
        room, ssd_room = self.limit_bytes - self.held_bytes, self.ssd_limit_bytes - self.ssd_held_bytes
        # The usual case, a whole chain that fits, at the speed of C.
        whole = blocks[0].parent is None and [block.parent for block in blocks[1:]] == blocks[:-1]
        if whole and sum([block.slot_bytes for block in blocks]) <= (room if type(blocks[0]) is Block else ssd_room):
            return blocks, len(blocks)
        taken: list[Leasable] = []
        seen: set[Leasable] = set()
        before: Leasable | None = None
        for index, block in enumerate(blocks):
            if block in seen:
                continue
            some = [block] if block.parent is None or block.parent is before else _with_ancestors(block, seen)
            before = block
            for one in some:
                if not one.held:
                    if type(one) is Block:
                        room -= one.slot_bytes
                    else:
                        ssd_room -= one.slot_bytes
            if room < 0 or ssd_room < 0:
                return taken, index
            seen.update(some)
            taken += some
        return taken, len(blocks)

    def take(self, session: int, blocks: Sequence[Leasable], expires_ns: int) -> int:
        """Lease blocks of one namespace, each of them once; returns the lease's id."""
        self._begin([block for block in blocks if not block.held])
        for block in blocks:
            block.leases += 1
            block.held += 1
        lease = Lease(self._next, session, list(blocks), expires_ns)
        self._next += 1
        self._leases[lease.id] = lease
        self._of_session.setdefault(session, set()).add(lease.id)
        heapq.heappush(self._expiry, (expires_ns, lease.id))
        return lease.id

    def end(self, identity: int, session: int) -> list[Leasable] | None:
        """End one lease of a session; the blocks that no lease holds any more, or None if there is no such lease."""
        lease = self._leases.get(identity)
        if lease is None or lease.session != session:
            return None
        return self._end(lease)

    def end_session(self, session: int) -> list[Leasable]:
        """End all leases of a session; the blocks that no lease holds any more."""
        freed: list[Leasable] = []
        for identity in list(self._of_session.get(session, ())):
            freed += self._end(self._leases[identity])
        return freed

    def expire(self, now_ns: int) -> list[Leasable]:
        """End all leases whose time is over; the blocks that no lease holds any more."""
        freed: list[Leasable] = []
        while self._expiry and self._expiry[0][0] <= now_ns:
            _, identity = heapq.heappop(self._expiry)
            lease = self._leases.get(identity)
            if lease is not None:
                freed += self._end(lease)
        return freed

    def _end(self, lease: Lease) -> list[Leasable]:
        del self._leases[lease.id]
        of_session = self._of_session[lease.session]
        of_session.discard(lease.id)
        if not of_session:
            del self._of_session[lease.session]
        if len(self._expiry) > 64 and len(self._expiry) > 4 * len(self._leases):
            self._expiry = [entry for entry in self._expiry if entry[1] in self._leases]
            heapq.heapify(self._expiry)
        over: list[Leasable] = []
        for block in lease.blocks:
            block.leases -= 1
            block.held -= 1
            if not block.held:
                over.append(block)
        return self._over(over)

    def _begin(self, fresh: list[Leasable]) -> None:
        """Blocks of one namespace are held from now on."""
        here = [block for block in fresh if type(block) is Block]
        if here:
            self._count(here[0], sum([block.slot_bytes for block in here]))
            if self._parents:
                for block in here:
                    if block.parent in self._parents:
                        self._parents[block.parent] += 1
        if len(here) < len(fresh):
            for copy in fresh:
                if type(copy) is SsdBlock:
                    self.ssd_held_bytes += copy.slot_bytes
                    self._ssd_bytes[copy] = copy.slot_bytes

    def _over(self, over: list[Leasable]) -> list[Leasable]:
        """Blocks of one namespace are held no more; those that are there still, and others that were held for them."""
        here = [block for block in over if type(block) is Block]
        freed: list[Leasable] = [block for block in over if block.parts]
        if here:
            self._count(here[0], -sum([block.slot_bytes for block in here]))
            if self._parents:
                for block in here:
                    self._child_over(block.parent, freed)
        if len(here) < len(over):
            for copy in over:
                if type(copy) is SsdBlock:
                    self.ssd_held_bytes -= self._ssd_bytes.pop(copy)
        return freed

    def _count(self, block: Block, by: int) -> None:
        self.held_bytes += by
        tenant = block.namespace.tenant
        if tenant is not None:
            tenant.leased_bytes += by

    # -------------------------------------------------------------- what changes meanwhile

    def resized(self, block: Block, by: int) -> None:
        """The slots of a block in DRAM grew by so many bytes."""
        if block.held:
            self._count(block, by)

    def adopting_bytes(self, children: Iterable[Block], parent: Block | None, slot_bytes: int) -> int:
        """What more is held when a block of that size comes between a parent and children; 0 where none is held."""
        if not any(child.held for child in children):
            return 0
        while parent is not None:
            slot_bytes += 0 if parent.held else parent.slot_bytes
            parent = parent.parent
        return slot_bytes

    def adopted(self, block: Block) -> None:
        """A block came as a parent of some: where one of these is held it must stay, and so must those before it."""
        above: Block | None = block
        while above is not None:
            if above in self._parents:
                # It counts this child already, since that one began to be held.
                return
            count = sum(child.held > 0 for child in above.children or ())
            if not count:
                return
            self._parents[above] = count
            if not above.held:
                self._begin([above])
            above.leases += 1
            above.held += 1
            above = above.parent

    def left(self, block: Block) -> list[Leasable]:
        """A block that may be held leaves the tree; blocks that are held no more. It is linked, and has its slots."""
        freed: list[Leasable] = []
        if not block.held:
            return freed
        self._count(block, -block.slot_bytes)
        if self._parents:
            self._child_over(block.parent, freed)
            if self._parents.pop(block, 0):
                block.leases -= 1
                block.held -= 1
        return freed

    def _child_over(self, parent: Block | None, freed: list[Leasable]) -> None:
        """A child is held no more, or is gone: blocks above that were held for it alone are not either."""
        while parent is not None and parent in self._parents:
            self._parents[parent] -= 1
            if self._parents[parent]:
                return
            del self._parents[parent]
            parent.leases -= 1
            parent.held -= 1
            if parent.held:
                return
            self._count(parent, -parent.slot_bytes)
            freed.append(parent)
            parent = parent.parent


def _with_ancestors(block: Leasable, seen: set[Leasable]) -> list[Leasable]:
    """A block and those before it in its tier that were not seen, first ones first."""
    path = [block]
    above = block.parent
    while above is not None and above not in seen:
        path.append(above)
        above = above.parent
    path.reverse()
    return path
