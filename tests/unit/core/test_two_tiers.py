"""DRAM with the SSD below it: what is retired and when, who keeps the room that was promised, and where that ends."""

from __future__ import annotations

import pytest
from fakes.small_ssd import SmallSsd
from fakes.small_store import PAGE_BYTES, SESSION, SmallStore, key_of
from fakes.two_tiers import TwoTiers

from kvstore.core import namespaces
from kvstore.core.block import Record
from kvstore.core.events import (
    ClearWanted,
    Demoted,
    GrantsReturned,
    InvalidateWanted,
    Joined,
    LeaseWanted,
    PersistWanted,
    SessionClosed,
    SessionOpened,
    SlotWanted,
    SsdChanged,
    Ticked,
)
from kvstore.core.instructions import Count, Demote, Namespaced, Refuse
from kvstore.core.invariants import validate_state
from kvstore.core.ssd_record import SsdState
from kvstore.core.tree import ORPHAN_DEPTH
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace
from kvstore.server.below import Below

STORED = (PutStatus.STORED, Reason.NONE)
DEMOTING = Refuse(PutStatus.THROTTLED, Reason.DEMOTING)


def full() -> TwoTiers:
    """``abcd`` and ``efgh`` fill it; the end of the first chain is retired and has its copy below."""
    tiers = TwoTiers()
    tiers.put("abcd")
    tiers.settle()
    tiers.put("efgh")
    tiers.settle()
    assert tiers.resident() == "abcdefgh"
    assert tiers.retired(clean=True) == "cd"
    return tiers


# ---------------------------------------------------------------- what is retired


def test_what_leaves_next_is_written_below_and_can_be_read_meanwhile():
    tiers = TwoTiers()
    tiers.put("abcd")
    assert tiers.retired() == ""
    tiers.put("efg")
    assert (tiers.retired(clean=False), tiers.below()) == ("d", "")
    assert tiers.hits("abcd") == 4
    tiers.settle()
    assert (tiers.retired(clean=True), tiers.below(), tiers.hits("abcd")) == ("d", "d", 4)


def test_block_with_a_copy_is_clean_at_once():
    tiers = full()
    tiers.touch("abcd")
    assert tiers.retired() == ""
    tiers.executor.apply(Ticked())
    # The tail of the other chain is older now, and has no copy.
    assert (tiers.retired(clean=False), tiers.retired(clean=True)) == ("gh", "")
    tiers.touch("efgh")
    tiers.executor.apply(Ticked())
    assert (tiers.retired(clean=False), tiers.retired(clean=True)) == ("", "cd")


def test_orphan_is_not_worth_writing():
    tiers = TwoTiers()
    tiers.put("x", at="nobody")
    tiers.put("abcdef")
    assert tiers.store.namespaces.by_id[tiers.namespace.id].blocks[key_of("x")].depth == ORPHAN_DEPTH
    assert tiers.retired(clean=True) == "x"
    tiers.settle()
    assert "x" not in tiers.below()


def test_nothing_is_retired_while_the_ssd_cannot_be_written_and_all_may_leave():
    tiers = full()
    tiers.twin.degrade()
    tiers.twin.resume()
    tiers.touch("abcdefgh"[:4])
    tiers.executor.apply(Ticked())
    assert tiers.retired(clean=False) == "gh"
    tiers.executor.apply(SsdChanged(writable=False))
    assert tiers.retired(clean=False) == ""
    assert tiers.put("ij") == [STORED, STORED]
    assert tiers.resident() == "abcdefij"


# ---------------------------------------------------------------- room


def test_slots_are_granted_only_for_room_that_is_free_or_clean():
    tiers = TwoTiers()
    tiers.put("abcd")
    tiers.put("efgh")
    assert tiers.retired(clean=False) == "cd"
    assert tiers.want() == DEMOTING
    tiers.settle()
    assert isinstance(tiers.want(), Record)
    assert isinstance(tiers.want(), Record)
    for _ in range(2):
        assert tiers.want() == DEMOTING, "no more than that is clean"
        tiers.settle()
        assert isinstance(tiers.want(), Record)


