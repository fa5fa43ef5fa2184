"""Records change their codec on the way down, and are as they were when they are back up."""

from __future__ import annotations

import mmap
from typing import Final

from kvstore.core.namespaces import NamespaceState
from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.record import RecordHeader, decode_header
from kvstore.transcode.pairs import pair_of

_KEPT_BYTES: Final = 64 << 20


class Scratch:
    """Page-aligned memory that worker threads lend from each other: fresh pages cost more than what they are for."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}
        self._free_bytes = 0

    def take(self, size_bytes: int) -> memoryview:
        """Memory of that size, a multiple of 4096; its content is anything."""
        try:
            memory = self._free[size_bytes].pop()
        except (KeyError, IndexError):
            return memoryview(mmap.mmap(-1, size_bytes))
        self._free_bytes -= size_bytes
        return memory

    def give(self, memory: memoryview) -> None:
        """Give it back; nobody uses it any more."""
        size_bytes = memory.nbytes
        if self._free_bytes + size_bytes <= _KEPT_BYTES:
            self._free_bytes += size_bytes
            self._free.setdefault(size_bytes, []).append(memory)


class Smaller:
    """A record in its new codec: its slot's bytes, padded with zeros, and its header."""

    __slots__ = ("header", "memory", "slot")

    def __init__(self, memory: memoryview, slot: memoryview, header: RecordHeader) -> None:
        self.memory = memory
        self.slot = slot
        self.header = header


class Transcoding:
    """One pair of codecs; calls are made in worker threads.

    Args:
        name: of the pair, as ``raw>lossless-zstd``.

    Raises:
        InvalidArgument: there is no such pair.
    """

    def __init__(self, name: str) -> None:
        from kvstore.transcode.records import restore, transcode

        self.pair = pair_of(name)
        self._transcode, self._restore = transcode, restore
        self.scratch = Scratch()

    def applies_to(self, namespace: NamespaceState, codec: int) -> bool:
        """Whether a namespace's records of a codec are transcoded."""
        return codec == int(self.pair.source) and self.pair.applies_to(namespace.description)

    def down(self, record: memoryview, slot_bytes: int) -> Smaller | None:
        """A record in the new codec; None where it stays as it is because that saves no page, or it is damaged."""
        memory = self.scratch.take(slot_bytes)
        try:
            found = self._transcode(record, self.pair, memory)
        except CorruptRecord:
            # Whoever reads it will find that out.
            found = None
        if found is None:
            self.scratch.give(memory)
            return None
        padded = -(-found.nbytes // PAGE_BYTES) * PAGE_BYTES
        memory[found.nbytes :] = bytes(slot_bytes - found.nbytes)
        return Smaller(memory, memory[:padded], decode_header(found))

    def up(self, record: memoryview, slot: memoryview) -> None:
        """Write the record that was transcoded into a slot in memory, and zeros behind it.

        Raises:
            CorruptRecord: it cannot be had back.
        """
        restored = self._restore(record, slot)
        if restored.obj is not slot.obj:
            raise CorruptRecord("the record in the slot was never transcoded")
        slot[restored.nbytes :] = bytes(slot.nbytes - restored.nbytes)
