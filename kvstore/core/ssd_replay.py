"""What the frames of a checkpoint and the logs behind it say together: which records the SSD holds.

Pure: entries in, state out. A log whose last frame is torn ends before it. Where whole frames follow a broken one,
something that was said is unknown: then every record that was there before is dropped, for it may have been removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_log import (
    EmptyEntry,
    EndEntry,
    Entry,
    FreeEntry,
    NamespaceEntry,
    PutEntry,
    TouchEntry,
)


@dataclass(slots=True)
class Replayed:
    """State so far.

    Attributes:
        namespaces: the latest entry of each, by number.
        slots: records by slot.
        puts: that were read, for the end of a checkpoint.
        complete: the end of a checkpoint was read, and its count was right.
        dropped: records that were given up because something before was unknown, or that contradict others.
    """

    namespaces: dict[int, NamespaceEntry] = field(default_factory=dict)
    slots: dict[int, PutEntry] = field(default_factory=dict)
    puts: int = 0
    complete: bool = False
    dropped: int = 0
    _places: dict[int, dict[tuple[bytes, int], int]] = field(default_factory=dict)
    """Slots by key and part, by namespace."""

    def take(self, entries: Iterable[Entry]) -> None:
        """The entries of one frame."""
        slots = self.slots
        for entry in entries:
            if type(entry) is PutEntry:
                self.puts += 1
                places = self._places.setdefault(entry.namespace, {})
                place = (entry.key, entry.part)
                before = places.get(place)
                if before is not None and before != entry.slot:
                    del slots[before]
                self._end(entry.slot)
                slots[entry.slot] = entry
                places[place] = entry.slot
            elif type(entry) is FreeEntry:
                self._end(entry.slot)
            elif type(entry) is TouchEntry:
                touched = slots.get(entry.slot)
                if touched is not None and touched.access < entry.access:
                    slots[entry.slot] = touched._replace(access=entry.access)
            elif type(entry) is NamespaceEntry:
                # Also one of the same generation: a checkpoint may have it from behind what the log says first.
                self._empty(entry.namespace)
                self.namespaces[entry.namespace] = entry
            elif type(entry) is EmptyEntry:
                self._empty(entry.namespace)
            elif type(entry) is EndEntry:
                self.complete = entry.puts == self.puts

    def _end(self, slot: int) -> None:
        put = self.slots.pop(slot, None)
        if put is not None:
            del self._places[put.namespace][put.key, put.part]

    def _empty(self, namespace: int) -> None:
        for slot in self._places.pop(namespace, {}).values():
            del self.slots[slot]

    def doubt(self) -> None:
        """Something that was said is unknown: what was there may be over."""
        self.dropped += len(self.slots)
        self.slots.clear()
        self._places.clear()

    def settle(self, slab_bytes: int, first_page: int, slab_count: int) -> list[PutEntry]:
        """Records whose slots fit a file of so many slabs and each other, the least recently used first.

        Records that contradict others are dropped: a slab has slots of one size only.
        """
        slab_pages = slab_bytes // PAGE_BYTES
        sizes: dict[int, int] = {}
        kept: list[PutEntry] = []
        # The latest word of a slab counts.
        for put in reversed(list(self.slots.values())):
            index, offset = divmod(put.slot - first_page, slab_pages)
            fits = (
                0 <= index < slab_count
                and 0 < put.slot_pages <= slab_pages
                and put.home_pages >= put.slot_pages
                and put.namespace in self.namespaces
                and 0 < put.record_bytes <= put.slot_pages * PAGE_BYTES
                and offset % put.slot_pages == 0
                and offset + put.slot_pages <= slab_pages
                and sizes.setdefault(index, put.slot_pages) == put.slot_pages
            )
            if fits:
                kept.append(put)
        self.dropped += len(self.slots) - len(kept)
        kept.reverse()
        kept.sort(key=lambda put: put.access)
        return kept
