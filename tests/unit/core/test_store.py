"""Single rules of the store, each by a short story. All of them together: ``tests/property/test_store_model.py``."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from fakes.small_store import FIRST_PAGE, PAGE_BYTES, SESSION, SmallStore, key_of

from kvstore.core.block import Record, runs_of
from kvstore.core.events import (
    Accessed,
    ClearWanted,
    Committed,
    CommittedRecord,
    Displaced,
    FoundCorrupt,
    GrantsReturned,
    InvalidateWanted,
    Joined,
    LeaseReleased,
    LeasesEnded,
    LeaseWanted,
    Quiesced,
    RemoveWanted,
    SessionClosed,
    SessionOpened,
    SlabPopulated,
    Ticked,
)
from kvstore.core.granting import LIMBO_PATIENCE_NS
from kvstore.core.instructions import Answer, Count, EndNamespace, Leased, Namespaced, Publish, Refuse, Withdraw
from kvstore.core.invariants import validate_state
from kvstore.core.slabs import SlabAllocator
from kvstore.core.state import ACCESS_IDS, StoreLimits
from kvstore.core.store import Store
from kvstore.errors import InvalidArgument, InvalidTransition
from kvstore.policy.lru import Lru
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

STORED = (PutStatus.STORED, Reason.NONE)
EXISTS = (PutStatus.EXISTS, Reason.NONE)
NO_ROOM = (PutStatus.REJECTED, Reason.NO_ROOM)
ALL_HELD = (PutStatus.THROTTLED, Reason.ALL_HELD)


# ---------------------------------------------------------------- commits


def test_commit_present_key_keeps_the_old_record():
    small = SmallStore()
    assert small.put("a") == [STORED]
    (before,) = small.blocks("a")
    slot = before.parts[0].slot
    assert small.put("a") == [EXISTS]
    assert small.blocks("a")[0].parts[0].slot == slot
    assert small.store.granted_bytes == 0


def test_commit_orphan_is_adopted_when_its_parent_arrives():
    small = SmallStore()
    small.put("b", at="a")
    assert small.hits("ab") == 0
    small.put("a")
    assert small.hits("ab") == 2
    validate_state(small.store)


def test_commit_circle_of_parents_is_refused():
    small = SmallStore()
    small.put("b", at="a")
    small.put("c", at="b")
    assert small.put("a", at="c") == [(PutStatus.REJECTED, Reason.BAD_PARENT)]
    assert small.put("d", at="d") == [(PutStatus.REJECTED, Reason.BAD_PARENT)]
    assert small.resident() == "bc"


def test_commit_parts_with_different_parents_are_refused():
    small = SmallStore(parts=2)
    assert small.commit(small.record("b", "a", part=0)) == [STORED]
    assert small.commit(small.record("b", "x", part=1)) == [(PutStatus.REJECTED, Reason.BAD_PARENT)]
    assert small.commit(small.record("b", "a", part=2)) == [(PutStatus.REJECTED, Reason.BAD_PART)]


def test_commit_incomplete_block_is_no_hit():
    small = SmallStore(parts=2)
    small.commit(small.record("a", part=1))
    assert small.hits("a") == 0
    small.commit(small.record("a", part=0))
    assert small.hits("a") == 1


def test_commit_of_a_slot_twice_publishes_it_once():
    small = SmallStore()
    record = small.record("a")
    assert small.commit(record, record) == [STORED, (PutStatus.REJECTED, Reason.BAD_RECORD)]


def test_commit_of_another_session_s_slot_is_refused():
    small = SmallStore()
    small.executor.apply(SessionOpened(2))
    record = small.record("a")
    answer = small.executor.apply(Committed(2, small.namespace.id, (record,)))
    assert answer == Answer([PutStatus.REJECTED], [Reason.BAD_RECORD])
    assert small.commit(record) == [STORED]


def test_commit_that_does_not_stay_is_answered_so_for_every_copy_of_its_key():
    small = SmallStore(capacity_pages=2)
    small.put("x", access=7)
    small.put("yz")
    # Of an old engine request, so the first to leave: its second record exists and goes too.
    assert small.commit(small.record("a"), small.record("a"), access=7) == [NO_ROOM, NO_ROOM]
    assert small.resident() == "yz"


def test_commit_longer_than_the_tier_keeps_its_beginning():
    small = SmallStore(capacity_pages=3)
    assert small.put("abcde") == [STORED] * 3 + [NO_ROOM] * 2
    assert small.hits("abcde") == 3


def test_commit_into_a_tier_full_of_leases_is_throttled():
    small = SmallStore(capacity_pages=2)
    small.put("ab")
    small.lease("ab")
    assert small.put("c") == [ALL_HELD]
    assert small.resident() == "ab"


def test_commit_of_a_part_without_room_keeps_the_parts_that_were_there():
    small = SmallStore(capacity_pages=3, parts=2)
    small.commit(small.record("a", part=0))
    small.commit(small.record("b", "a", part=0), small.record("b", "a", part=1))
    small.lease("b")
    # The only block without a lease has a leased child; its new part must not cost it the old one.
    assert small.commit(small.record("a", part=1)) == [ALL_HELD]
    assert list(small.blocks("a")[0].parts) == [0]
    validate_state(small.store)


def test_commit_with_an_old_engine_request_does_not_make_blocks_younger():
    small = SmallStore(capacity_pages=2)
    small.put("a", access=1)
    small.put("b", access=2)
    small.executor.apply(Accessed(SESSION, 1, runs_of(small.blocks("a")), 1))
    small.put("c", access=3)
    assert small.resident() == "bc"


def test_access_numbers_remembered_are_bounded():
    small = SmallStore()
    for access in range(1, ACCESS_IDS + 100):
        small.executor.apply(Accessed(SESSION, access, [], 1))
    assert len(small.store._accesses) == ACCESS_IDS


# ---------------------------------------------------------------- slots


def test_slot_wanted_above_the_largest_record_is_rejected_and_up_to_it_granted():
    limits = StoreLimits(capacity_bytes=20 * 4096, grant_bytes=40 * 4096, grant_bytes_per_session=17 * 4096 + 100)
    store = Store(limits, SlabAllocator(4, 40 * 4096, FIRST_PAGE), Lru())
    assert store.max_record_bytes == 17 * 4096
    for index in range(4):
        store.handle(SlabPopulated(index), 0)
    small = SmallStore()
    small.store = small.executor.store = store
    small.executor.apply(SessionOpened(SESSION))
    granted = small.executor.want_slot(SESSION, store.max_record_bytes)
    assert isinstance(granted, Record)
    assert granted.slot_bytes == store.max_record_bytes
    too_large = small.executor.want_slot(SESSION, store.max_record_bytes + 1)
    assert too_large == Refuse(PutStatus.REJECTED, Reason.TOO_LARGE)


def test_slot_wanted_while_populating_uses_what_is_there_and_is_throttled_then():
    store = Store(
        StoreLimits(capacity_bytes=8 * 4096, grant_bytes=8 * 4096, grant_bytes_per_session=8 * 4096),
        SlabAllocator(4, 4 * 4096, FIRST_PAGE),
        Lru(),
    )
    store.handle(SlabPopulated(0), 0)
    store.handle(SessionOpened(SESSION), 0)
    small = SmallStore()
    small.store = small.executor.store = store
    for _ in range(4):
        small.grant()
    assert small.executor.want_slot(SESSION, 10) == Refuse(PutStatus.THROTTLED, Reason.POPULATING)
    store.handle(SlabPopulated(1), 0)
    small.grant()


def test_slot_wanted_above_the_session_s_grants_is_throttled_until_some_come_back():
    small = SmallStore(grant_pages=2)
    first, _ = small.grant(), small.grant()
    assert small.executor.want_slot(SESSION, 10) == Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)
    small.executor.apply(GrantsReturned(SESSION, (first, first, 77)))
    assert small.grant() == first


def test_slot_wanted_while_a_reader_stands_still_is_granted_after_a_while():
    """A stopped client that holds slots of the tier must not keep others from writing for ever."""
    small = SmallStore(capacity_pages=8, grant_pages=2, slab_pages=2)
    for letter in "abcdefgh":
        small.put(letter)
    for block in small.blocks("abcd"):
        small.executor.pin(block.parts[0].slot)
    refused = 0
    for letter in "ABCDEFGHIJKL":
        while isinstance(granted := small.executor.want_slot(SESSION, PAGE_BYTES - 1), Refuse):
            refused += 1
            assert refused < 10
            small.executor.now_ns += LIMBO_PATIENCE_NS
        small.executor.apply(GrantsReturned(SESSION, (granted.slot,)))
        small.put(letter)
    # Four of the tier's ten slots are held; the rest goes on.
    assert small.resident() == "GHIJKL"
    validate_state(small.store)


def test_slot_of_a_dead_client_waits_until_nobody_can_write_it():
    small = SmallStore()
    small.executor.quiesce_at_once = False
    slot = small.grant()
    small.executor.apply(SessionClosed(SESSION))
    assert small.executor.waiting == [slot]
    assert small.store.limbo_bytes == PAGE_BYTES
    small.executor.quiesce([slot])
    assert small.store.slabs.free_slabs == len(small.store.slabs.slabs)


def test_slot_quiesced_twice_raises():
    small = SmallStore()
    small.put("a")
    with pytest.raises(InvalidTransition, match="RESIDENT -> FREE") as caught:
        small.store.handle(Quiesced([small.blocks("a")[0].parts[0].slot]), 0)
    assert "committed" in str(caught.value)


def test_slot_wanted_ahead_is_given_from_what_is_free_and_never_made_room_for():
    small = SmallStore(capacity_pages=8, grant_pages=4, slab_pages=4)
    small.put("abcd")
    small.put("efgh")
    ahead = [small.executor.want_slot_ahead(SESSION, PAGE_BYTES) for _ in range(4)]
    assert all(isinstance(granted, Record) for granted in ahead)
    assert small.executor.want_slot_ahead(SESSION, 10) == Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT)
    small.executor.apply(GrantsReturned(SESSION, tuple(granted.slot for granted in ahead[:2])))  # type: ignore[union-attr]
    # Of another size there is none, and no record is moved or evicted for it.
    assert small.executor.want_slot_ahead(SESSION, 2 * PAGE_BYTES) == Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)
    assert small.resident() == "abcdefgh"
    assert small.store.counters.moved_records == 0
    too_large = small.executor.want_slot_ahead(SESSION, 5 * PAGE_BYTES)
    assert too_large == Refuse(PutStatus.REJECTED, Reason.TOO_LARGE)
    validate_state(small.store)


def test_slot_granted_ahead_is_committed_and_returned_like_any():
    small = SmallStore()
    first, second = (small.executor.want_slot_ahead(SESSION, 100) for _ in range(2))
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    small.executor.write(first.slot, ("a", 0))
    record = CommittedRecord(first.slot, key_of("a"), ROOT_KEY, small.namespace.digest, 0, 100, 0, 255, codec=1)
    assert small.commit(record) == [STORED]
    assert (small.blocks("a")[0].parts[0].codec, small.blocks("a")[0].parts[0].fidelity) == (1, 255)
    small.executor.apply(SessionClosed(SESSION))
    assert small.store.granted_bytes == 0
    assert small.hits("a") == 1


# ---------------------------------------------------------------- what is published


def test_commit_publishes_what_stays_before_it_answers():
    small = SmallStore(capacity_pages=3)
    small.put("x")
    small.put("abcde")
    withdrawn, published, answer = small.executor.last
    assert isinstance(withdrawn, Withdraw)
    assert isinstance(published, Publish)
    assert isinstance(answer, Answer)
    assert [record.block.key for record in published.records if record.block] == [key_of(letter) for letter in "abc"]
    assert len(withdrawn.slots) == 3  # x, and the chain's end, which was never published


def test_commit_that_stores_nothing_publishes_nothing():
    small = SmallStore()
    small.put("a")
    small.put("a")
    assert small.executor.last == [Answer([PutStatus.EXISTS], [Reason.NONE])]


def test_namespace_is_over_before_its_records_are_withdrawn():
    small = SmallStore()
    small.put("abc")
    before = small.namespace.id
    small.executor.apply(InvalidateWanted(before))
    assert [type(told) for told in small.executor.last] == [EndNamespace, Withdraw, Namespaced]
    answer = small.executor.apply(Joined(small.namespace.description, (), 5))
    assert isinstance(answer, Namespaced)
    assert [type(told) for told in small.executor.last] == [EndNamespace, Namespaced]
    assert small.executor.ended == {before, before + 1}


# ---------------------------------------------------------------- records of which there are too many


def test_records_over_their_limit_are_evicted_though_there_is_room():
    small = SmallStore(capacity_pages=8, records=3)
    for letter in "abcd":
        assert small.put(letter) == [STORED]
    assert small.resident() == "bcd"
    small.touch("b")
    assert small.put("e") == [STORED]
    assert small.resident() == "bde"
    validate_state(small.store)


def test_records_over_their_limit_count_every_part():
    small = SmallStore(capacity_pages=8, parts=2, records=4)
    for letter in "abc":
        small.commit(small.record(letter, part=0), small.record(letter, part=1))
    assert small.resident() == "bc"


def test_chain_of_more_records_than_there_may_be_keeps_its_beginning():
    small = SmallStore(capacity_pages=8, records=3)
    assert small.put("abcde") == [STORED] * 3 + [NO_ROOM] * 2
    assert small.hits("abcde") == 3


def test_records_at_their_limit_and_all_leased_are_throttled():
    small = SmallStore(capacity_pages=8, records=2)
    small.put("ab")
    small.lease("ab")
    assert small.put("c") == [ALL_HELD]
    assert small.resident() == "ab"


# ---------------------------------------------------------------- an index that is full in one place


def by_letter(places: dict[str, tuple[int, int]]) -> Callable[[tuple[int, bytes, int]], tuple[int, int]]:
    """The buckets of blocks by their letter; others have one of their own."""

    def of(identity: tuple[int, bytes, int]) -> tuple[int, int]:
        return places.get(chr(identity[1][0]), (identity[1][0], identity[1][0]))

    return of


def test_displaced_record_takes_the_place_of_a_leaf_of_those_in_its_way():
    small = SmallStore(places=by_letter(dict.fromkeys("abz", (1, 1))))
    small.put("ab")
    assert small.put("z") == [STORED]
    # "a" is older, but "b" depends on it.
    assert small.resident() == "az"
    assert small.store.counters.evicted_blocks == 1
    validate_state(small.store)


def test_displaced_record_takes_the_place_of_a_parent_where_no_leaf_is_in_its_way():
    small = SmallStore(places=by_letter(dict.fromkeys("abz", (1, 1))))
    small.put("abc")
    assert small.put("z") == [STORED]
    assert len(small.resident()) == 3
    assert "z" in small.resident()
    assert "c" in small.resident()
    validate_state(small.store)


def test_displaced_record_does_not_take_a_leased_place_and_leaves_itself():
    small = SmallStore(places=by_letter(dict.fromkeys("abz", (1, 1))))
    small.put("ab")
    small.lease("ab")
    small.put("z")
    assert small.resident() == "ab"
    validate_state(small.store)


def test_displaced_records_of_one_block_do_not_take_each_others_places():
    small = SmallStore(parts=3, places=by_letter({"z": (1, 1)}))
    small.commit(*(small.record("z", part=part) for part in range(3)))
    assert small.resident() == ""
    assert small.executor.index == {}
    validate_state(small.store)


def test_displaced_records_of_one_commit_make_room_one_after_the_other():
    small = SmallStore(places=by_letter(dict.fromkeys("abyz", (1, 1))))
    small.put("ab")
    small.commit(small.record("y"), small.record("z"))
    assert len(small.resident()) == 2
    assert len([told for told in small.executor.last if isinstance(told, Displaced)]) == 2
    validate_state(small.store)


# ---------------------------------------------------------------- sizes that change


def test_sizes_change_moves_records_together_and_keeps_their_bytes():
    small = SmallStore(capacity_pages=64, grant_pages=16, slab_pages=8)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?"
    for letter in letters:
        small.put(letter)
    for letter in letters[::2]:
        small.touch(letter)
    for letter in "#$%&":
        assert small.put(letter, pages=8) == [STORED]
    assert small.store.counters.moved_records
    for key, block in small.namespace.blocks.items():
        letter = key.rstrip(b"_").decode()
        assert small.executor.contents[block.parts[0].slot] == (letter, 0, 255)
    validate_state(small.store)


def test_sizes_change_evicts_at_most_a_slab_s_worth_for_a_slab():
    small = SmallStore(capacity_pages=96, grant_pages=8, slab_pages=8)
    for index in range(96):
        small.put(chr(0x4E00 + index))
    for letter in "#$%&":
        before = small.store.counters.evicted_blocks
        assert small.put(letter, pages=8) == [STORED]
        # Eight for the slab, eight more for the capacity.
        assert small.store.counters.evicted_blocks - before <= 16


def test_sizes_change_while_moved_slots_are_read_waits_for_the_readers():
    small = SmallStore(capacity_pages=16, grant_pages=8, slab_pages=8)
    letters = "abcdefghijklmnop"
    for letter in letters:
        small.put(letter)
    pinned = [block.parts[0].slot for block in small.blocks(letters)]
    for slot in pinned:
        small.executor.pin(slot)
    for _ in range(6):
        small.executor.now_ns += 2 * LIMBO_PATIENCE_NS
        small.executor.want_slot(SESSION, 8 * PAGE_BYTES)
        small.executor.apply(GrantsReturned(SESSION, tuple(small.store.sessions[SESSION].grants)))
    for slot in pinned:
        small.executor.unpin(slot)
    assert isinstance(small.executor.want_slot(SESSION, 8 * PAGE_BYTES), Record)
    validate_state(small.store)


# ---------------------------------------------------------------- leases


def test_lease_of_a_run_holds_its_beginning_when_its_end_is_removed():
    small = SmallStore(capacity_pages=3)
    small.put("abc")
    small.lease("abc")
    small.executor.apply(RemoveWanted(small.namespace.id, [key_of("c")]))
    assert small.put("x") == [STORED]
    assert small.put("y") == [STORED]
    assert small.hits("ab") == 2


def test_lease_of_a_run_holds_its_beginning_when_a_block_is_found_corrupt():
    small = SmallStore(capacity_pages=3)
    small.put("abc")
    lease = small.lease("abc")
    small.executor.apply(FoundCorrupt(small.blocks("b")[0].parts[0].slot, "tested"))
    for letter in "xyz":
        small.put(letter)
    assert small.hits("a") == 1
    assert small.executor.apply(LeaseReleased(SESSION, lease)) == Count(1)
    for letter in "uvw":
        small.put(letter)
    assert small.resident() == "uvw"


def test_lease_ends_by_release_time_and_session_and_only_by_its_own():
    small = SmallStore(capacity_pages=2)
    small.put("ab")
    first = small.lease("ab", 10)
    small.executor.apply(SessionOpened(2))
    assert small.executor.apply(LeaseReleased(2, first)) == Count(0)
    small.executor.now_ns = 9
    small.executor.apply(Ticked())
    assert small.put("c") == [ALL_HELD]
    small.executor.now_ns = 10
    small.executor.apply(Ticked())
    assert small.executor.apply(LeaseReleased(SESSION, first)) == Count(0)
    assert small.put("c") == [STORED]
    answer = small.executor.apply(LeaseWanted(2, small.blocks("a"), 10**9))
    assert isinstance(answer, Leased)
    small.executor.apply(SessionClosed(2))
    assert not small.store.leases
    for letter in "de":
        small.put(letter)
    assert small.resident() == "de"


def test_leases_of_a_client_that_goes_end_before_its_grants():
    small = SmallStore(capacity_pages=2)
    small.put("ab")
    small.lease("ab")
    slot = small.grant()
    assert small.executor.apply(LeasesEnded(SESSION)) is None
    assert not small.store.leases
    assert small.store.granted_bytes == PAGE_BYTES
    assert small.put("c") == [STORED]
    # It may still write into what it was lent, and even commit it.
    small.executor.write(slot, ("d", 0))
    record = CommittedRecord(slot, key_of("d"), ROOT_KEY, small.namespace.digest, 0, PAGE_BYTES - 1, 0, 0)
    assert small.commit(record) == [STORED]
    small.executor.apply(SessionClosed(SESSION))
    assert small.store.granted_bytes == small.store.limbo_bytes == 0
    validate_state(small.store)


def test_lease_of_nothing_is_none_and_too_many_are_throttled():
    small = SmallStore()
    small.put("a")
    assert small.executor.apply(LeaseWanted(SESSION, [], 10)) == Leased(0)
    for _ in range(small.store.limits.leases_per_session):
        small.lease("a")
    answer = small.executor.apply(LeaseWanted(SESSION, small.blocks("a"), 10))
    assert answer == Refuse(PutStatus.THROTTLED, Reason.ALL_HELD)


# ---------------------------------------------------------------- removing


def test_remove_keeps_descendants_and_evicts_them_first():
    small = SmallStore(capacity_pages=5)
    small.put("abc")
    small.put("x")
    assert small.executor.apply(RemoveWanted(small.namespace.id, [key_of("a"), key_of("nothing")])) == Count(1)
    assert small.resident() == "bcx"
    for letter in "123":
        small.put(letter)
    assert small.resident() == "123bx"
    small.put("4")
    assert small.resident() == "1234x"


def test_remove_of_a_long_chain_costs_in_proportion_to_its_length():
    def seconds(length: int) -> float:
        small = SmallStore(capacity_pages=length, grant_pages=length, slab_pages=64)
        letters = [chr(0x4E00 + index) for index in range(length)]
        small.commit(
            *(small.record(letter, letters[index - 1] if index else "") for index, letter in enumerate(letters))
        )
        begin = time.perf_counter()
        answer = small.store.handle(RemoveWanted(small.namespace.id, [key_of(letter) for letter in letters]), 0)
        elapsed = time.perf_counter() - begin
        assert answer[-1] == Count(length)
        return elapsed

    seconds(200)
    small, large = min(seconds(500) for _ in range(3)), min(seconds(4000) for _ in range(3))
    assert large < 24 * small + 0.02, f"{large / small:.1f} times as long for 8 times the chain"


def test_clear_and_invalidate_leave_nothing():
    small = SmallStore()
    small.put("abc")
    small.lease("abc")
    assert small.executor.apply(ClearWanted(small.namespace.id)) == Count(3)
    small.put("abc")
    answer = small.executor.apply(InvalidateWanted(small.namespace.id))
    assert isinstance(answer, Namespaced)
    assert answer.namespace.generation == 1
    assert small.store.block_count == 0
    assert small.put("d") == [(PutStatus.REJECTED, Reason.STALE_NAMESPACE)]
    validate_state(small.store)


def test_invalidate_without_ids_left_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    small = SmallStore()
    small.put("abc")
    monkeypatch.setattr("kvstore.core.namespaces.MAX_NAMESPACE_ID", 1)
    with pytest.raises(InvalidArgument, match="namespace ids"):
        small.executor.apply(InvalidateWanted(small.namespace.id))
    with pytest.raises(InvalidArgument, match="namespace ids"):
        small.executor.apply(Joined(Namespace(name="another")))
    assert small.hits("abc") == 3
    validate_state(small.store)


def test_joined_in_a_later_generation_drops_the_blocks_of_the_earlier_one():
    small = SmallStore()
    small.put("abc")
    answer = small.executor.apply(Joined(small.namespace.description, (), 5))
    assert isinstance(answer, Namespaced)
    assert (answer.namespace.generation, answer.stale) == (5, False)
    assert small.store.block_count == 0
    answer = small.executor.apply(Joined(small.namespace.description, (), 4))
    assert isinstance(answer, Namespaced)
    assert (answer.namespace.generation, answer.stale) == (5, True)


def test_found_corrupt_of_a_slot_that_is_not_resident_changes_nothing():
    small = SmallStore()
    slot = small.grant()
    small.executor.apply(FoundCorrupt(slot, "tested"))
    small.executor.apply(FoundCorrupt(99_999, "tested"))
    assert small.store.counters.corrupt_records == 0


# ---------------------------------------------------------------- runs


def test_runs_of_keys_of_several_chains_are_runs_of_parents_and_children():
    small = SmallStore(capacity_pages=16, grant_pages=16)
    small.put("abc")
    small.put("xyz")
    a, b, c, x, y, z = small.blocks("abcxyz")
    assert runs_of([]) == []
    assert runs_of([a, b, c]) == [(c, 3)]
    assert runs_of([b]) == [(b, 1)]
    # Depths and the last link alone look like one chain here.
    assert runs_of([a, y, z]) == [(a, 1), (z, 2)]
    assert runs_of([a, b, y, z, c, x]) == [(b, 2), (z, 2), (c, 1), (x, 1)]
    assert runs_of([c, b, a, a]) == [(c, 1), (b, 1), (a, 1), (a, 1)]
