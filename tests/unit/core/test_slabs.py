"""The allocator against a set of pages, and the sizes of its classes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.core.slabs import SlabAllocator, geometric_pages

PAGE_BYTES = 4096
FIRST_PAGE = 512


@given(st.integers(1, 1 << 24))
def test_geometric_pages_fit_and_waste_at_most_an_eighth(pages: int):
    size = geometric_pages(pages)
    assert pages <= size
    assert size <= pages * 1.125
    assert geometric_pages(size) == size


def test_geometric_pages_classes_grow_by_at_most_an_eighth():
    classes = sorted({geometric_pages(pages) for pages in range(1, 70_000)})
    assert classes[:18] == [*range(1, 17), 18, 20]
    for smaller, larger in pairwise(classes[8:]):
        assert larger <= smaller * 1.125
    # A handful for each doubling, so that sizes share slabs.
    assert len(classes) <= 16 + 8 * 13


def test_slot_bytes_for_declared_size_is_exact_and_for_others_geometric():
    slabs = SlabAllocator(4, 64 * PAGE_BYTES, FIRST_PAGE)
    assert slabs.slot_bytes_for(1) == PAGE_BYTES
    assert slabs.slot_bytes_for(33 * PAGE_BYTES) == 36 * PAGE_BYTES
    slabs.declare(33 * PAGE_BYTES - 100)
    assert slabs.slot_bytes_for(33 * PAGE_BYTES) == 33 * PAGE_BYTES
    assert slabs.slot_bytes_for(32 * PAGE_BYTES + 1) == 33 * PAGE_BYTES
    assert slabs.slot_bytes_for(34 * PAGE_BYTES) == 36 * PAGE_BYTES


def test_slot_bytes_for_a_size_whose_class_exceeds_the_slab_is_the_slab():
    slabs = SlabAllocator(1, 70 * PAGE_BYTES, FIRST_PAGE)
    assert slabs.slot_bytes_for(66 * PAGE_BYTES) == 70 * PAGE_BYTES


def test_allocate_before_a_slab_is_usable_gives_none():
    slabs = SlabAllocator(2, 8 * PAGE_BYTES, FIRST_PAGE)
    assert slabs.allocate(PAGE_BYTES) is None
    slabs.make_usable(1)
    slabs.make_usable(1)
    assert slabs.usable_slabs == slabs.free_slabs == 1
    assert slabs.allocate(8 * PAGE_BYTES) == FIRST_PAGE + 8
    assert slabs.allocate(PAGE_BYTES) is None


def test_free_of_the_last_slot_gives_the_slab_to_any_other_size():
    slabs = SlabAllocator(1, 8 * PAGE_BYTES, FIRST_PAGE)
    slabs.make_usable(0)
    taken = [slabs.allocate(3 * PAGE_BYTES) for _ in range(2)]
    assert slabs.allocate(3 * PAGE_BYTES) is None
    for slot in taken:
        assert slot is not None
        slabs.free(slot)
    assert slabs.classes == {}
    assert slabs.allocate(8 * PAGE_BYTES) == FIRST_PAGE


def test_vacatable_slabs_are_those_whose_slots_fit_elsewhere_emptiest_first():
    slabs = SlabAllocator(3, 4 * PAGE_BYTES, FIRST_PAGE)
    for index in range(3):
        slabs.make_usable(index)
    slots = [slabs.allocate(PAGE_BYTES) for _ in range(12)]
    assert slabs.vacatable(4 * PAGE_BYTES) == []
    by_slab: dict[int, list[int]] = {}
    for slot in slots:
        assert slot is not None
        by_slab.setdefault(slabs.slab_of(slot).index, []).append(slot)
    for slot in [*by_slab[0][:3], *by_slab[1][:2]]:
        slabs.free(slot)
    assert [slab.index for slab in slabs.vacatable(4 * PAGE_BYTES)] == [0, 1, 2]
    assert slabs.vacatable(PAGE_BYTES) == []
    slabs.drain(slabs.slabs[0])
    assert slabs.vacatable(4 * PAGE_BYTES) == []
    moved = slabs.allocate(PAGE_BYTES)
    assert moved is not None
    assert slabs.slab_of(moved).index == 1
    slabs.free(by_slab[0][3])
    assert slabs.allocate(4 * PAGE_BYTES) == FIRST_PAGE


class SlabsAgainstSet(RuleBasedStateMachine):
    """No page is given out twice; whatever was freed can be had again; counts are right."""

    @initialize(slab_pages=st.sampled_from([1, 4, 7, 32]), count=st.integers(1, 12))
    def start(self, slab_pages: int, count: int) -> None:
        self.slab_pages = slab_pages
        self.slabs = SlabAllocator(count, slab_pages * PAGE_BYTES, FIRST_PAGE)
        self.taken: dict[int, int] = {}
        self.slabs.make_usable(0)

    @rule(index=st.integers(0, 11))
    def populate(self, index: int) -> None:
        if index < len(self.slabs.slabs):
            self.slabs.make_usable(index)

    @rule(pages=st.integers(1, 32))
    def declare(self, pages: int) -> None:
        self.slabs.declare(min(pages, self.slab_pages) * PAGE_BYTES)

    @rule(pages=st.integers(1, 32), count=st.integers(1, 8))
    def allocate(self, pages: int, count: int) -> None:
        slot_bytes = self.slabs.slot_bytes_for(min(pages, self.slab_pages) * PAGE_BYTES)
        pages = slot_bytes // PAGE_BYTES
        for _ in range(count):
            slot = self.slabs.allocate(slot_bytes)
            if slot is None:
                # Only when no slab is empty and none of this size has a gap.
                assert not self.slabs.free_slabs
                assert not any(
                    slab.slot_pages == pages and not slab.draining and slab.used < slab.slots
                    for slab in self.slabs.slabs
                )
                return
            slab = self.slabs.slab_of(slot)
            assert slab.usable
            assert not slab.draining
            assert slab.first_page <= slot
            assert slot + pages <= slab.first_page + slab.pages
            for other, length in self.taken.items():
                assert slot + pages <= other or other + length <= slot, f"slots {slot} and {other} overlap"
            self.taken[slot] = pages

    @rule(data=st.data(), count=st.integers(1, 8))
    def free(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.taken))):
            slot = data.draw(st.sampled_from(sorted(self.taken)))
            del self.taken[slot]
            self.slabs.free(slot)

    @precondition(lambda self: self.taken)
    @rule(pages=st.integers(1, 32))
    def vacate(self, pages: int) -> None:
        """Drain a slab and move what is in it, as the store does."""
        for slab in self.slabs.vacatable(pages * PAGE_BYTES)[:1]:
            assert slab.slot_pages != pages
            size = slab.slot_pages
            held = [slot for slot in slab.cut_slots() if slot in self.taken]
            assert len(held) == slab.used
            empty, joined = self.slabs.free_slabs, slab.joined
            self.slabs.drain(slab)
            for _ in held:
                target = self.slabs.allocate(size * PAGE_BYTES)
                assert target is not None, "what is vacatable does not fit"
                assert self.slabs.slab_of(target) is not slab
                self.taken[target] = size
            assert self.slabs.free_slabs == empty, "moving took an empty slab"
            for slot in held:
                del self.taken[slot]
                self.slabs.free(slot)
            assert slab.slot_pages == 0
            assert self.slabs.free_slabs == empty + joined

    @invariant()
    def counts_are_right(self) -> None:
        used = {slab.index: 0 for slab in self.slabs.slabs}
        for slot, pages in self.taken.items():
            slab = self.slabs.slab_of(slot)
            assert slab.slot_pages == pages
            used[slab.index] += 1
        for slab in self.slabs.slabs:
            assert slab.used == used[slab.index]
        empty = [slab.usable and not slab.used and slab.within is None for slab in self.slabs.slabs]
        assert self.slabs.free_slabs == sum(empty)
        assert sum(slab.joined for slab in self.slabs.slabs if slab.within is None) == len(self.slabs.slabs)
        for pages, slots in self.slabs.classes.items():
            assert slots.used_slots == sum(length == pages for length in self.taken.values())
            short = self.slabs.slots_short_of_a_slab(pages * PAGE_BYTES)
            assert short == min(slab.slots for slab in slots.slabs.values()) - slots.free_slots
            assert slots.joined == sum(slab.joined for slab in slots.slabs.values())

    def teardown(self) -> None:
        for slot in list(self.taken):
            self.slabs.free(slot)
        assert not self.slabs.classes
        assert self.slabs.free_slabs == self.slabs.usable_slabs


SlabsAgainstSet.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSlabsAgainstSet = SlabsAgainstSet.TestCase


def test_slab_of_names_the_slab_of_every_page():
    slabs = SlabAllocator(3, 5 * PAGE_BYTES, FIRST_PAGE)
    for index in range(3):
        for page in range(5):
            assert slabs.slab_of(FIRST_PAGE + 5 * index + page).index == index


@pytest.mark.parametrize("pages", [1, 3, 8])
def test_allocate_gives_every_slot_of_a_slab(pages: int):
    slabs = SlabAllocator(1, 8 * PAGE_BYTES, FIRST_PAGE)
    slabs.make_usable(0)
    given = [slabs.allocate(pages * PAGE_BYTES) for _ in range(8 // pages)]
    assert sorted(slot for slot in given if slot is not None) == [
        FIRST_PAGE + index * pages for index in range(8 // pages)
    ]
    assert slabs.allocate(pages * PAGE_BYTES) is None


@pytest.mark.parametrize("pages", range(1, 65))
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "not declared"])
def test_slots_of_any_size_leave_less_than_an_eighth_unused(pages: int, declared: bool):
    """But for what the last slabs leave, and at first where nobody declared the size."""
    slabs = SlabAllocator(80, 64 * PAGE_BYTES, FIRST_PAGE)
    for index in range(80):
        slabs.make_usable(index)
    if declared:
        slabs.declare(pages * PAGE_BYTES)
    pages = slabs.slot_bytes_for(pages * PAGE_BYTES) // PAGE_BYTES
    count = 0
    while slabs.allocate(pages * PAGE_BYTES) is not None:
        count += 1
    assert count * pages >= (80 - 8) * 64 * 7 / 8
    if pages <= 8 or 64 % pages == 0:
        assert all(slab.joined == 1 for slab in slabs.slabs), "slabs are joined where nothing is gained"


def test_slabs_that_are_joined_come_apart_when_they_are_empty():
    slabs = SlabAllocator(4, 8 * PAGE_BYTES, FIRST_PAGE)
    for index in range(4):
        slabs.make_usable(index)
    slabs.declare(5 * PAGE_BYTES)
    taken = [slabs.allocate(5 * PAGE_BYTES) for _ in range(6)]
    assert None not in taken
    assert slabs.free_slabs == 0
    joined = list(slabs.classes[5].slabs.values())
    assert [(slab.joined, slab.slots) for slab in joined] == [(2, 3)] * 2
    assert slabs.classes[5].joined == 4
    for slot in taken:
        assert slot is not None
        assert slabs.slab_of(slot) in joined
        slabs.free(slot)
    assert slabs.free_slabs == 4
    assert [slabs.allocate(8 * PAGE_BYTES) is not None for _ in range(5)] == [True] * 4 + [False]


def test_slabs_that_are_not_adjacent_are_cut_by_themselves():
    slabs = SlabAllocator(5, 8 * PAGE_BYTES, FIRST_PAGE)
    slabs.declare(5 * PAGE_BYTES)
    for index in (0, 2, 4):
        slabs.make_usable(index)
    assert [slabs.allocate(5 * PAGE_BYTES) is not None for _ in range(4)] == [True] * 3 + [False]
    slabs.make_usable(1)
    slabs.make_usable(3)
    assert [slabs.allocate(5 * PAGE_BYTES) is not None for _ in range(3)] == [True] * 2 + [False]
