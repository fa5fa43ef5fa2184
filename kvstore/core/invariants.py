"""``validate_state``: everything that must hold between two events."""

from __future__ import annotations

from collections import Counter

from kvstore.core.block import Block, RecordState
from kvstore.core.holds_invariants import check_holds, check_tenants, require
from kvstore.core.journal import UNTOLD
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_invariants import validate_ssd
from kvstore.core.store import Store
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.keys import ROOT_KEY


def validate_state(store: Store) -> None:
    """Check the whole state; O(blocks + slots).

    Raises:
        InvariantViolation: naming the first thing that does not hold.
    """
    _check_accounting(store)
    _check_slabs(store)
    blocks: set[Block] = set()
    members = Counter(namespace for session in store.sessions.values() for namespace in session.namespaces)
    for identity, namespace in store.namespaces.by_id.items():
        require(namespace.id == identity, f"namespace {namespace.id} is filed under {identity}")
        require(namespace.members == members.pop(namespace, 0), f"namespace {identity} miscounts its members")
        _check_tree(namespace)
        blocks.update(namespace.blocks.values())
    require(not members, "a namespace was forgotten that has members")
    require(len(blocks) == store.block_count, f"{store.block_count} blocks counted, {len(blocks)} found")
    staying = len(blocks) - len(store.retired)
    require(store.policy.held() == staying, f"policy holds {store.policy.held()} of {staying} blocks")
    _check_retired(store, blocks)
    if store.ssd is not None:
        validate_ssd(store.ssd)
    check_holds(store)
    check_tenants(store)
    _check_journal(store, blocks)
    for block in blocks:
        for part, record in block.parts.items():
            require(record.block is block and record.part == part, f"record of slot {record.slot} is of no block")
            require(record.state is RecordState.RESIDENT, f"slot {record.slot} of a block is {record.state.name}")
            require(store.records.get(record.slot) is record, f"slot {record.slot} has two records")


def _check_retired(store: Store, blocks: set[Block]) -> None:
    retired = store.retired
    slot_bytes = clean_bytes = records = clean_records = 0
    seen: set[Block] = set()
    for block, clean in retired.all().items():
        name = block.key.hex()[:12]
        require(block in blocks and block.retired, f"block {name} is retired and gone")
        require(not block.children and not block.leases, f"block {name} is retired and in use")
        seen.add(block)
        slot_bytes += block.slot_bytes
        clean_bytes += block.slot_bytes if clean else 0
        records += len(block.parts)
        clean_records += len(block.parts) if clean else 0
    require(len(seen) == sum(block.retired for block in blocks), "a block is marked as retired and is not")
    require(
        (slot_bytes, clean_bytes, records, clean_records)
        == (retired.slot_bytes, retired.clean_bytes, retired.records, retired.clean_records),
        "retired blocks are miscounted",
    )


def _check_accounting(store: Store) -> None:
    sums: Counter[RecordState] = Counter()
    counts: Counter[RecordState] = Counter()
    record_bytes = 0
    for slot, record in store.records.items():
        require(slot == record.slot, f"record of slot {record.slot} is filed under slot {slot}")
        sums[record.state] += record.slot_bytes
        counts[record.state] += 1
        if record.state is RecordState.RESIDENT:
            record_bytes += record.record_bytes
            require(
                0 < record.record_bytes <= record.slot_bytes,
                f"{record.record_bytes} bytes in a slot of {record.slot_bytes}",
            )
    expected = {
        RecordState.RESIDENT: store.resident_bytes,
        RecordState.GRANTED: store.granted_bytes,
        RecordState.LIMBO: store.limbo_bytes,
    }
    for state, value in expected.items():
        require(sums[state] == value, f"{state.name} bytes are {sums[state]}, accounted are {value}")
    require(not counts[RecordState.FREE], "a free record is still filed")
    require(counts[RecordState.GRANTED] == store.granted_count, "granted records are miscounted")
    require(counts[RecordState.RESIDENT] == store.record_count, "resident records are miscounted")
    require(record_bytes == store.resident_record_bytes, "resident record bytes are miscounted")
    limits = store.limits
    require(store.resident_bytes <= limits.capacity_bytes, f"{store.resident_bytes} resident bytes, over capacity")
    require(store.record_count <= limits.max_records, f"{store.record_count} records, over the limit")
    require(store.granted_bytes <= limits.grant_bytes, f"{store.granted_bytes} granted bytes, over the limit")
    granted = 0
    for session in store.sessions.values():
        held = sum(record.slot_bytes for record in session.grants.values())
        require(held == session.granted_bytes, f"session {session.id} holds {held}, not {session.granted_bytes}")
        require(held <= limits.grant_bytes_per_session, f"session {session.id} holds {held} granted bytes")
        for slot, record in session.grants.items():
            require(
                store.records.get(slot) is record and record.state is RecordState.GRANTED,
                f"session {session.id} holds slot {slot}, which is no grant",
            )
        granted += held
    require(granted == store.granted_bytes, f"sessions hold {granted} granted bytes, accounted {store.granted_bytes}")


