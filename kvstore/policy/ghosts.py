"""Keys of blocks that left, oldest out first: what a policy needs to see that one comes back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

GHOST_BYTES: Final = 256
"""Memory of one ghost, about: its place in the order, and its key, which nobody else may keep."""


class Ghosts:
    """Keys with the slot bytes that each had. Bounded by its owner, who calls ``shrink``. All O(1).

    Attributes:
        slot_bytes: of all of them together.
    """

    __slots__ = ("_sizes", "slot_bytes")

    def __init__(self) -> None:
        self._sizes: OrderedDict[Hashable, int] = OrderedDict()
        self.slot_bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def add(self, key: Hashable, slot_bytes: int) -> None:
        """Note a key as the newest."""
        self.take(key)
        self._sizes[key] = slot_bytes
        self.slot_bytes += slot_bytes

    def take(self, key: Hashable) -> bool:
        """Forget a key; whether it was there."""
        slot_bytes = self._sizes.pop(key, None)
        if slot_bytes is None:
            return False
        self.slot_bytes -= slot_bytes
        return True

    def shrink(self, slot_bytes: int) -> None:
        """Forget the oldest until the others had at most so many slot bytes."""
        while self.slot_bytes > slot_bytes and self._sizes:
            _, gone = self._sizes.popitem(last=False)
            self.slot_bytes -= gone

    @property
    def memory_bytes(self) -> int:
        """What they take, about."""
        return len(self._sizes) * GHOST_BYTES