def test_slot_ahead_makes_no_room():
    tiers = TwoTiers()
    tiers.put("abcd")
    tiers.put("efgh")
    retired = tiers.retired()
    refused = tiers.executor.want_slot_ahead(SESSION, 100)
    assert (refused, tiers.retired()) == (DEMOTING, retired)


def test_grants_count_against_the_record_limit():
    tiers = TwoTiers(records=4, grant_pages=8)
    tiers.put("abc")
    tiers.settle()
    assert isinstance(tiers.want(), Record)
    for _ in range(2):
        assert tiers.want() == DEMOTING
        tiers.settle()
        assert isinstance(tiers.want(), Record)
    assert tiers.store.granted_count == 3
    tiers.executor.apply(GrantsReturned(SESSION, tuple(tiers.store.sessions[SESSION].grants)))
    assert tiers.store.granted_count == 0
    validate_state(tiers.store)


def test_throttled_reason_is_all_held_where_nothing_is_on_its_way_out():
    tiers = TwoTiers(capacity_pages=4, grant_pages=4)
    tiers.put("abcd")
    tiers.lease("abcd")
    tiers.settle()
    assert tiers.want() == Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)


def test_use_does_not_take_room_that_was_granted():
    tiers = full()
    grants = [tiers.want(), tiers.want()]
    assert all(isinstance(one, Record) for one in grants)
    tiers.touch("abcd")
    assert tiers.retired(clean=True) == "cd", "the copy below is as fresh"
    copy = tiers.namespace.ssd
    assert copy is not None
    assert copy.tree.blocks[key_of("d")].used == tiers.store._access
    tiers.executor.apply(GrantsReturned(SESSION, tuple(tiers.store.sessions[SESSION].grants)))
    tiers.touch("abcd")
    assert tiers.retired() == ""


def test_put_behind_a_block_whose_room_was_granted_finds_its_room():
    tiers = full()
    records = [tiers.record("x", "d"), tiers.record("y", "x")]
    assert tiers.commit(*records) == [STORED, STORED]
    # The block before them left: it is below, so they can be reached.
    assert tiers.resident() == "abcefghxy"[:9].replace("c", "")
    assert tiers.store.namespaces.by_id[1].blocks[key_of("x")].depth == 4
    assert tiers.store.counters.dropped_blocks == 0
    assert len(tiers.namespace.leading_in_tiers([key_of(letter) for letter in "abcdxy"])) == 6
    validate_state(tiers.store)


def test_put_behind_a_block_stays_with_it_where_there_is_room():
    tiers = full()
    record = tiers.record("x", "d")
    tiers.remove("h")
    tiers.remove("g")
    assert tiers.commit(record) == [STORED]
    assert tiers.resident() == "abcdefx"
    assert tiers.retired() == "f", "they are used now, and others leave next"


def test_put_behind_a_block_that_is_being_written_lets_the_one_with_a_copy_above_it_leave():
    tiers = TwoTiers()
    tiers.put("abcd")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("c")]))
    tiers.settle()
    assert tiers.below() == "abc"
    tiers.put("efgh")
    assert (tiers.retired(clean=True), tiers.retired(clean=False)) == ("c", "d")
    assert tiers.commit(tiers.record("x", "d")) == [STORED]
    assert tiers.resident() == "abdefghx"
    assert (tiers.retired(), tiers.store.counters.dropped_blocks) == ("", 0) or "x" not in tiers.retired()
    validate_state(tiers.store)


def test_better_record_of_a_block_whose_room_was_granted_finds_its_room():
    tiers = TwoTiers(namespace=Namespace(name="lossy", codec="kivi4"))
    tiers.put("abcd", fidelity=85)
    tiers.settle()
    tiers.put("efgh")
    tiers.settle()
    assert tiers.retired(clean=True) == "cd"
    records = [tiers.record("d", "c"), tiers.record("c", "b")]
    assert tiers.commit(*records) == [STORED, STORED]
    assert {record.fidelity for block in tiers.blocks("cd") for record in block.parts.values()} == {255}
    assert tiers.store.counters.dropped_blocks == 0
    validate_state(tiers.store)


