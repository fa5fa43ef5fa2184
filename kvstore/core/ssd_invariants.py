"""``validate_ssd``: everything that must hold of the SSD tier's state between two events."""

from __future__ import annotations

from collections import Counter

from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_record import SsdBlock, SsdNamespace, SsdState
from kvstore.errors import InvariantViolation
from kvstore.format.constants import PAGE_BYTES
from kvstore.protocol.keys import ROOT_KEY


def validate_ssd(ssd: SsdStore) -> None:
    """Check the whole state; O(blocks + slots).

    Raises:
        InvariantViolation: naming the first thing that does not hold.
    """
    sums: Counter[SsdState] = Counter()
    used: Counter[int] = Counter()
    leaving: Counter[int] = Counter()
    record_bytes = stored = leaving_count = 0
    for slot, record in ssd.records.items():
        _require(slot == record.slot, f"the record of SSD slot {record.slot} is filed under {slot}")
        _require(record.state is not SsdState.FREE, f"SSD slot {slot} is free and filed")
        sums[record.state] += record.slot_bytes
        slab = ssd.slabs.slab_of(slot)
        used[slab.index] += 1
        _require(
            slab.usable and slab.slot_pages * PAGE_BYTES == record.slot_bytes, f"SSD slot {slot} is not of its slab"
        )
        _require((slot - slab.first_page) % slab.slot_pages == 0, f"SSD slot {slot} is not on a slot's border")
        _require(slot not in slab.free, f"SSD slot {slot} is used and free")
        _require(record.busy >= 0, f"SSD slot {slot} was let go of too often")
        if record.state is SsdState.LEAVING:
            _require(record.logged or record.busy > 0, f"SSD slot {slot} leaves and nothing is waited for")
            leaving_count += 1
            leaving[record.slot_bytes] += not slab.draining
        if record.state is SsdState.STORED:
            stored += 1
            record_bytes += record.record_bytes
            _require(record.namespace.stored(record.key, record.part) is record, f"SSD slot {slot} is of no block")
        elif record.state is SsdState.WRITING:
            _require(
                record.namespace.writing.get((record.key, record.part)) is record,
                f"SSD slot {slot} is written by nobody",
            )
    for state, value in (
        (SsdState.STORED, ssd.resident_bytes),
        (SsdState.WRITING, ssd.writing_bytes),
        (SsdState.LEAVING, ssd.leaving_bytes),
    ):
        _require(sums[state] == value, f"SSD {state.name} bytes are {sums[state]}, accounted are {value}")
    _require(stored == ssd.record_count, f"{ssd.record_count} SSD records counted, {stored} found")
    _require(record_bytes == ssd.record_bytes, "SSD record bytes are miscounted")
    _require(leaving_count == ssd.leaving_count, "SSD records that leave are miscounted")
    _require(leaving == +ssd.coming, f"SSD slots on their way are {leaving}, counted are {+ssd.coming}")
    _require(len(ssd.records) <= ssd.max_records, "the SSD holds more records than its log has room for")
    for slab in ssd.slabs.slabs:
        _require(slab.used == used[slab.index], f"SSD slab {slab.index} counts {slab.used} slots")
        _require(slab.cut == slab.used + len(slab.free), f"SSD slab {slab.index} lost a slot")
    draining = sum(slab.joined for slab in ssd.slabs.slabs if slab.draining)
    _require(draining == ssd.slabs.draining_slabs, "SSD slabs that are emptied are miscounted")
    blocks = 0
    for number, namespace in ssd.namespaces.items():
        _require(namespace.number == number, f"SSD namespace {namespace.number} is filed under {number}")
        blocks += _check_tree(namespace)
    _require(blocks == ssd.block_count, f"{ssd.block_count} SSD blocks counted, {blocks} found")
    _require(ssd.policy.held() == blocks, f"the SSD's policy holds {ssd.policy.held()} of {blocks} blocks")


def _check_tree(namespace: SsdNamespace) -> int:
    tree = namespace.tree
    slot_bytes = 0
    for key, block in tree.blocks.items():
        name = key.hex()[:12]
        _require(block.key == key and block.namespace is namespace, f"SSD block {name} is filed wrongly")
        _require(bool(block.parts), f"SSD block {name} has no parts")
        held = sum(record.slot_bytes for record in block.parts.values())
        _require(held == block.slot_bytes, f"SSD block {name} accounts {block.slot_bytes}, holds {held}")
        slot_bytes += held
        for part, record in block.parts.items():
            _require(
                record.state is SsdState.STORED and record.part == part and record.key == key,
                f"SSD block {name} part {part} is {record.state.name}",
            )
        _check_links(namespace, block, name)
    _require(slot_bytes == namespace.slot_bytes, f"SSD namespace {namespace.number} slot bytes are miscounted")
    for key, waiting in tree.orphans.items():
        _require(key not in tree.blocks and bool(waiting), "SSD orphans wait for a parent that is there")
    return len(tree.blocks)


def _check_links(namespace: SsdNamespace, block: SsdBlock, name: str) -> None:
    parent = namespace.tree.blocks.get(block.parent_key)
    _require(block.parent is parent, f"SSD block {name} is not linked to its parent")
    if parent is not None:
        _require(block in (parent.children or ()), f"SSD block {name} is not its parent's child")
        _require(block.depth == parent.depth + 1, f"SSD block {name} has depth {block.depth}")
    elif block.parent_key != ROOT_KEY:
        _require(block in namespace.tree.orphans.get(block.parent_key, ()), f"SSD orphan {name} is not noted")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantViolation(message)
