"""Blocks on their way out of DRAM: their order, their counts, their place in the tree, and who comes back."""

from __future__ import annotations

from fakes.small_ssd import SmallSsd
from fakes.small_store import SmallStore

from kvstore.core.block import Block
from kvstore.core.retired import Retired
from kvstore.core.tree import ORPHAN_DEPTH

PAGE_BYTES = 4096


def retired(store: SmallStore, letters: str, parts: set[int] | None = None) -> list[Block]:
    """Retire blocks in this order."""
    blocks = store.blocks(letters)
    for block in blocks:
        store.store.policy.discard(block)
        store.store.retired.add(block, {0} if parts is None else set(parts))
    return blocks


def names(blocks: Retired) -> str:
    return "".join(block.key[:1].decode() for block in blocks.all())


def test_retired_blocks_are_counted_and_no_children_any_more():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("abc")
    queue = store.store.retired
    a, b, c = store.blocks("abc")
    retired(store, "cb")
    assert (len(queue), queue.slot_bytes, queue.records, queue.clean_bytes) == (2, 2 * PAGE_BYTES, 2, 0)
    assert c in queue
    assert a not in queue
    assert (a.children, b.parent, c.parent) == (set(), a, b)
    assert store.hits("abc") == 3, "they can still be read"


def test_clean_blocks_leave_first_in_the_order_in_which_they_became_clean():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("abcd")
    queue = store.store.retired
    d, c, b = retired(store, "dcb")
    assert queue.first() is d
    queue.clean(c)
    queue.clean(b)
    queue.clean(c)
    assert (queue.first(), queue.is_clean(c), queue.is_clean(d)) == (c, True, False)
    assert (queue.clean_bytes, queue.clean_records) == (2 * PAGE_BYTES, 2)
    queue.take(c)
    assert (queue.first(), queue.clean_bytes, queue.clean_records, queue.records) == (b, PAGE_BYTES, 1, 2)
    queue.clean_all()
    assert (queue.is_clean(d), queue.clean_bytes) == (True, 2 * PAGE_BYTES)


def test_block_is_clean_once_each_part_that_it_waits_for_was_stored():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("ab")
    queue = store.store.retired
    (b,) = retired(store, "b", {0, 2})
    queue.stored(b, 1)
    queue.stored(b, 0)
    assert not queue.is_clean(b)
    queue.stored(b, 0)
    assert not queue.is_clean(b)
    queue.stored(b, 2)
    assert queue.is_clean(b)
    queue.stored(b, 2)
    (a,) = store.blocks("a")
    queue.stored(a, 0)
    assert a not in queue
    retired(store, "a", set())
    assert queue.is_clean(a), "it waits for nothing"


def test_block_that_comes_back_is_its_parents_child_again():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("abc")
    queue = store.store.retired
    a, b, c = store.blocks("abc")
    retired(store, "cb")
    queue.clean(b)
    assert queue.clean_above(c) == (PAGE_BYTES, 1)
    assert queue.clean_above(a) == (0, 0)
    queue.take(b)
    assert (a.children, b.retired, b.children) == ({b}, False, set())
    queue.take(c)
    assert (b.children, len(queue), queue.slot_bytes) == ({c}, 0, 0)


def test_children_of_a_block_that_leaves_wait_for_it():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("abc")
    store.put("d", at="b")
    queue = store.store.retired
    retired(store, "c")
    c, d = store.blocks("cd")
    store.remove("b")
    assert store.namespace.orphans == {b"b".ljust(32, b"_"): {c, d}}
    assert (c.parent, d.parent, c.depth) == (None, None, 2)
    assert names(queue) == "c"
    store.remove("cd")
    assert (store.namespace.orphans, len(queue)) == ({}, 0)


def test_blocks_that_wait_for_a_parent_are_not_its_children_when_it_comes():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("abcd")
    queue = store.store.retired
    retired(store, "dc")
    store.remove("b")
    store.put("x")
    store.put("b", at="x")
    (b, c, d) = store.blocks("bcd")
    assert (b.children or set(), c.parent, d.parent) == (set(), b, c)
    assert [block.depth for block in (b, c, d)] == [1, 2, 3]
    queue.take(c)
    assert b.children == {c}


def test_blocks_below_children_of_an_adopted_block_are_as_deep_as_it_says():
    store = SmallStore(ssd=SmallSsd().ssd)
    store.put("bcd", at="a")
    assert [block.depth for block in store.blocks("bcd")] == [ORPHAN_DEPTH, ORPHAN_DEPTH + 1, ORPHAN_DEPTH + 2]
    retired(store, "d")
    store.put("a")
    assert [block.depth for block in store.blocks("abcd")] == [0, 1, 2, 3]
