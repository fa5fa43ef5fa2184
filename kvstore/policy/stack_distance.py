"""An LRU stack that tells how many bytes lie above an entry: what stack distances are read from.

See Mattson et al., "Evaluation techniques for storage hierarchies" (1970). Sizes stand in places, in the order of the
pushes, and are summed by runs of places: a move changes two numbers, and a distance is two sums over lists of some
hundred numbers, at the speed of C. A tree of sums needs fewer additions and is slower, in Python, at these sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

IdentT = TypeVar("IdentT")

_ROOM_SHARE: Final = 4
"""Places for each entry: so many moves, less one, an entry costs no renumbering."""

_RUN: Final = 256
"""Places that are summed together."""


class StackEntry(Generic[IdentT]):
    """What lies in a stack.

    Attributes:
        ident: whose it is.
        sample: hash value by which it is sampled.
        slot_bytes: its size, at least 1; changed by ``StackDistances.resize`` alone.
        access: number of the engine request that used it last.
        used_ns: when that was.
        place: where it lies, 0 while it is in no stack; the stack's own.
    """

    __slots__ = ("access", "ident", "place", "sample", "slot_bytes", "used_ns")

    def __init__(self, ident: IdentT, sample: int, slot_bytes: int, access: int) -> None:
        self.ident = ident
        self.sample = sample
        self.slot_bytes = slot_bytes
        self.access = access
        self.used_ns = 0
        self.place = 0


class StackDistances(Generic[IdentT]):
    """A stack of at most so many entries. Entries are on top when they were pushed last.

    Args:
        most: entries at one time; more is the caller's mistake.
    """

    def __init__(self, most: int) -> None:
        self._runs = -(-most * _ROOM_SHARE // _RUN) + 1
        self._sizes = [0] * (self._runs * _RUN)
        self._sums = [0] * self._runs
        # Place 0 stays empty: it means that an entry is in no stack.
        self._at: list[StackEntry[IdentT] | None] = [None]
        self._bottom = 1
        self._count = 0
        self.total_bytes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[StackEntry[IdentT]]:
        """All entries, the lowest first."""
        return iter([entry for entry in self._at if entry is not None])

    def bytes_above(self, entry: StackEntry[IdentT]) -> int:
        """Bytes of all entries that were pushed after this one. Precondition: it is in the stack."""
        place = entry.place
        run = place // _RUN + 1
        last = len(self._at) // _RUN + 1
        return sum(self._sizes[place + 1 : run * _RUN]) + sum(self._sums[run:last])

    def push(self, entry: StackEntry[IdentT]) -> None:
        """Lay an entry on top, which may be in the stack already."""
        if entry.place:
            self.remove(entry)
        at = self._at
        place = len(at)
        if place == len(self._sizes):
            self._renumber()
            at = self._at
            place = len(at)
        entry.place = place
        at.append(entry)
        self._count += 1
        size = entry.slot_bytes
        self._sizes[place] = size
        self._sums[place // _RUN] += size
        self.total_bytes += size

    def remove(self, entry: StackEntry[IdentT]) -> None:
        """Take an entry out. Precondition: it is in the stack."""
        place, size = entry.place, entry.slot_bytes
        self._at[place] = None
        self._count -= 1
        self._sizes[place] = 0
        self._sums[place // _RUN] -= size
        self.total_bytes -= size
        entry.place = 0

    def resize(self, entry: StackEntry[IdentT], slot_bytes: int) -> None:
        """Change the size of an entry, in the stack or not."""
        place = entry.place
        if place:
            self._sizes[place] = slot_bytes
            self._sums[place // _RUN] += slot_bytes - entry.slot_bytes
            self.total_bytes += slot_bytes - entry.slot_bytes
        entry.slot_bytes = slot_bytes

    def lowest(self) -> StackEntry[IdentT] | None:
        """The entry that all others lie above, None where there is none."""
        at = self._at
        while self._bottom < len(at):
            entry = at[self._bottom]
            if entry is not None:
                return entry
            self._bottom += 1
        return None

    def _renumber(self) -> None:
        """Give entries the lowest places again, in the same order."""
        at: list[StackEntry[IdentT] | None] = [None]
        at += [entry for entry in self._at if entry is not None]
        sizes = [0] * len(self._sizes)
        for place, entry in enumerate(at):
            if entry is not None:
                entry.place = place
                sizes[place] = entry.slot_bytes
        self._sums = [sum(sizes[begin : begin + _RUN]) for begin in range(0, len(sizes), _RUN)]
        self._at, self._sizes, self._bottom = at, sizes, 1
