"""Retention, the obvious and slow way: who is retained, in which order they lose that, and when it is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fakes.store_model import ModelBlock

NORMAL = 50
FOREVER = 1 << 62


@dataclass(eq=False)
class Kept:
    """The retention of a block; ``rank`` says who loses it first, ``due`` when it is looked at and in which turn."""

    priority: int
    expires_ns: int
    drop: bool
    rank: tuple[int, int, int, int]
    due: tuple[int, int]


@dataclass
class RetentionModel:
    """All retentions are marks of blocks.

    Attributes:
        budget_bytes: that may be retained together.
        quotas: of tenants, by name, with which each has a part of the budget.
    """

    budget_bytes: int
    capacity_bytes: int
    quotas: dict[str, int]
    is_still: Callable[[ModelBlock], bool] = lambda block: True
    """Whether a block is retained in the end: of several that might lose that, one is as good as another."""
    _turn: int = field(default=0)

    def _next(self) -> int:
        self._turn += 1
        return self._turn

    def give(self, block: ModelBlock, priority: int, expires_ns: int, *, drop: bool = False) -> None:
        """A block has this retention, and no other."""
        if priority == NORMAL and not drop:
            block.kept = None
            return
        if block.kept is not None and (block.kept.priority, block.kept.expires_ns, block.kept.drop) == (
            priority,
            expires_ns,
            drop,
        ):
            return
        turn = self._next()
        block.kept = Kept(priority, expires_ns, drop, (priority, expires_ns, -block.depth, turn), (expires_ns, turn))

    def raise_above(self, block: ModelBlock, priority: int, expires_ns: int) -> None:
        """What is before a block has as much at least, as far up as it has not."""
        above = block.parent
        while above is not None:
            kept = above.kept
            later = kept is not None and (kept.drop or kept.expires_ns >= expires_ns)
            if kept is not None and kept.priority >= priority and later:
                return
            ends, drop, most = expires_ns, False, priority
            if kept is not None:
                drop, most = kept.drop, max(priority, kept.priority)
                if drop or (later and kept.priority > NORMAL):
                    ends = kept.expires_ns
            self.give(above, most, ends, drop=drop)
            above = above.parent

    def retain(self, blocks: Iterable[ModelBlock], priority: int, expires_ns: int, *, drop: bool) -> None:
        """A client's wish about blocks that are there; each once."""
        for block in sorted(blocks, key=lambda block: -block.depth):
            most, ends = priority, expires_ns
            if block.is_retained:
                assert block.kept is not None
                if priority < block.kept.priority or expires_ns < block.kept.expires_ns:
                    behind = [child.kept for child in block.children if child.is_retained and child.kept is not None]
                    most = max([priority, *(kept.priority for kept in behind)])
                    ends = max([expires_ns, *(kept.expires_ns for kept in behind)])
            ends = expires_ns if drop else ends
            self.give(block, most, ends, drop=drop)
            if most > NORMAL:
                self.raise_above(block, most, ends)

    def came(self, block: ModelBlock) -> None:
        """A new block: with children that are retained it is as well."""
        for child in sorted((child for child in block.children if child.is_retained), key=lambda child: child.rank):
            assert child.kept is not None
            kept = block.kept
            if kept is None or kept.priority < child.kept.priority or kept.expires_ns < child.kept.expires_ns:
                least = (0, 0) if kept is None else (kept.priority, kept.expires_ns)
                self.give(block, max(least[0], child.kept.priority), max(least[1], child.kept.expires_ns))
        if block.is_retained:
            assert block.kept is not None
            self.raise_above(block, block.kept.priority, block.kept.expires_ns)

    def keep_budget(self, blocks: list[ModelBlock], tenant: str | None, bytes_of: dict[ModelBlock, int]) -> None:
        """Those of the lowest rank lose their retention: of the tenant first, then of all."""
        for own in (True, False):
            while True:
                some = [block for block in blocks if block.is_retained and (not own or block.tenant == tenant)]
                budget = self.budget_bytes
                if own and tenant is not None:
                    budget = budget * self.quotas[tenant] // self.capacity_bytes
                if sum(bytes_of[block] for block in some) <= budget:
                    break
                block = min(some, key=lambda block: block.rank)
                while behind := [child for child in block.children if child.is_retained]:
                    block = min(behind, key=self.is_still)
                assert block.kept is not None
                if block.kept.drop:
                    self.give(block, NORMAL, block.kept.expires_ns, drop=True)
                else:
                    block.kept = None

    def expire(self, blocks: list[ModelBlock], now_ns: int) -> list[ModelBlock]:
        """End what is over; blocks that are to be removed now."""
        removed: list[ModelBlock] = []
        while ready := [block for block in blocks if block.kept is not None and block.kept.due[0] <= now_ns]:
            block = min(ready, key=lambda block: block.due)
            assert block.kept is not None
            if block.kept.drop:
                removed.append(block)
                block.kept.due = (FOREVER, 0)
            elif block.is_retained and any(child.is_retained for child in block.children):
                self.put_off(block, now_ns)
            else:
                block.kept = None
        return removed

    def put_off(self, block: ModelBlock, now_ns: int) -> None:
        assert block.kept is not None
        block.kept.due = (now_ns + 10**9, self._next())
