"""The SSD tier's state: slots, groups, what leaves, what is said in the log, and what a restart makes of that."""

from __future__ import annotations

import pytest
from fakes.small_ssd import DESCRIPTION, SmallSsd
from fakes.small_store import key_of

from kvstore.core import ssd as module
from kvstore.core.ssd_invariants import validate_ssd
from kvstore.core.ssd_record import SsdState
from kvstore.core.tree import ORPHAN_DEPTH
from kvstore.errors import InvalidTransition
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_log import EmptyEntry, Entry, FreeEntry, NamespaceEntry, PutEntry, TouchEntry
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace

OTHER = Namespace(name="other").canonical()


def kinds(entries: list[Entry]) -> list[str]:
    return [type(entry).__name__.removesuffix("Entry").lower() for entry in entries]


# ---------------------------------------------------------------- groups


def test_record_can_be_found_only_once_its_group_is_durable():
    tier = SmallSsd()
    record = tier.must_begin("a")
    assert (record.state, tier.stored(), tier.ssd.writing_bytes) == (SsdState.WRITING, "", PAGE_BYTES)
    group = tier.begin_group(record)
    assert (record.state, tier.stored()) == (SsdState.WRITING, "")
    assert not tier.ssd.holds(tier.space, key_of("a"), 0, 0)
    assert tier.end_group(group, record) == [record]
    assert (record.state, tier.stored()) == (SsdState.STORED, "a")
    assert tier.ssd.holds(tier.space, key_of("a"), 0, 255)
    assert not tier.ssd.holds(tier.space, key_of("a"), 1, 0)
    assert not tier.ssd.holds(None, key_of("a"), 0, 0)
    assert (tier.ssd.writing_bytes, tier.ssd.resident_bytes, tier.ssd.record_bytes) == (0, PAGE_BYTES, PAGE_BYTES - 10)


def test_frame_says_namespaces_then_ends_then_puts_then_touches():
    tier = SmallSsd()
    (a, b) = tier.put("ab")
    tier.ssd.remove(tier.block("b"))
    tier.ssd.touch(tier.block("a"), 50)
    other = tier.ssd.namespace(OTHER, 3)
    c = tier.begin("c", space=other)
    d = tier.must_begin("d")
    assert c is not None
    entries = tier.commit(c, d)
    assert kinds(entries) == ["namespace", "free", "put", "put", "touch"]
    assert entries[0] == NamespaceEntry(other.number, 3, OTHER)
    assert entries[1] == FreeEntry(b.slot)
    assert [entry.key for entry in entries if isinstance(entry, PutEntry)] == [key_of("c"), key_of("d")]
    assert entries[4] == TouchEntry(a.slot, 50)
    assert kinds(tier.commit(tier.must_begin("e"))) == ["put"], "a namespace or touch is said once"


def test_put_entry_says_all_of_a_record():
    tier = SmallSsd()
    record = tier.must_begin("b", "a", part=3, pages=2, fidelity=85)
    record.codec, record.checksum, record.token_count, record.home_bytes = 7, 99, 64, 3 * PAGE_BYTES
    entry = tier.commit(record)[-1]
    access = tier.access
    assert entry == PutEntry(
        85, 7, 3, 1, 2, 64, 3, record.slot, 2 * PAGE_BYTES - 10, 99, access, key_of("b"), key_of("a")
    )
    (found,) = tier.restarted().ssd.records.values()
    for name in ("part", "fidelity", "codec", "checksum", "token_count", "home_bytes", "record_bytes", "slot_bytes"):
        assert getattr(found, name) == getattr(record, name), name
    assert (found.key, found.parent_key, found.slot) == (record.key, record.parent_key, record.slot)


def test_positions_tell_which_group_says_what_happened():
    tier = SmallSsd()
    assert tier.ssd.position == tier.ssd.synced == 0
    tier.put("ab")
    assert tier.ssd.position == tier.ssd.synced == 1
    tier.ssd.remove(tier.block("b"))
    position = tier.ssd.position
    assert position == 2
    group = tier.begin_group()
    assert tier.ssd.position == position, "it is in the group that is on its way"
    tier.ssd.remove(tier.block("a"))
    assert tier.ssd.position == 3
    tier.end_group(group)
    assert (tier.ssd.synced, tier.ssd.something_to_log) == (position, True)
    tier.commit()
    assert (tier.ssd.synced, tier.ssd.something_to_log) == (3, False)