def test_put_again_of_a_block_that_left_is_there_already():
    tiers = full()
    records = [tiers.record("d", "c"), tiers.record("x", "d")]
    statuses = tiers.commit(*records)
    assert statuses == [(PutStatus.EXISTS, Reason.NONE), STORED]
    validate_state(tiers.store)


def test_lease_brings_blocks_back_whatever_was_granted():
    """Where the promise ends: a lease holds, and what was granted may cost a block that has no copy."""
    tiers = full()
    records = [tiers.record("x"), tiers.record("y", "x")]
    tiers.lease("abcd")
    assert tiers.retired() == ""
    assert tiers.commit(*records) == [STORED, STORED]
    assert set("abcdxy") <= set(tiers.resident())
    assert tiers.store.counters.dropped_blocks == 2
    validate_state(tiers.store)


def test_what_is_there_already_is_so_although_it_leaves_for_another_one():
    tiers = full()
    records = [tiers.record("d", "c"), tiers.record("x", "h")]
    tiers.lease("abc")
    assert tiers.commit(*records) == [(PutStatus.EXISTS, Reason.NONE), STORED]
    assert tiers.resident() == "abcefghx"
    assert "d" in tiers.below()


def test_block_that_is_being_written_does_not_leave_for_a_slot():
    tiers = TwoTiers()
    tiers.put("abcdefgh")
    assert tiers.retired(clean=False) != ""
    assert tiers.store._victim_for_slot(None) is None
    tiers.settle()
    assert tiers.store._victim_for_slot(None) in tiers.store.retired


def test_clean_block_leaves_before_one_that_is_older_and_has_no_copy_yet():
    tiers = full()
    tiers.executor.apply(SlotWanted(SESSION, 3 * PAGE_BYTES))
    assert (tiers.retired(clean=True), tiers.retired(clean=False)) == ("cd", "b")
    assert tiers.put("xy") == [STORED, STORED]
    assert tiers.resident() == "abefghxy"


def test_size_that_has_no_slot_retires_no_more_than_a_slab_at_a_time():
    tiers = TwoTiers(capacity_pages=24, grant_pages=8, ssd_slabs=32)
    tiers.put("abcdefgh")
    tiers.put("ijklmnop")
    tiers.put("qrstuvwx")
    for _ in range(50):
        tiers.executor.apply(SlotWanted(SESSION, 4 * PAGE_BYTES))
    assert tiers.store.retired.slot_bytes <= 3 * 4 * PAGE_BYTES


# ---------------------------------------------------------------- what becomes of copies


def test_better_record_that_took_the_others_place_while_it_was_written_is_written_too():
    tiers = TwoTiers(namespace=Namespace(name="lossy", codec="kivi4"))
    tiers.put("a", fidelity=85)
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("a")]))
    tiers.twin.pump()
    tiers.put("a", fidelity=255)
    tiers.put("bcdefgh")
    tiers.executor.apply(SlotWanted(SESSION, 4 * PAGE_BYTES))
    tiers.touch("bcdefgh")
    assert tiers.retired(clean=False).startswith("a")
    tiers.settle()
    copy = tiers.namespace.ssd
    assert copy is not None
    assert copy.tree.blocks[key_of("a")].parts[0].fidelity == 255
    assert "a" in tiers.retired(clean=True)


def test_block_does_not_wait_for_a_copy_that_left_again():
    tiers = TwoTiers(capacity_pages=8, grant_pages=4, parts=2, ssd_slabs=1, ssd_records=1)
    for letter in "ab":
        for part in (0, 1):
            assert tiers.commit(tiers.record(letter, part=part)) == [STORED]
    for letter in "cd":
        for part in (0, 1):
            assert tiers.commit(tiers.record(letter, part=part)) == [STORED]
    assert tiers.retired(clean=False)
    tiers.settle()
    assert tiers.retired(clean=False) == ""
    assert tiers.twin.ssd.record_count == 1


