"""Slabs and slots: who owns which 4 KiB pages of the arena, or of the SSD's slab file. Bookkeeping only.

The arena is cut into slabs of equal size; a slab belongs to one slot class (one slot size) or to none. A slot is named
by its first page: ``offset = slot * 4096``. Slot 0 is the arena's header and never given out. Exact classes exist for
record sizes that namespaces declare; other records go into classes whose sizes grow by at most 12.5 %.

Slots that leave much of a slab unused get several adjacent slabs that are cut as one: with up to eight, less than an
eighth is left, whatever the slot size. A size that nobody declared gets no more at once than it has already, for there
may be many such sizes. Where no adjacent slabs are free, fewer do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kvstore.format.constants import PAGE_BYTES

_MOST_JOINED: Final = 8
_MOST_UNUSED: Final = 1 / 8


@dataclass(slots=True, eq=False)
class Slab:
    """One slab, or several adjacent ones that are cut as one, of which this is the first.

    Attributes:
        index, first_page, pages: its place and size; of all that are cut as one.
        usable: its memory is there.
        joined: how many slabs are cut as one.
        within: the first of those that it is cut as one with, None where that is itself.
        slot_pages: 0: in no class.
        slots, cut, used: slots that fit, that were ever given out since it got its class, and that are in use.
        draining: takes no new slots until it is empty.
    """

    index: int
    first_page: int
    pages: int
    usable: bool = False
    joined: int = 1
    within: Slab | None = None
    slot_pages: int = 0
    slots: int = 0
    cut: int = 0
    used: int = 0
    draining: bool = False
    free: list[int] = field(default_factory=list)

    def cut_slots(self) -> range:
        """First pages of all slots that were ever given out since the slab got its class."""
        return range(self.first_page, self.first_page + self.cut * self.slot_pages, max(self.slot_pages, 1))


@dataclass(slots=True, eq=False)
class SlotClass:
    """All slabs of one slot size: how many (``joined``), and which can give a slot (``open``, the last one first)."""

    slot_pages: int
    joined: int = 0
    slabs: dict[int, Slab] = field(default_factory=dict)
    open: dict[int, Slab] = field(default_factory=dict)
    used_slots: int = 0
    free_slots: int = 0


def geometric_pages(pages: int) -> int:
    """Pages of the smallest class of at least ``pages`` among m * 2**e with m in 8..15: steps of at most 12.5 %."""
    if pages <= 16:
        return pages
    shift = pages.bit_length() - 4
    return -(-pages >> shift) << shift


class SlabAllocator:
    """Gives out and takes back slots.

    Args:
        slab_count: slabs in the arena.
        slab_bytes: bytes a slab, a multiple of 4096.
        first_page: page of the first slab (pages before it are the arena's header).
        most_joined: how many adjacent slabs may be cut as one.
    """

    def __init__(self, slab_count: int, slab_bytes: int, first_page: int, most_joined: int = _MOST_JOINED) -> None:
        self.slab_bytes = slab_bytes
        self._pages = slab_bytes // PAGE_BYTES
        self._first_page = first_page
        self.slabs = [Slab(index, first_page + index * self._pages, self._pages) for index in range(slab_count)]
        self.classes: dict[int, SlotClass] = {}
        self._empty: dict[int, Slab] = {}
        self._exact: set[int] = set()
        self._most_joined = most_joined
        self.usable_slabs = 0
        self.draining_slabs = 0

    @property
    def free_slabs(self) -> int:
        """Usable slabs in no class."""
        return len(self._empty)

    def make_usable(self, index: int) -> None:
        """A slab's memory is populated; until then nothing is cut from it."""
        slab = self.slabs[index]
        if not slab.usable:
            slab.usable = True
            self.usable_slabs += 1
            self._empty[index] = slab

    def declare(self, record_bytes: int) -> None:
        """Give records of this size slots of their exact size (rounded up to pages)."""
        self._exact.add(-(-record_bytes // PAGE_BYTES))

    def slot_bytes_for(self, record_bytes: int) -> int:
        """Slot size for a record of at most ``slab_bytes``."""
        pages = -(-record_bytes // PAGE_BYTES)
        if pages not in self._exact:
            pages = min(geometric_pages(pages), self._pages)
        return pages * PAGE_BYTES

    def allocate(self, slot_bytes: int) -> int | None:
        """A free slot of exactly this size, cutting an empty slab when needed; None where there is none."""
        pages = slot_bytes // PAGE_BYTES
        slots = self.classes.get(pages)
        if slots is None or not slots.open:
            if not self._empty:
                return None
            slots = self._cut(pages)
        slab = slots.open[next(reversed(slots.open))]
        if slab.free:
            slot = slab.free.pop()
        else:
            slot = slab.first_page + slab.cut * pages
            slab.cut += 1
        slab.used += 1
        slots.used_slots += 1
        slots.free_slots -= 1
        if slab.used == slab.slots:
            del slots.open[slab.index]
        return slot

    def _unused(self, pages: int, joined: int) -> float:
        """Share of so many slabs that slots of a size leave unused."""
        return joined * self._pages % pages / (joined * self._pages)

    def _take_empty(self, pages: int, most: int) -> Slab:
        """An empty slab, or the first of up to ``most`` adjacent ones that slots of a size fill well, joined."""
        best = 1
        while best < most and self._unused(pages, best) > _MOST_UNUSED:
            best += 1
        if best == 1:
            return self._empty.popitem()[1]
        runs: list[list[int]] = []
        for index in sorted(self._empty):
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        # The shortest that is long enough, so that long ones stay; else what the longest has of use.
        run = min((run for run in runs if len(run) >= best), key=len, default=None) or max(runs, key=len)
        joined = min(range(1, min(best, len(run)) + 1), key=lambda count: self._unused(pages, count))
        slab = self._empty.pop(run[0])
        for index in run[1:joined]:
            self._empty.pop(index).within = slab
        slab.joined = joined
        slab.pages = joined * self._pages
        return slab

    def _cut(self, pages: int) -> SlotClass:
        slots = self.classes.get(pages)
        if slots is None:
            slots = self.classes[pages] = SlotClass(pages)
        slab = self._take_empty(
            pages, self._most_joined if pages in self._exact else min(self._most_joined, slots.joined or 1)
        )
        slots.joined += slab.joined
        slab.slot_pages = pages
        slab.slots = slab.pages // pages
        slab.cut = 0
        slots.slabs[slab.index] = slots.open[slab.index] = slab
        slots.free_slots += slab.slots
        return slots

    def slab_of(self, slot: int) -> Slab:
        """The slab that a slot lies in."""
        slab = self.slabs[(slot - self._first_page) // self._pages]
        return slab.within or slab

    def free(self, slot: int) -> None:
        """Take a slot back. A slab without used slots leaves its class at once."""
        slab = self.slab_of(slot)
        slots = self.classes[slab.slot_pages]
        slab.used -= 1
        slots.used_slots -= 1
        slab.free.append(slot)
        if not slab.draining:
            slots.free_slots += 1
            slots.open.setdefault(slab.index, slab)
        if not slab.used:
            self._dissolve(slab, slots)

    def _dissolve(self, slab: Slab, slots: SlotClass) -> None:
        if slab.draining:
            self.draining_slabs -= slab.joined
        else:
            slots.free_slots -= slab.slots
        slots.open.pop(slab.index, None)
        del slots.slabs[slab.index]
        if not slots.slabs:
            del self.classes[slab.slot_pages]
        slots.joined -= slab.joined
        for index in range(slab.index, slab.index + slab.joined):
            self.slabs[index].within = None
            self._empty[index] = self.slabs[index]
        slab.slot_pages = slab.slots = slab.cut = 0
        slab.joined, slab.pages = 1, self._pages
        slab.draining = False
        slab.free.clear()

    def slots_short_of_a_slab(self, slot_bytes: int) -> int:
        """How many slots of this size must come free until they are as many as any one slab of theirs has."""
        slots = self.classes[slot_bytes // PAGE_BYTES]
        return min(slab.slots for slab in slots.slabs.values()) - slots.free_slots

    def vacatable(self, slot_bytes: int) -> list[Slab]:
        """Slabs of other classes whose used slots would fit into the rest of their class, emptiest first."""
        pages = slot_bytes // PAGE_BYTES
        found = [
            slab
            for slots in self.classes.values()
            if slots.slot_pages != pages
            for slab in slots.slabs.values()
            if not slab.draining and slab.used <= slots.free_slots - (slab.slots - slab.used)
        ]
        found.sort(key=lambda slab: slab.used * slab.slot_pages)
        return found

    def drain(self, slab: Slab) -> None:
        """Give out no more slots of a slab, so that it becomes empty when those in use are freed."""
        slots = self.classes[slab.slot_pages]
        slab.draining = True
        self.draining_slabs += slab.joined
        slots.free_slots -= slab.slots - slab.used
        slots.open.pop(slab.index, None)

    def restore(self, slots: Iterable[tuple[int, int]]) -> None:
        """Take slots as used that were given out in an earlier life, by first page and bytes.

        Precondition: nothing was cut yet; the slabs are usable; slots of a slab are of one size and do not overlap.
        """
        taken: dict[int, list[int]] = {}
        sizes: dict[int, int] = {}
        first, pages = self._first_page, self._pages
        for slot, slot_bytes in slots:
            index = (slot - first) // pages
            held = taken.get(index)
            if held is None:
                held = taken[index] = []
                sizes[index] = slot_bytes // PAGE_BYTES
            held.append(slot)
        for index, held in taken.items():
            self._restore_slab(self._empty.pop(index), sizes[index], held)

    def _restore_slab(self, slab: Slab, pages: int, held: list[int]) -> None:
        slots = self.classes.get(pages)
        if slots is None:
            slots = self.classes[pages] = SlotClass(pages)
        slots.joined += 1
        slots.slabs[slab.index] = slab
        slab.slot_pages, slab.slots, slab.used = pages, slab.pages // pages, len(held)
        slab.cut = (max(held) - slab.first_page) // pages + 1
        slab.free = list(set(slab.cut_slots()).difference(held))
        slots.used_slots += slab.used
        slots.free_slots += slab.slots - slab.used
        if slab.used < slab.slots:
            slots.open[slab.index] = slab