def test_more_ends_than_a_frame_says_take_several(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_FREES", 3)
    tier = SmallSsd(slabs=4, slab_pages=4)
    tier.put("abcdefgh")
    for letter in "abcdefgh":
        tier.ssd.remove_key(tier.space, key_of(letter))
    position = tier.ssd.position
    assert position == tier.ssd.synced + 3
    assert [len(tier.commit()) for _ in range(3)] == [3, 3, 2]
    assert (tier.ssd.synced, tier.ssd.something_to_log, len(tier.ssd.records)) == (position, False, 0)


# ---------------------------------------------------------------- slots


def test_slot_is_used_again_only_when_its_end_is_durable():
    tier = SmallSsd(slabs=1, slab_pages=2)
    tier.ssd.growing = True
    (a, b) = tier.put("ab")
    tier.ssd.remove(tier.block("b"))
    assert (b.state, tier.begin("c")) == (SsdState.LEAVING, None)
    group = tier.begin_group()
    assert tier.begin("c") is None, "the frame is not durable yet"
    tier.end_group(group)
    assert b.state is SsdState.FREE
    assert tier.must_begin("c").slot == b.slot
    assert a.state is SsdState.STORED


def test_slot_is_not_used_again_while_it_is_read():
    tier = SmallSsd(slabs=1, slab_pages=1)
    (a,) = tier.put("a")
    tier.ssd.hold(a)
    tier.ssd.hold(a)
    tier.ssd.remove(tier.block("a"))
    tier.commit()
    assert (a.state, tier.begin("b")) == (SsdState.LEAVING, None)
    tier.ssd.let_go(a)
    assert a.state is SsdState.LEAVING
    tier.ssd.let_go(a)
    assert a.state is SsdState.FREE
    assert tier.must_begin("b").slot == a.slot


def test_record_that_was_never_logged_gives_its_slot_back_when_it_is_written():
    tier = SmallSsd(slabs=1, slab_pages=1)
    a = tier.must_begin("a")
    tier.ssd.fail(a)
    assert (a.state, tier.ssd.something_to_log) == (SsdState.LEAVING, False)
    tier.ssd.written(a)
    assert a.state is SsdState.FREE
    tier.must_begin("a")


def test_record_removed_while_it_is_written_never_appears():
    tier = SmallSsd()
    a = tier.must_begin("a")
    assert not tier.ssd.remove_key(tier.space, key_of("a"))
    assert tier.commit(a) == []
    assert (tier.stored(), a.state, len(tier.ssd.records)) == ("", SsdState.FREE, 0)


def test_record_removed_while_its_group_is_logged_never_appears_and_its_end_is_said():
    tier = SmallSsd()
    a = tier.must_begin("a")
    group = tier.begin_group(a)
    tier.ssd.remove_key(tier.space, key_of("a"))
    position = tier.ssd.position
    assert position == 2, "this group says the opposite"
    assert tier.end_group(group, a) == []
    assert (tier.stored(), a.state) == ("", SsdState.LEAVING)
    assert tier.restarted().stored() == "a", "nobody was told that it is removed"
    assert tier.commit() == [FreeEntry(a.slot)]
    assert a.state is SsdState.FREE
    assert tier.restarted().stored() == ""


def test_group_that_fails_ends_its_records_and_says_everything_again():
    tier = SmallSsd(slabs=1, slab_pages=4)
    tier.ssd.growing = True
    (a, b) = tier.put("ab")
    tier.ssd.remove(tier.block("b"))
    other = tier.ssd.namespace(OTHER, 0)
    c = tier.begin("c", space=other)
    assert c is not None
    group = tier.begin_group(c)
    tier.fail_group(group, c)
    assert (c.state, b.state, tier.stored(), tier.stored(other)) == (SsdState.LEAVING, SsdState.LEAVING, "a", "")
    entries = tier.commit()
    assert entries[0] == NamespaceEntry(other.number, 0, OTHER)
    assert set(entries[1:]) == {FreeEntry(b.slot), FreeEntry(c.slot)}
    assert (c.state, b.state, a.state) == (SsdState.FREE, SsdState.FREE, SsdState.STORED)
    d = tier.begin("d", space=other)
    assert d is not None
    assert kinds(tier.commit(d)) == ["put"]


def test_group_that_fails_says_cleared_namespaces_again():
    tier = SmallSsd()
    tier.put("ab")
    assert tier.ssd.empty(tier.space) == 2
    group = tier.begin_group()
    assert group.entries == [EmptyEntry(1)]
    tier.fail_group(group)
    assert (tier.ssd.something_to_log, tier.ssd.leaving_bytes) == (True, 2 * PAGE_BYTES)
    c = tier.must_begin("c")
    entries = tier.commit(c)
    assert kinds(entries) == ["empty", "put"]
    assert (tier.stored(), tier.ssd.leaving_bytes, tier.restarted().stored()) == ("c", 0, "c")


def test_transitions_that_must_never_happen_are_errors():
    tier = SmallSsd()
    (a,) = tier.put("a")
    with pytest.raises(InvalidTransition, match="STORED -> STORED must never happen"):
        tier.ssd._change(a, SsdState.STORED)


# ---------------------------------------------------------------- blocks


def test_better_record_takes_the_place_of_a_worse_one():
    tier = SmallSsd()
    (worse,) = tier.put("a", fidelity=85)
    assert not tier.ssd.holds(tier.space, key_of("a"), 0, 255)
    (better,) = tier.put("a", fidelity=255)
    assert (worse.state, better.state) == (SsdState.LEAVING, SsdState.STORED)
    assert tier.block("a").parts == {0: better}
    assert tier.restarted().block("a").parts[0].slot == better.slot
    assert tier.commit() == [FreeEntry(worse.slot)]
    assert tier.restarted().block("a").parts[0].slot == better.slot


def test_parts_of_a_block_leave_together_and_come_alone():
    tier = SmallSsd()
    first, second = tier.must_begin("a", part=0), tier.must_begin("a", part=1, pages=2)
    tier.commit(first)
    tier.commit(second)
    assert tier.block("a").slot_bytes == 3 * PAGE_BYTES
    tier.ssd.evict(tier.block("a"))
    assert {entry.slot for entry in tier.commit() if isinstance(entry, FreeEntry)} == {first.slot, second.slot}
    assert (tier.ssd.counters.evicted_blocks, tier.ssd.counters.evicted_bytes) == (1, 3 * PAGE_BYTES)


def test_same_key_behind_another_block_is_the_later_ones():
    tier = SmallSsd()
    (a, b) = tier.put("ab")
    again = tier.must_begin("b", "")
    ended = tier.end_group(tier.begin_group(again), again)
    assert ended == [again]
    assert (again.state, b.state, a.state) == (SsdState.STORED, SsdState.LEAVING, SsdState.STORED)
    assert tier.block("b").parent_key == ROOT_KEY
    assert tier.restarted().block("b").parts[0].slot == again.slot


def test_parts_of_a_key_behind_another_block_are_over_with_it_after_a_crash_too():
    tier = SmallSsd()
    tier.put("a")
    parts = [tier.must_begin("b", "a", part=part) for part in (0, 1)]
    tier.commit(*parts)
    again = tier.must_begin("b", "", part=0)
    tier.commit(again)
    assert tier.restarted().block("b").parts.keys() == {0}, "the end of the other part is not in the log yet"
    assert tier.restarted().block("b").parent_key == ROOT_KEY


def test_circle_of_parents_is_refused_and_nobody_waits_for_it():
    tier = SmallSsd()
    tier.put("b", at="a")
    closing = tier.must_begin("a", "b")
    assert tier.end_group(tier.begin_group(closing), closing) == [closing]
    assert (closing.state, tier.stored()) == (SsdState.LEAVING, "b")
    itself = tier.must_begin("c", "c")
    tier.commit(itself)
    assert tier.stored() == "b"
    assert tier.restarted().stored() == "b"
    tier.commit()
    assert (itself.state, closing.state) == (SsdState.FREE, SsdState.FREE)


def test_children_adopted_late_are_as_deep_as_their_parent_says():
    tier = SmallSsd()
    record = tier.must_begin("b", "a")
    record.depth = 7
    tier.commit(record)
    assert tier.block("b").depth == 7, "its parent is in memory"
    tier.put("a")
    assert (tier.block("b").depth, tier.block("b").parent) == (1, tier.block("a"))
    tier.ssd.remove(tier.block("a"))
    assert (tier.block("b").depth, tier.block("b").parent) == (1, None)


def test_corrupt_record_is_over_and_its_block_with_the_last_one():
    tier = SmallSsd()
    parts = [tier.must_begin("a", part=part) for part in (0, 1)]
    tier.commit(*parts)
    tier.ssd.corrupt(parts[0])
    assert tier.block("a").parts == {1: parts[1]}
    tier.ssd.corrupt(parts[0])
    tier.ssd.corrupt(parts[1])
    assert (tier.stored(), tier.ssd.counters.corrupt_records) == ("", 2)
    assert kinds(tier.commit()) == ["free", "free"]


# ---------------------------------------------------------------- namespaces


def test_cleared_namespace_says_one_entry_whatever_it_held():
    tier = SmallSsd()
    records = tier.put("abcd")
    writing = tier.must_begin("e")
    assert tier.ssd.empty(tier.space) == 4
    assert (tier.stored(), tier.ssd.counters.removed_blocks) == ("", 4)
    assert tier.commit(writing) == [EmptyEntry(1)]
    assert {record.state for record in (*records, writing)} == {SsdState.FREE}
    assert tier.ssd.empty(tier.space) == 0
    assert not tier.ssd.something_to_log


def test_clear_ends_what_the_group_on_its_way_puts():
    tier = SmallSsd()
    a = tier.must_begin("a")
    group = tier.begin_group(a)
    assert tier.ssd.empty(tier.space) == 0
    tier.end_group(group, a)
    assert kinds(tier.commit()) == ["empty", "free"]
    assert (tier.restarted().stored(), a.state) == ("", SsdState.FREE)


def test_records_that_left_before_a_clear_are_freed_by_either_entry():
    tier = SmallSsd()
    tier.put("ab")
    tier.ssd.remove(tier.block("b"))
    tier.ssd.empty(tier.space)
    assert sorted(kinds(tier.commit())) == ["empty", "free"]
    assert not tier.ssd.records


def test_later_generation_begins_empty_and_has_another_digest():
    tier = SmallSsd()
    tier.put("ab")
    digest = tier.space.digest
    tier.ssd.advance(tier.space, 5)
    assert (tier.stored(), tier.space.generation) == ("", 5)
    assert tier.space.digest != digest
    assert tier.commit(tier.must_begin("c"))[0] == NamespaceEntry(1, 5, DESCRIPTION)
    again = tier.restarted()
    assert (again.stored(), again.space.generation, again.space.digest) == ("c", 5, tier.space.digest)


def test_later_generation_of_a_namespace_that_the_log_does_not_know_is_said_with_its_first_put():
    tier = SmallSsd()
    tier.ssd.advance(tier.space, 2)
    assert not tier.ssd.something_to_log
    assert tier.commit(tier.must_begin("a"))[0] == NamespaceEntry(1, 2, DESCRIPTION)


def test_namespaces_of_which_nothing_is_left_are_told():
    tier = SmallSsd()
    a = tier.must_begin("a")
    assert tier.ssd.take_emptied() == []
    tier.ssd.fail(a)
    assert tier.ssd.take_emptied() == [tier.space]
    tier.ssd.written(a)
    tier.put("ab")
    tier.ssd.evict(tier.block("b"))
    assert tier.ssd.take_emptied() == []
    tier.ssd.evict(tier.block("a"))
    assert tier.ssd.take_emptied() == [tier.space]
    assert tier.ssd.take_emptied() == []


# ---------------------------------------------------------------- room


def test_full_tier_evicts_the_least_recently_used_leaf_and_keeps_slots_ahead():
    tier = SmallSsd(slabs=8, slab_pages=4)
    tier.put("abcdefgh")
    tier.put("ijklmnop")
    tier.put("qrstuvwx")
    assert tier.ssd.counters.evicted_blocks == 0
    records = [tier.must_begin(letter) for letter in "01234"]
    # 32 slots, 29 of them taken: four are kept ahead.
    assert tier.stored() == "abcdefgijklmnopqrstuvwx"
    tier.commit(*records)
    assert tier.ssd.counters.evicted_blocks == 1


def test_room_is_made_once_and_not_at_each_try():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.put("abcdefgh")
    for _ in range(9):
        assert tier.begin("x") is None
        assert tier.ssd.counters.evicted_blocks == 1
    tier.commit()
    assert tier.begin("x") is not None


def test_slabs_of_another_size_are_emptied_once_and_not_at_each_try():
    tier = SmallSsd(slabs=4, slab_pages=4)
    tier.put("abcd")
    tier.put("efgh")
    tier.put("ijkl")
    tier.put("mnop")
    evicted = tier.ssd.counters.evicted_blocks
    for _ in range(9):
        assert tier.begin("x", pages=4) is None
    # A slab's worth has to leave before a slab is emptied: at most two slabs of four.
    assert tier.ssd.counters.evicted_blocks - evicted <= 8
    tier.commit()
    assert tier.begin("x", pages=4) is not None
    assert tier.ssd.counters.evicted_blocks - evicted <= 8


def test_nothing_leaves_while_slabs_are_still_to_come():
    tier = SmallSsd(slabs=1, slab_pages=2)
    tier.ssd.growing = True
    tier.put("ab")
    assert tier.begin("c") is None
    assert (tier.ssd.counters.evicted_blocks, tier.ssd.counters.no_room, tier.ssd.scarce) == (0, 1, False)
    tier.ssd.growing = False
    assert tier.begin("c") is None
    assert (tier.ssd.counters.evicted_blocks, tier.ssd.scarce) == (1, True)


def test_slots_ahead_are_a_share_of_the_slabs_that_are_there():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.ssd.slabs.slabs += SmallSsd(slabs=100)._allocator().slabs[2:]
    tier.put("abcdefg")
    tier.begin("h")
    assert tier.ssd.counters.evicted_blocks == 1, "slabs that will never come count"


def test_leased_blocks_do_not_leave_for_others_of_any_size():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.put("abcdefgh")
    tier.commit()
    for letter in tier.stored():
        tier.block(letter).leases = 1
    before = tier.stored()
    for pages in (1, 2, 4):
        for _ in range(5):
            assert tier.begin("y", pages=pages) is None
        tier.commit()
    assert tier.stored() == before


def test_slab_with_a_leased_block_is_not_emptied():
    tier = SmallSsd(slabs=3, slab_pages=4)
    tier.put("abcd")
    tier.put("efgh")
    tier.put("ijkl")
    tier.commit()
    tier.block("e").leases = tier.block("a").leases = 1
    for _ in range(20):
        if tier.begin("x", pages=4) is not None:
            break
        tier.commit()
    else:
        pytest.fail("no slab was ever emptied")
    assert set("ae") <= set(tier.stored())


def test_slab_with_a_record_that_is_being_written_is_not_emptied():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.put("abcd")
    writing = tier.must_begin("w")
    tier.put("efg")
    for letter in "efg":
        tier.ssd.remove_key(tier.space, key_of(letter))
    tier.commit()
    # The emptiest slab is that of the record on its way.
    assert tier.begin("x", pages=4) is None
    assert not tier.ssd.slabs.slab_of(writing.slot).draining
    assert (tier.stored(), tier.ssd.slabs.draining_slabs) == ("", 1)
    tier.commit()
    assert tier.begin("x", pages=4) is not None
    tier.commit(writing)
    assert tier.stored() == "w"


def test_record_limit_holds_and_room_for_records_is_made_ahead():
    tier = SmallSsd(slabs=16, slab_pages=4, records=16)
    tier.put("abcdefgh")
    tier.put("ijklmn")
    assert tier.ssd.counters.evicted_blocks == 0
    tier.must_begin("o")
    tier.must_begin("p")
    assert tier.ssd.counters.evicted_blocks > 0
    evicted = tier.ssd.counters.evicted_blocks
    for _ in range(9):
        assert tier.begin("q") is None
    assert tier.ssd.counters.evicted_blocks <= max(evicted, 2), "a record leaves at each try"
    tier.commit()
    assert tier.begin("q") is not None
    assert tier.begin("r") is not None


def test_what_leaves_for_others_is_told():
    tier = SmallSsd(slabs=1, slab_pages=2)
    told: list[tuple[bytes, int]] = []
    tier.ssd.on_evicted = lambda key, used: told.append((key, used))
    tier.put("ab")
    tier.begin("c")
    assert told == [(key_of("b"), 2)]


# ---------------------------------------------------------------- use


def test_touch_keeps_a_chain_and_is_said_once():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.put("abc")
    tier.put("de")
    tier.ssd.touch(tier.block("c"), 40)
    tier.ssd.touch(tier.block("c"), 39)
    assert (tier.block("c").used, tier.ssd.access) == (40, 40)
    group = tier.begin_group()
    assert group.entries == [TouchEntry(tier.block("c").parts[0].slot, 40)]
    tier.end_group(group)
    again = tier.restarted()
    assert (again.ssd.access, again.block("c").used) == (40, 40)
    for one in (tier, again):
        assert one.ssd.policy.next_victim() is one.block("e")


def test_touches_that_are_too_many_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_TOUCHES", 1)
    tier = SmallSsd()
    a, b = tier.put("ab")
    tier.ssd.touch(tier.block("a"), 40)
    tier.ssd.touch(tier.block("b"), 41)
    tier.ssd.touch(tier.block("a"), 42)
    assert tier.commit() == [TouchEntry(a.slot, 42)]
    assert (tier.block("b").used, tier.ssd.access) == (41, 42)
    assert b.state is SsdState.STORED


def test_touch_of_a_block_that_left_is_not_said():
    tier = SmallSsd()
    tier.put("a")
    tier.ssd.touch(tier.block("a"), 40)
    tier.ssd.remove(tier.block("a"))
    assert kinds(tier.commit()) == ["free"]


def test_use_of_a_block_with_parts_survives_a_restart():
    tier = SmallSsd()
    tier.commit(*[tier.must_begin("a", part=part) for part in (0, 1)])
    tier.put("b")
    tier.ssd.touch(tier.block("a"), 40)
    tier.commit()
    again = tier.restarted()
    assert again.block("a").used == 40
    assert again.ssd.policy.next_victim() is again.block("b")


# ---------------------------------------------------------------- restarts


def test_restart_finds_what_was_stored_and_its_free_slots():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.put("abc")
    tier.put("d", at="a", pages=2)
    tier.ssd.remove(tier.block("c"))
    tier.commit()
    again = tier.restarted()
    assert again.stored() == "abd"
    assert again.block("d").parent is again.block("a")
    assert [again.block(letter).depth for letter in "abd"] == [0, 1, 1]
    taken = {record.slot for record in again.ssd.records.values()}
    fresh = [again.begin(letter) for letter in "xy"]
    assert all(record is not None and record.slot not in taken for record in fresh)
    assert again.ssd.namespace(OTHER, 0).number == 2


def test_restart_orders_blocks_by_last_use_whatever_came_first():
    tier = SmallSsd(slabs=2, slab_pages=4)
    tier.put("a")
    tier.put("b")
    tier.put("c")
    tier.ssd.touch(tier.block("a"), 99)
    tier.commit()
    again = tier.restarted()
    order = []
    while (victim := again.ssd.policy.next_victim()) is not None:
        order.append(victim.key[:1])  # type: ignore[attr-defined]
        again.ssd.evict(victim)  # type: ignore[arg-type]
    assert order == [b"b", b"c", b"a"]


def test_restart_takes_the_later_of_two_namespaces_of_a_description():
    tier = SmallSsd()
    tier.put("a")
    tier.put("bc")
    puts = [entry._replace(namespace=2) for entry in tier.logged[1] if isinstance(entry, PutEntry)]
    tier.logged[1] = [NamespaceEntry(2, 0, DESCRIPTION), *puts]
    again = tier.restarted()
    assert (again.stored(), list(again.ssd.namespaces)) == ("bc", [2])
    assert kinds(again.commit()) == ["free"]
    assert again.restarted().stored() == "bc"


def test_restart_forgets_namespaces_of_which_nothing_is_left_unless_they_are_in_a_later_generation():
    tier = SmallSsd()
    tier.put("a")
    tier.ssd.remove(tier.block("a"))
    tier.commit()
    other = tier.ssd.namespace(OTHER, 0)
    tier.ssd.advance(other, 1)
    b = tier.begin("b", space=other)
    assert b is not None
    tier.commit(b)
    tier.ssd.empty(other)
    tier.commit()
    again = tier.restarted()
    assert [space.description for space in again.ssd.namespaces.values() if space.told] == [OTHER]
    assert again.ssd.namespace(Namespace(name="third").canonical(), 0).number > other.number


def test_restart_with_more_namespaces_than_may_be_keeps_those_used_last():
    tier = SmallSsd(slabs=8)
    spaces = [tier.ssd.namespace(Namespace(name=f"n{number}").canonical(), 0) for number in range(5)]
    for space in spaces:
        record = tier.begin("a", space=space)
        assert record is not None
        tier.commit(record)
    tier.ssd.touch(spaces[0].tree.blocks[key_of("a")], 99)
    kept = tier.ssd.restored_namespaces(2)
    assert {space.number for space in kept} == {spaces[0].number, spaces[4].number}
    validate_ssd(tier.ssd)
    tier.commit()
    assert tier.restarted().ssd.record_count == 2


def test_restart_drops_a_circle_and_says_so():
    tier = SmallSsd()
    tier.put("abc")
    entries = tier.logged[0]
    put = next(entry for entry in entries if isinstance(entry, PutEntry) and entry.key == key_of("a"))
    entries[entries.index(put)] = put._replace(parent_key=key_of("c"))
    again = tier.restarted()
    assert (again.stored(), kinds(again.commit())) == ("", ["free", "free", "free"])
    assert again.restarted().stored() == ""


def test_snapshot_says_what_a_restart_needs():
    tier = SmallSsd()
    tier.put("abc")
    tier.put("a", fidelity=255)
    tier.ssd.touch(tier.block("c"), 70)
    untold = tier.ssd.namespace(OTHER, 0)
    tier.must_begin("x")
    namespaces, records = tier.ssd.snapshot()
    assert namespaces == [NamespaceEntry(1, 0, DESCRIPTION)]
    assert untold.logged_generation == -1
    assert [record.key[:1] for record, _ in records] == [b"a", b"b", b"c"] or records[-1][1] == 70
    assert [used for _, used in records] == sorted(used for _, used in records)
    other = SmallSsd()
    other.logged = [[*namespaces, *(tier.ssd.put_entry(record, used) for record, used in records)]]
    again = other.restarted()
    assert again.stored() == "abc"
    assert again.block("c").used == 70
    assert again.block("c").depth == 2 < ORPHAN_DEPTH


def test_snapshot_says_of_namespaces_what_the_log_has_durably():
    tier = SmallSsd()
    tier.put("a")
    tier.ssd.advance(tier.space, 1)
    old = NamespaceEntry(1, 0, DESCRIPTION)
    assert tier.ssd.snapshot() == ([old], [])
    group = tier.begin_group()
    assert tier.ssd.snapshot() == ([old], []), "whether the later generation will be in the log is not known"
    tier.end_group(group)
    assert tier.ssd.snapshot() == ([NamespaceEntry(1, 1, DESCRIPTION)], [])
    new = tier.ssd.namespace(OTHER, 4)
    record = tier.begin("b", space=new)
    assert record is not None
    group = tier.begin_group(record)
    assert tier.ssd.snapshot()[0] == [NamespaceEntry(1, 1, DESCRIPTION)]
    tier.end_group(group, record)
    assert tier.ssd.snapshot()[0][1:] == [NamespaceEntry(2, 4, OTHER)]
