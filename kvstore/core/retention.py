"""Retention: blocks that leave after all others, or before them, for a time; softly, and within a budget.

Here is who has which retention, and in which order they leave. ``kvstore.core.retaining`` decides what gets one.

A retained block is marked as if it had one lease more, so no policy chooses it; when the policy has no block to offer,
the retained one of the lowest priority leaves, of equal ones the one whose time is over first. Blocks of a priority
below the normal one are chosen before the policy is asked. Either way the order is the same with every policy. A block
in DRAM that stands before a retained one is retained at least as high.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvstore.core.block import Block
    from kvstore.core.namespaces import NamespaceState
    from kvstore.core.tenants import Tenant

NORMAL: Final = 50
"""Priority of a block without retention."""

ALL: Final = 101
"""Above every priority."""

FOREVER_NS: Final = 1 << 62
MOST_WAITING: Final = 65_536
"""Retentions of blocks that are not in DRAM; beyond it the oldest are forgotten. Each takes about 400 bytes."""

_COMPACT_FROM: Final = 64
_MOST_PUT_ASIDE: Final = 32
_PUT_OFF_NS: Final = 1_000_000_000


class Retained:
    """The retention of one block.

    Attributes:
        namespace, key: of the block.
        priority: 0 to 100. With ``NORMAL`` it leaves like any other, and only its end matters.
        expires_ns: when it is over.
        drop: the block is removed then.
        hinted: a hint asked for it, nobody else.
        block: it, while it is in DRAM and may be chosen to leave.
        version: grows with each change: what stands in a heap with another one is void.
        queued: it stands in the queue of those that leave.
    """

    __slots__ = ("block", "drop", "expires_ns", "hinted", "key", "namespace", "priority", "queued", "version")

    def __init__(self, namespace: NamespaceState, key: bytes) -> None:
        self.namespace = namespace
        self.key = key
        self.priority = NORMAL
        self.expires_ns = FOREVER_NS
        self.drop = False
        self.hinted = False
        self.block: Block | None = None
        self.version = 0
        self.queued = False

    def is_so(self, priority: int, expires_ns: int, drop: bool) -> bool:
        """Whether nothing is new."""
        return self.priority == priority and self.expires_ns == expires_ns and self.drop is drop

    @property
    def holds(self) -> bool:
        """Whether its block is marked, and counts for the budget."""
        return self.block is not None and self.priority > NORMAL


_Entry = tuple[int, int, int, int, int, Retained]
"""In a ranking: priority, end, negative depth, a number of its own, version."""


class _Ranking:
    """Retained blocks by rank, lowest first; of equal ones the deepest first, so that no leaf is left behind."""

    __slots__ = ("_compact_at", "_heap", "_number")

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._number = 0
        self._compact_at = _COMPACT_FROM

    def push(self, retained: Retained) -> None:
        assert retained.block is not None
        if len(self._heap) >= self._compact_at:
            self._heap = [entry for entry in self._heap if entry[4] == entry[5].version]
            heapq.heapify(self._heap)
            self._compact_at = max(2 * len(self._heap), _COMPACT_FROM)
        self._number += 1
        rank = (retained.priority, retained.expires_ns, -retained.block.depth)
        heapq.heappush(self._heap, (*rank, self._number, retained.version, retained))

    def all(self) -> list[Retained]:
        return [entry[5] for entry in self._heap if entry[4] == entry[5].version]

    def first(self) -> _Entry | None:
        heap = self._heap
        while heap:
            if heap[0][4] == heap[0][5].version:
                return heap[0]
            heapq.heappop(heap)
        return None

    def pop(self) -> None:
        heapq.heappop(self._heap)


class _Share:
    """What one tenant with a quota has retained, or all others have together."""

    __slots__ = ("budget_bytes", "held_bytes", "leaving", "order")

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.order = _Ranking()
        """All whose blocks are held: the first loses its retention where there are too many."""
        self.leaving = _Ranking()
        """Those that may be able to leave; one that turns out not to be comes back when that has changed."""


class Retention:
    """All retentions.

    Args:
        budget_bytes: slots that may be retained together.
        capacity_bytes: of the tier; a tenant with a quota may have the same part of that retained.
        tenants: those with a quota.
        released: is told of each block that is marked no more and may be chosen again.

    Attributes:
        held_bytes, held_blocks: that are retained in DRAM.
        low_blocks: in DRAM, of a priority below the normal one.
        over_budget_blocks, gave_way_blocks, ended_blocks, dropped_blocks: see ``RetentionStats``.
    """

    def __init__(
        self,
        budget_bytes: int,
        capacity_bytes: int,
        tenants: Iterable[Tenant],
        released: Callable[[Block], None],
    ) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.held_blocks = 0
        self.low_blocks = 0
        self.over_budget_blocks = 0
        self.gave_way_blocks = 0
        self.ended_blocks = 0
        self.dropped_blocks = 0
        self._released = released
        self._count = 0
        self._waiting: dict[Retained, None] = {}
        self._expiry: list[tuple[int, int, int, Retained]] = []
        self._number = 0
        self._compact_at = _COMPACT_FROM
        self._shares: dict[Tenant | None, _Share] = {None: _Share(budget_bytes)}
        for tenant in tenants:
            self._shares[tenant] = _Share(budget_bytes * tenant.limit_bytes // max(capacity_bytes, 1))

    def __len__(self) -> int:
        return self._count

    @property
    def waiting_blocks(self) -> int:
        """Blocks with a retention that are not in DRAM, or on their way out of it."""
        return len(self._waiting)

    def queued(self) -> set[Retained]:
        """All that stand in the queue of those that may leave, for ``validate_state()``."""
        return {one for share in self._shares.values() for one in share.leaving.all() if one.queued}

    def shares(self) -> dict[Tenant | None, tuple[int, int]]:
        """Bytes retained of each tenant, and its budget, for ``validate_state()``."""
        return {tenant: (share.held_bytes, share.budget_bytes) for tenant, share in self._shares.items()}

    # -------------------------------------------------------------- giving and ending

    def give(
        self,
        namespace: NamespaceState,
        key: bytes,
        block: Block | None,
        priority: int,
        expires_ns: int,
        *,
        drop: bool = False,
        hinted: bool = False,
    ) -> None:
        """A block has this retention from now on, and no other; ``block``: it, where it is in DRAM and not retired."""
        retained = namespace.retained.get(key)
        if retained is None:
            if priority == NORMAL and not drop:
                return
            retained = namespace.retained[key] = Retained(namespace, key)
            self._count += 1
        elif priority == NORMAL and not drop:
            self.end(retained)
            return
        elif retained.block is block is not None and retained.is_so(priority, expires_ns, drop):
            retained.hinted = hinted
            return
        before = self._unmark(retained)
        retained.priority, retained.expires_ns, retained.drop, retained.hinted = priority, expires_ns, drop, hinted
        if block is not None:
            self._mark(retained, block)
        else:
            self._wait(retained)
        if before is not None and not before.leases:
            self._released(before)

    def raise_to(self, block: Block, priority: int, expires_ns: int, *, hinted: bool) -> bool:
        """A block in DRAM is retained at least so, because one behind it is; False: it was already."""
        retained = block.namespace.retained.get(block.key)
        if retained is None:
            self.give(block.namespace, block.key, block, priority, expires_ns, hinted=hinted)
            return True
        # What is dropped at its end takes those behind it along.
        later = retained.drop or retained.expires_ns >= expires_ns
        if retained.block is not None and retained.priority >= priority and later:
            return False
        if retained.drop or (later and retained.priority > NORMAL):
            expires_ns = retained.expires_ns
        priority, hinted = max(retained.priority, priority), retained.hinted and hinted
        self.give(block.namespace, block.key, block, priority, expires_ns, drop=retained.drop, hinted=hinted)
        return True

    def end(self, retained: Retained) -> None:
        """A block has no retention any more."""
        before = self._unmark(retained)
        self._waiting.pop(retained, None)
        retained.version += 1
        if retained.namespace.retained.pop(retained.key, None) is not None:
            self._count -= 1
        if before is not None and not before.leases:
            self._released(before)

    def forget(self, namespace: NamespaceState) -> None:
        """Nothing of a namespace is left, or comes back."""
        for retained in list(namespace.retained.values()):
            self.end(retained)

    def expire(self, now_ns: int) -> list[Retained]:
        """End what is over; those whose blocks are to be removed, which the caller ends, or puts off."""
        drop: list[Retained] = []
        while self._expiry and self._expiry[0][0] <= now_ns:
            _, _, version, retained = heapq.heappop(self._expiry)
            if version != retained.version:
                continue
            if retained.drop:
                drop.append(retained)
            elif retained.holds and self._held_child(retained) is not None:
                self.put_off(retained, now_ns)
            else:
                self.ended_blocks += 1
                self.end(retained)
        return drop

    def put_off(self, retained: Retained, now_ns: int) -> None:
        """A retention cannot end now: one behind it lasts, or somebody holds a lease on the block."""
        self._push_expiry(retained, now_ns + _PUT_OFF_NS)

    def keep_budget(self, namespace: NamespaceState) -> None:
        """Have those of the lowest rank lose their retention until the rest is within the budget."""
        share = self._share_of(namespace)
        while share.held_bytes > share.budget_bytes:
            self._lose(share.order)
        while self.held_bytes > self.budget_bytes:
            shares = [other for other in self._shares.values() if other.held_bytes]
            self._lose(min((other.order for other in shares), key=_rank))

    def _lose(self, order: _Ranking) -> None:
        first = order.first()
        assert first is not None
        retained = first[5]
        while (below := self._held_child(retained)) is not None:
            retained = below
        self.over_budget_blocks += 1
        if retained.drop:
            # Its time counts still.
            block = retained.block
            self.give(retained.namespace, retained.key, block, NORMAL, retained.expires_ns, drop=True)
        else:
            self.end(retained)

    @staticmethod
    def _held_child(retained: Retained) -> Retained | None:
        """A retained block behind one that is in DRAM."""
        assert retained.block is not None
        by_key = retained.namespace.retained
        for child in retained.block.children or ():
            below = by_key.get(child.key)
            if below is not None and below.holds:
                return below
        return None

    # -------------------------------------------------------------- blocks come and go

    def left(self, block: Block, *, forget: bool, gave_way: bool) -> None:
        """A block leaves DRAM, or is on its way out of it.

        Args:
            block: it.
            forget: it does not come back with its retention.
            gave_way: it leaves for others.
        """
        retained = block.namespace.retained.get(block.key)
        if retained is None:
            return
        self.gave_way_blocks += retained.holds and gave_way
        self._unmark(retained)
        if forget:
            self.end(retained)
        else:
            self._wait(retained)

    def back(self, block: Block) -> Retained | None:
        """A block is in DRAM to stay; its retention, where that holds it."""
        retained = block.namespace.retained.get(block.key)
        if retained is None:
            return None
        if retained.block is None:
            self._mark(retained, block)
        return retained if retained.holds else None

    def resized(self, block: Block, by: int) -> None:
        """The slots of a block in DRAM grew by so many bytes."""
        retained = block.namespace.retained.get(block.key)
        if retained is not None and retained.holds:
            self.held_bytes += by
            self._share_of(retained.namespace).held_bytes += by

    def may_leave(self, block: Block) -> None:
        """A block's last child left, or its last lease ended: it may be its turn."""
        retained = block.namespace.retained.get(block.key)
        if retained is not None:
            self._queue(retained)

    def _mark(self, retained: Retained, block: Block) -> None:
        self._waiting.pop(retained, None)
        retained.version += 1
        retained.block = block
        retained.queued = False
        if retained.priority > NORMAL:
            block.leases += 1
            self.held_blocks += 1
            self.held_bytes += block.slot_bytes
            share = self._share_of(retained.namespace)
            share.held_bytes += block.slot_bytes
            share.order.push(retained)
        elif retained.priority < NORMAL:
            self.low_blocks += 1
        if not block.children:
            self._queue(retained)
        self._push_expiry(retained, retained.expires_ns)

    def _unmark(self, retained: Retained) -> Block | None:
        """The block that it was in force for."""
        block, retained.block = retained.block, None
        if block is None:
            return None
        retained.version += 1
        if retained.priority > NORMAL:
            block.leases -= 1
            self.held_blocks -= 1
            self.held_bytes -= block.slot_bytes
            self._share_of(retained.namespace).held_bytes -= block.slot_bytes
        elif retained.priority < NORMAL:
            self.low_blocks -= 1
        return block

    def _wait(self, retained: Retained) -> None:
        retained.version += 1
        self._waiting.pop(retained, None)
        self._waiting[retained] = None
        self._push_expiry(retained, retained.expires_ns)
        while len(self._waiting) > MOST_WAITING:
            self.end(next(iter(self._waiting)))

    def _push_expiry(self, retained: Retained, at_ns: int) -> None:
        if at_ns >= FOREVER_NS:
            return
        if len(self._expiry) >= self._compact_at:
            self._expiry = [entry for entry in self._expiry if entry[2] == entry[3].version]
            heapq.heapify(self._expiry)
            self._compact_at = max(2 * len(self._expiry), _COMPACT_FROM)
        self._number += 1
        heapq.heappush(self._expiry, (at_ns, self._number, retained.version, retained))

    # -------------------------------------------------------------- who leaves

    def next_victim(
        self, below: int, before: int | None, used: Callable[[Block], int], tenant: Tenant | None = None
    ) -> Block | None:
        """The block of the lowest rank that can leave, of a priority below ``below``; it stays until it has left.

        Args:
            below: a priority.
            before: none that was used by this access, or by a later one.
            used: the access that a block was last used by.
            tenant: whose; None: anybody's.
        """
        shares = self._shares.values() if tenant is None else [self._shares[tenant]]
        found: _Entry | None = None
        for share in shares:
            entry = self._first_that_can(share.leaving, below, before, used)
            if entry is not None and (found is None or entry[:3] < found[:3]):
                found = entry
        return None if found is None else found[5].block

    @staticmethod
    def _first_that_can(
        leaving: _Ranking, below: int, before: int | None, used: Callable[[Block], int]
    ) -> _Entry | None:
        put_aside: list[Retained] = []
        found: _Entry | None = None
        while (entry := leaving.first()) is not None and entry[0] < below:
            retained = entry[5]
            block = retained.block
            assert block is not None
            if block.children or block.leases > (retained.priority > NORMAL):
                leaving.pop()
                retained.queued = False
            elif before is not None and used(block) >= before:
                leaving.pop()
                put_aside.append(retained)
                if below == NORMAL and len(put_aside) >= _MOST_PUT_ASIDE:
                    # The policy has others.
                    break
            else:
                found = entry
                break
        for retained in put_aside:
            leaving.push(retained)
        return found

    def _queue(self, retained: Retained) -> None:
        if retained.block is not None and not retained.queued and retained.priority != NORMAL:
            retained.queued = True
            self._share_of(retained.namespace).leaving.push(retained)

    def _share_of(self, namespace: NamespaceState) -> _Share:
        return self._shares[namespace.tenant]


def _rank(order: _Ranking) -> tuple[int, int, int]:
    first = order.first()
    assert first is not None
    return first[:3]
