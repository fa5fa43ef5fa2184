"""An SSD tier of a few pages without I/O, with blocks by letter: ``put("abc")`` stores a chain of three."""

from __future__ import annotations

from fakes.small_store import key_of

from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd import Group, SsdStore
from kvstore.core.ssd_invariants import validate_ssd
from kvstore.core.ssd_record import SsdBlock, SsdNamespace, SsdRecord
from kvstore.core.ssd_replay import Replayed
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_log import Entry
from kvstore.policy.lru import Lru
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace

DESCRIPTION = Namespace(name="small").canonical()


class SmallSsd:
    """A tier.

    Args:
        slabs, slab_pages: of the slab file, all formatted.
        records: most at a time.

    Attributes:
        entries: all that the log says durably.
        logged: of each frame of it.
    """

    def __init__(self, slabs: int = 4, slab_pages: int = 4, records: int = 1000) -> None:
        self.slabs, self.slab_pages, self.max_records = slabs, slab_pages, records
        self.ssd = SsdStore(self._allocator(), Lru(), records)
        self.space = self.ssd.namespace(DESCRIPTION, 0)
        self.logged: list[list[Entry]] = []
        self.access = 0

    def _allocator(self) -> SlabAllocator:
        slabs = SlabAllocator(self.slabs, self.slab_pages * PAGE_BYTES, 1, most_joined=1)
        for index in range(self.slabs):
            slabs.make_usable(index)
        return slabs

    @property
    def entries(self) -> list[Entry]:
        return [entry for entries in self.logged for entry in entries]

    def begin(
        self,
        letter: str,
        parent: str = "",
        *,
        part: int = 0,
        pages: int = 1,
        fidelity: int = 255,
        space: SsdNamespace | None = None,
    ) -> SsdRecord | None:
        """A record on its way, None where there is no slot for it."""
        self.access += 1
        above = key_of(parent) if parent else ROOT_KEY
        space = space or self.space
        record = self.ssd.begin(space, key_of(letter), above, part, pages * PAGE_BYTES, 0, self.access)
        if record is not None:
            record.fidelity, record.record_bytes = fidelity, pages * PAGE_BYTES - 10
        validate_ssd(self.ssd)
        return record

    def must_begin(
        self, letter: str, parent: str = "", *, part: int = 0, pages: int = 1, fidelity: int = 255
    ) -> SsdRecord:
        record = self.begin(letter, parent, part=part, pages=pages, fidelity=fidelity)
        assert record is not None
        return record

    def begin_group(self, *records: SsdRecord) -> Group:
        group = self.ssd.begin_group(list(records))
        validate_ssd(self.ssd)
        return group

    def end_group(self, group: Group, *records: SsdRecord) -> list[SsdRecord]:
        self.logged.append(group.entries)
        ended = self.ssd.end_group(group)
        for record in records:
            self.ssd.written(record)
        validate_ssd(self.ssd)
        return ended

    def fail_group(self, group: Group, *records: SsdRecord) -> None:
        self.ssd.fail_group(group)
        for record in records:
            self.ssd.fail(record)
            self.ssd.written(record)
        validate_ssd(self.ssd)

    def commit(self, *records: SsdRecord) -> list[Entry]:
        """Log records and all that ended; what the frame says."""
        group = self.begin_group(*records)
        self.end_group(group, *records)
        return group.entries

    def put(self, letters: str, *, at: str = "", pages: int = 1, fidelity: int = 255) -> list[SsdRecord]:
        """Store a chain, all in one group."""
        parents = [at, *letters]
        records = [
            self.must_begin(letter, parents[index], pages=pages, fidelity=fidelity)
            for index, letter in enumerate(letters)
        ]
        self.commit(*records)
        return records

    def block(self, letter: str) -> SsdBlock:
        return self.space.tree.blocks[key_of(letter)]

    def stored(self, space: SsdNamespace | None = None) -> str:
        return "".join(sorted(key.rstrip(b"_").decode() for key in (space or self.space).tree.blocks))

    def replayed(self) -> Replayed:
        """What the log says."""
        state = Replayed()
        for entries in self.logged:
            state.take(entries)
        return state

    def restarted(self, *, records: int = 0) -> SmallSsd:
        """Another life, that finds what the log says."""
        state = self.replayed()
        other = SmallSsd(self.slabs, self.slab_pages, records or self.max_records)
        other.ssd = SsdStore(other._allocator(), Lru(), records or self.max_records)
        other.logged = list(self.logged)
        puts = state.settle(self.slab_pages * PAGE_BYTES, 1, self.slabs)
        other.ssd.restore(list(state.namespaces.values()), puts)
        found = [space for space in other.ssd.namespaces.values() if space.description == DESCRIPTION]
        other.space = found[0] if found else other.ssd.namespace(DESCRIPTION, 0)
        other.access = other.ssd.access
        validate_ssd(other.ssd)
        return other
