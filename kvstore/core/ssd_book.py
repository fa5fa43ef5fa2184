"""What the SSD holds, and the changes that all rooms of its state machine make; no decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvstore.core.slabs import SlabAllocator
from kvstore.core.ssd_record import SSD_TRANSITIONS, SsdBlock, SsdNamespace, SsdRecord, SsdState
from kvstore.core.tenants import Tenant
from kvstore.core.watching import Cause
from kvstore.errors import InvalidTransition
from kvstore.format.ssd_log import Entry
from kvstore.policy.base import EvictionPolicy


@dataclass(slots=True)
class SsdCounters:
    """Counts since the start."""

    stored_records: int = 0
    stored_bytes: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    removed_blocks: int = 0
    corrupt_records: int = 0
    no_room: int = 0


class SsdBook:
    """The state of the SSD tier.

    Args:
        slabs: the slab file's slots; this alone allocates from it.
        policy: chooses what leaves; of its own, not the DRAM tier's.
        max_records: records at a time, for which the log and the checkpoints have room.
        tenants: those with a quota on the SSD; ``policy`` must know them, see ``kvstore.core.pools``.
    """

    def __init__(
        self, slabs: SlabAllocator, policy: EvictionPolicy, max_records: int, tenants: Iterable[Tenant] = ()
    ) -> None:
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.slabs = slabs
        self.policy = policy
        self.max_records = max_records
        self.namespaces: dict[int, SsdNamespace] = {}
        self.counters = SsdCounters()
        self.resident_bytes = 0
        self.record_bytes = 0
        self.writing_bytes = 0
        self.leaving_bytes = 0
        self.block_count = 0
        self.record_count = 0
        self.access = 0
        """The highest access number that the log knows of."""
        self.records: dict[int, SsdRecord] = {}
        self.growing = False
        """Whether slabs are still to come: until they are there nothing leaves for want of them."""
        self.on_evicted: Callable[[bytes, int], None] = lambda key, used: None
        """Is told of each block that leaves for others, and when it was last used."""
        self.on_left: Callable[[SsdBlock, Cause], None] = lambda block, cause: None
        """Is told of each block that leaves, while it is still linked and its parts are there, and why."""
        self.on_stored: Callable[[SsdBlock], None] = lambda block: None
        """Is told of each block that became readable, with its first part."""
        self._last_number = 0
        self._leaving: dict[SsdRecord, None] = {}
        """Over and in the log, whose end is not in a group yet."""
        self._covered: dict[SsdRecord, None] = {}
        """As these, with the end of their whole namespace."""
        self._said: list[Entry] = []
        self._touched: dict[SsdBlock, int] = {}
        self.coming: Counter[int] = Counter()
        """Slots by size that are on their way to be free, but for those of slabs that are emptied."""
        self.leaving_count = 0
        self._emptied: dict[SsdNamespace, None] = {}
        self._groups = 0
        self._groups_done = 0

    def holds(self, namespace: SsdNamespace | None, key: bytes, part: int, fidelity: int) -> bool:
        """Whether a record that is as good is stored."""
        record = None if namespace is None else namespace.stored(key, part)
        return record is not None and record.fidelity >= fidelity

    def blocks(self) -> Iterator[SsdBlock]:
        """All blocks."""
        for namespace in self.namespaces.values():
            yield from namespace.tree.blocks.values()

    def hold(self, record: SsdRecord) -> None:
        """A transfer reads a record: its slot is not used again before ``let_go``."""
        record.busy += 1

    def let_go(self, record: SsdRecord) -> None:
        """A transfer is over."""
        record.busy -= 1
        self._settle(record)

    def _block_of(self, record: SsdRecord) -> SsdBlock:
        return record.namespace.tree.blocks[record.key]

    def _unlink(self, block: SsdBlock, cause: Cause | None = None) -> None:
        """A block leaves the policy and the tree, with all its records. ``cause`` None: another one takes its place."""
        if cause is not None:
            self.on_left(block, cause)
        self.policy.discard(block, evicted=cause is Cause.EVICTED or cause is Cause.QUOTA)
        self._let_all_leave(block)
        namespace = block.namespace
        namespace.tree.remove(block)
        if not namespace.writing and not namespace.tree.blocks:
            self._emptied[namespace] = None
        self._touched.pop(block, None)
        self.block_count -= 1

    def _let_all_leave(self, block: SsdBlock) -> None:
        for record in list(block.parts.values()):
            self._detach(block, record)
            self._leave(record)

    def _detach(self, block: SsdBlock, record: SsdRecord) -> None:
        del block.parts[record.part]
        self._count(block, record, -1)

    def _count(self, block: SsdBlock, record: SsdRecord, by: int) -> None:
        block.slot_bytes += by * record.slot_bytes
        namespace = block.namespace
        namespace.slot_bytes += by * record.slot_bytes
        if namespace.tenant is not None:
            namespace.tenant.slot_bytes += by * record.slot_bytes
        self.resident_bytes += by * record.slot_bytes
        self.record_bytes += by * record.record_bytes
        self.record_count += by

    def _leave(self, record: SsdRecord) -> None:
        self._change(record, SsdState.LEAVING)
        self.leaving_bytes += record.slot_bytes
        self.leaving_count += 1
        if not self.slabs.slab_of(record.slot).draining:
            self.coming[record.slot_bytes] += 1
        if record.logged:
            self._leaving[record] = None
        else:
            self._settle(record)

    def _settle(self, record: SsdRecord) -> None:
        """Give a slot back once its end is durable and nobody reads or writes it."""
        if record.state is not SsdState.LEAVING or record.logged or record.busy:
            return
        self._change(record, SsdState.FREE)
        self.leaving_bytes -= record.slot_bytes
        self.leaving_count -= 1
        if not self.slabs.slab_of(record.slot).draining:
            self.coming[record.slot_bytes] -= 1
        del self.records[record.slot]
        self.slabs.free(record.slot)

    def _change(self, record: SsdRecord, after: SsdState) -> None:
        if (record.state, after) not in SSD_TRANSITIONS:
            raise InvalidTransition(
                f"SSD slot {record.slot} of key {record.key.hex()}: {record.state.name} -> {after.name} must never "
                "happen"
            )
        record.state = after