def test_circle_below_keeps_nobody_waiting():
    tiers = TwoTiers()
    assert tiers.put("b", at="a") == [STORED]
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("b")]))
    tiers.settle()
    assert tiers.below() == "b"
    tiers.executor.apply(SsdChanged(writable=False))
    assert tiers.put("cdefghij") == [STORED] * 8
    assert "b" not in tiers.resident()
    # Nothing leaves for a block that nobody can reach: it needs room that is free.
    tiers.remove("j")
    assert tiers.put("a", at="b") == [STORED]
    (block,) = tiers.blocks("a")
    assert block.parent_key == key_of("b")
    assert tiers.namespace.ssd is not None
    assert tiers.namespace.ssd.tree.blocks[key_of("b")].parent_key == key_of("a"), "a circle through both tiers"
    tiers.executor.apply(SsdChanged(writable=True))
    tiers.settle()
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("a")]))
    assert [one for one in tiers.executor.last if isinstance(one, Demote)], "it is written below"
    tiers.settle()
    assert "a" not in tiers.below(), "where it would close the circle"
    for _ in range(6):
        tiers.executor.apply(SlotWanted(SESSION, 4 * PAGE_BYTES))
        tiers.settle()
    assert tiers.retired(clean=False) == ""


def test_walk_up_a_chain_goes_through_what_is_below_only():
    tiers = TwoTiers()
    tiers.put("abc")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("b")]))
    tiers.settle()
    del tiers.namespace.blocks[key_of("b")]
    walked = [(key, block is not None) for key, block in tiers.namespace.upward(key_of("c"))]
    assert walked == [(key_of("c"), True), (key_of("b"), False), (key_of("a"), True)]


def test_circle_below_ends_the_question_of_what_is_durable():
    tiers = TwoTiers()
    tiers.put("ab")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("b")]))
    tiers.settle()
    assert tiers.namespace.ssd is not None
    tiers.namespace.ssd.tree.blocks[key_of("a")].parent_key = key_of("b")
    tiers.namespace.blocks.clear()
    below = Below.__new__(Below)
    below._store = tiers.store
    assert below._undurable(tiers.namespace.id, [key_of("a"), key_of("b")]) == [False, False]


def test_persist_writes_the_first_blocks_of_a_chain_first_and_each_once():
    tiers = TwoTiers(capacity_pages=16)
    tiers.put("abcd")
    tiers.put("xy", at="b")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of(letter) for letter in "dyxcba"]))
    (demote,) = [one for one in tiers.executor.last if isinstance(one, Demote)]
    order = [record.block.key[:1].decode() for record in demote.records if record.block is not None]
    assert order == list("abcdxy")
    tiers.settle()
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of(letter) for letter in "abcdxy"]))
    assert tiers.executor.last == []


def test_persist_of_a_chain_looks_at_each_block_once(monkeypatch: pytest.MonkeyPatch):
    tiers = TwoTiers(capacity_pages=32, grant_pages=26, ssd_slabs=32)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tiers.put(letters)
    tiers.settle()
    looked = []
    missing = tiers.store.missing_below
    monkeypatch.setattr(tiers.store, "missing_below", lambda block: looked.append(block) or missing(block))
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of(letter) for letter in letters]))
    assert len(looked) == len(letters)


# ---------------------------------------------------------------- removal


def test_removed_while_it_is_written_is_gone_from_both():
    tiers = TwoTiers()
    tiers.put("abcd")
    tiers.put("efgh")
    tiers.twin.pump()
    tiers.remove("d")
    tiers.settle()
    assert ("d" in tiers.resident(), "d" in tiers.below()) == (False, False)


def test_remove_of_a_block_below_leaves_retired_children_alone():
    tiers = full()
    assert tiers.commit(tiers.record("x", "d"), tiers.record("y", "x")) == [STORED, STORED]
    assert "d" not in tiers.resident()
    for block in tiers.blocks("yx"):
        tiers.store.policy.discard(block)
        tiers.store.retired.add(block, {0})
    tiers.remove("d")
    assert tiers.store.policy.next_victim() not in tiers.blocks("xy"), "they are the policy's no more"
    assert tiers.retired(clean=False).endswith("xy")
    validate_state(tiers.store)


