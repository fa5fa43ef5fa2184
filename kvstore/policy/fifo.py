"""First in, first out: uses do not matter. A base line; it loses to all others where blocks return."""

from __future__ import annotations

from collections import OrderedDict

from kvstore.policy.base import Evictable, PolicyContext
from kvstore.policy.parking import Parking


class Fifo(Parking):
    """Blocks leave in the order in which they came, a parent after its last child. O(1)."""

    name = "fifo"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._order: OrderedDict[Evictable, None] = OrderedDict()

    def _enter(self, block: Evictable) -> None:
        self._order[block] = None

    def _use(self, block: Evictable) -> None:
        pass

    def _first(self) -> Evictable | None:
        return next(iter(self._order), None)

    def _take(self, block: Evictable) -> None:
        del self._order[block]

    def _bring_back(self, block: Evictable) -> None:
        self._order[block] = None
        self._order.move_to_end(block, last=False)