def _check_slabs(store: Store) -> None:
    used: Counter[int] = Counter()
    for slot, record in store.records.items():
        slab = store.slabs.slab_of(slot)
        used[slab.index] += 1
        require(slab.usable and slab.slot_pages * 4096 == record.slot_bytes, f"slot {slot} is not of its slab's class")
        require((slot - slab.first_page) % slab.slot_pages == 0, f"slot {slot} is not on a slot's border")
        require(slot not in slab.free, f"slot {slot} is used and free")
    free_slabs = 0
    for slab in store.slabs.slabs:
        require(slab.used == used[slab.index], f"slab {slab.index} counts {slab.used} slots, {used[slab.index]} found")
        require(slab.cut == slab.used + len(slab.free), f"slab {slab.index} lost a slot")
        require(len(set(slab.free)) == len(slab.free), f"slab {slab.index} has a slot free twice")
        free_slabs += slab.usable and not slab.slot_pages and slab.within is None
    require(free_slabs == store.slabs.free_slabs, "empty slabs are miscounted")
    for slots in store.slabs.classes.values():
        slabs = slots.slabs.values()
        require(sum(slab.used for slab in slabs) == slots.used_slots, f"class {slots.slot_pages}: used slots")
        free = sum(slab.slots - slab.used for slab in slabs if not slab.draining)
        require(
            free == slots.free_slots, f"class {slots.slot_pages} counts {slots.free_slots} free slots, {free} found"
        )
        gives = {slab.index for slab in slabs if not slab.draining and slab.used < slab.slots}
        require(gives == set(slots.open), f"class {slots.slot_pages}: slabs that can give a slot")


def _check_tree(namespace: NamespaceState) -> None:
    require(namespace.current or not namespace.blocks, f"invalidated namespace {namespace.id} holds blocks")
    slot_bytes = lossy_records = 0
    for key, block in namespace.blocks.items():
        name = key.hex()[:12]
        require(block.key == key and block.namespace is namespace, f"block {name} is filed wrongly")
        require(bool(block.parts), f"block {name} has no parts")
        require(len(block.parts) <= namespace.parts, f"block {name} has too many parts")
        held = sum(record.slot_bytes for record in block.parts.values())
        require(held == block.slot_bytes, f"block {name} accounts {block.slot_bytes}, holds {held}")
        slot_bytes += held
        for part, record in block.parts.items():
            require(record.codec in namespace.codecs, f"block {name} part {part} is of codec {record.codec}")
            lossy_records += record.fidelity < FIDELITY_EXACT
        parent = namespace.blocks.get(block.parent_key)
        require(block.parent is parent, f"block {name} is not linked to its parent")
        if parent is not None:
            require(
                (block in (parent.children or ())) is not block.retired,
                f"block {name} is not its parent's child, or is",
            )
            require(block.retired or not parent.retired, f"block {name} stays and its parent is retired")
            require(block.depth == parent.depth + 1, f"block {name} has depth {block.depth}")
        elif block.parent_key != ROOT_KEY:
            require(block in namespace.orphans.get(block.parent_key, ()), f"orphan {name} is not noted")
        for child in block.children or ():
            require(namespace.blocks.get(child.key) is child, f"a child of {name} is gone")
    require(slot_bytes == namespace.slot_bytes, f"namespace {namespace.id} slot bytes are miscounted")
    require(lossy_records == namespace.lossy_records, f"namespace {namespace.id} lossy records are miscounted")
    require(not (namespace.exact and lossy_records), f"namespace {namespace.id} is exact and holds lossy records")
    for key, waiting in namespace.orphans.items():
        require(key not in namespace.blocks, "orphans wait for a parent that is there")
        require(bool(waiting), "an empty set of orphans is kept")
        for block in waiting:
            require(namespace.blocks.get(block.key) is block, "an orphan is gone")


def _check_journal(store: Store, blocks: set[Block]) -> None:
    journal = store.journal
    if journal is None:
        return
    told, waiting = journal.told(), set(journal.waiting_blocks())
    require(len(told) == len(journal), f"the journal counts {len(journal)} blocks as told, {len(told)} found")
    for block in told:
        name = block.key.hex()[:12]
        require(block.told != UNTOLD, f"block {name} was told and does not know it")
        require(block in blocks or block in waiting, f"block {name} is gone, and nobody will be told")
    for block in blocks | waiting:
        changed = block.complete != (block.told != UNTOLD)
        require(changed == (block in waiting), f"block {block.key.hex()[:12]}: what waits is not the change")