def test_invalidate_ends_what_is_below_too():
    tiers = full()
    answer = tiers.executor.apply(InvalidateWanted(tiers.namespace.id, SESSION))
    assert isinstance(answer, Namespaced)
    below = answer.namespace.ssd
    assert below is not None
    assert (below.generation, below.state, below.digest) == (1, answer.namespace.id, answer.namespace.digest)
    assert not below.tree.blocks
    tiers.namespace = answer.namespace
    tiers.settle()
    ssd = tiers.twin.crash(0)
    assert [(space.generation, len(space.tree.blocks)) for space in ssd.namespaces.values()] == [(1, 0)]


def test_clear_counts_blocks_of_both_tiers_once():
    tiers = full()
    tiers.put("xy")
    assert "d" not in tiers.resident()
    answer = tiers.executor.apply(ClearWanted(tiers.namespace.id))
    assert answer == Count(10)
    assert (tiers.resident(), tiers.below()) == ("", "")
    tiers.settle()
    assert not [*tiers.twin.crash(0).blocks()]


# ---------------------------------------------------------------- namespaces


def test_namespaces_whose_last_block_left_the_ssd_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(namespaces, "MOST_IDLE", 0)
    tiers = TwoTiers()
    session = SESSION + 1
    tiers.executor.apply(SessionOpened(session))
    answer = tiers.executor.apply(Joined(Namespace(name="other"), session=session))
    assert isinstance(answer, Namespaced)
    other = answer.namespace
    tiers.namespace, mine = other, tiers.namespace
    tiers.put("a")
    tiers.executor.apply(PersistWanted(other.id, [key_of("a")]))
    tiers.settle()
    tiers.namespace = mine
    tiers.executor.apply(SsdChanged(writable=False))
    tiers.put("bcdefghi")
    assert not other.blocks
    tiers.executor.apply(SessionClosed(session))
    tiers.executor.apply(Ticked())
    assert other.id in tiers.store.namespaces.by_id, "the SSD has a block of it"
    assert other.ssd is not None
    tiers.twin.ssd.evict(other.ssd.tree.blocks[key_of("a")])
    tiers.executor.apply(Ticked())
    assert other.id not in tiers.store.namespaces.by_id
    assert other.ssd.number not in tiers.twin.ssd.namespaces
    validate_state(tiers.store)


def test_given_up_block_may_leave():
    tiers = TwoTiers()
    tiers.put("abcd")
    tiers.put("efgh")
    (d,) = tiers.blocks("d")
    assert tiers.retired(clean=False) == "cd"
    tiers.executor.apply(Demoted([], [d]))
    assert tiers.retired(clean=True) == "d"
    assert all(record.state is not SsdState.STORED for record in tiers.twin.ssd.records.values())


@pytest.mark.parametrize("how", ["remove", "clear"])
def test_what_left_before_it_was_written_and_is_removed_then_never_arrives(how: str):
    tiers = TwoTiers(16, 4, quotas={"small": 2})
    tiers.put("a")
    tiers.put("b")
    assert tiers.want() == DEMOTING
    assert tiers.retired(clean=False) == "a"
    # Slots that were lent for nobody in particular: what is on its way leaves for them at once, and is written still.
    assert tiers.put("c") == [STORED]
    assert tiers.resident() == "bc"
    assert tiers.namespace.ssd is None, "nothing of the namespace is on the SSD yet"
    if how == "remove":
        tiers.remove("a")
    else:
        tiers.clear_all()
    tiers.settle()
    assert "a" not in tiers.below()


def test_copy_of_a_parent_that_comes_below_a_lease_is_no_contradiction():
    small = SmallSsd(4)
    store = SmallStore(4, ssd=small.ssd)
    store.namespace.ssd = small.space
    small.space.state = store.namespace.id
    small.put("b", at="a")
    store.put("a")
    blocks = store.store.leading_in_tiers(store.namespace.id, [key_of("a"), key_of("b")])
    assert len(blocks) == 2
    store.store.handle(LeaseWanted(SESSION, blocks, 10**9), 0)
    small.put("a")
    assert small.block("b").parent is small.block("a")
    validate_state(store.store)
