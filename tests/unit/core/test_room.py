"""For whom room is made: not at the cost of the same request, nor of what a block goes on behind, nor for orphans."""

from __future__ import annotations

import random

from fakes.memory_executor import MemoryExecutor
from fakes.small_store import PAGE_BYTES, SESSION, SmallStore, key_of

from kvstore.core.block import Record
from kvstore.core.events import Committed, CommittedRecord
from kvstore.core.instructions import Answer, Refuse
from kvstore.core.invariants import validate_state
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

NO_ROOM = (PutStatus.REJECTED, Reason.NO_ROOM)
STORED = (PutStatus.STORED, Reason.NONE)


def short_of_slots(slots: int = 6) -> SmallStore:
    """Memory for so many slots only, and a capacity that they can never fill."""
    return SmallStore(capacity_pages=4 * slots, grant_pages=4, slab_pages=3, slabs=slots)


def put_one(small: SmallStore, letter: str, at: str, access: int) -> tuple[PutStatus, Reason]:
    """A put of one block of three pages that says of which request it is and behind what, as clients do."""
    parent = key_of(at) if at else ROOT_KEY
    length = 3 * PAGE_BYTES
    granted = small.executor.want_slot(SESSION, length, access, small.namespace.id, parent)
    if isinstance(granted, Refuse):
        return granted.status, granted.reason
    small.executor.write(granted.slot, letter)
    record = CommittedRecord(granted.slot, key_of(letter), parent, small.namespace.digest, 0, length, 0, 255)
    return small.commit(record, access=access)[0]


def put_each(small: SmallStore, letters: str, *, at: str = "", access: int = 0) -> list[tuple[PutStatus, Reason]]:
    return [put_one(small, letter, above, access) for above, letter in zip([at, *letters], letters, strict=False)]


def test_chain_of_more_slots_than_there_are_keeps_its_beginning():
    small = short_of_slots(6)
    assert put_each(small, "abcdefgh", access=7) == [STORED] * 6 + [NO_ROOM] * 2
    assert small.hits("abcdefgh") == 6
    validate_state(small.store)


def test_chain_of_puts_of_their_own_keeps_its_beginning():
    small = short_of_slots(6)
    assert put_each(small, "abcdefgh") == [STORED] * 6 + [NO_ROOM] * 2
    assert small.hits("abcdefgh") == 6


def test_request_that_goes_on_behind_an_older_chain_does_not_evict_it():
    small = short_of_slots(6)
    put_each(small, "xy", access=1)
    put_each(small, "abc", access=2)
    assert put_each(small, "defg", at="c", access=3) == [STORED] * 3 + [NO_ROOM]
    assert small.hits("abcdefg") == 6
    assert small.hits("xy") == 0


def test_orphan_costs_nobody_anything():
    small = short_of_slots(6)
    put_each(small, "abcd", access=1)
    assert put_each(small, "rst", at="q", access=2) == [STORED] * 2 + [NO_ROOM]
    assert small.hits("abcd") == 4
    # What nobody can reach leaves first.
    assert put_each(small, "ef", access=3) == [STORED] * 2
    assert small.resident() == "abcdef"
    validate_state(small.store)


def test_orphan_over_capacity_leaves_before_what_is_older():
    small = SmallStore(capacity_pages=4)
    small.put("abc")
    assert small.put("rs", at="q") == [STORED, NO_ROOM]
    assert small.put("d", at="c") == [STORED]
    assert small.resident() == "abcd"


def test_orphan_put_again_stays_one():
    small = SmallStore(capacity_pages=4)
    small.put("ab")
    small.put("rs", at="q")
    assert [status for status, _ in small.put("rs", at="q")] == [PutStatus.EXISTS] * 2
    small.put("xy")
    assert small.resident() == "abxy"


def test_orphans_whose_parent_comes_are_as_young_as_it():
    small = SmallStore(capacity_pages=5)
    small.put("bc", at="a")
    small.put("x")
    small.put("a")
    assert small.hits("abc") == 3
    small.put("yz")
    assert small.resident() == "abcyz"
    small.put("w")
    assert small.resident() == "abwyz"
    validate_state(small.store)


def test_parent_stays_for_its_new_child_though_its_last_other_child_leaves_for_it():
    small = SmallStore(capacity_pages=4)
    small.put("ab")
    small.put("z", pages=2)
    assert small.put("c", at="a", pages=2) == [STORED]
    assert small.resident() == "ac"
    validate_state(small.store)


def test_chain_that_comes_backwards_in_one_commit_is_stored_in_a_full_tier():
    small = SmallStore(capacity_pages=4)
    small.put("wxyz")
    records = [small.record("c", "b"), small.record("b", "a"), small.record("a")]
    assert small.commit(*records) == [STORED] * 3
    assert small.resident() == "abcw"


def test_two_requests_that_fill_the_tier_do_not_evict_each_other_in_turn():
    small = short_of_slots(6)
    answers: dict[int, list[tuple[PutStatus, Reason]]] = {1: [], 2: []}
    for index in range(5):
        for access, letters in ((1, "abcde"), (2, "vwxyz")):
            answers[access].append(put_one(small, letters[index], letters[index - 1] if index else "", access))
    # The later one gets all that it wants, the earlier one keeps a beginning of what is left.
    assert answers[2] == [STORED] * 5
    assert answers[1] == [STORED] * 3 + [NO_ROOM] * 2
    assert (small.hits("abcde"), small.hits("vwxyz")) == (1, 5)
    assert put_each(small, "bcde", at="a", access=3) == [STORED] * 4
    assert small.hits("abcde") == 5
    validate_state(small.store)


def test_slot_of_a_client_that_says_nothing_may_cost_anything():
    small = short_of_slots(6)
    put_each(small, "abcdef", access=7)
    assert isinstance(small.executor.want_slot(SESSION, 3 * PAGE_BYTES), Record)
    assert small.resident() == "abcde"


def test_puts_of_their_own_in_one_event_are_as_one_after_the_other():
    draw = random.Random(7)
    for _ in range(300):
        description = Namespace(name="small", codec="kivi4")
        stores = [SmallStore(capacity_pages=5, grant_pages=8, namespace=description) for _ in range(2)]
        for small in stores:
            small.put("pqr", fidelity=85)
        draws = [
            (draw.choice("abcdpqr"), draw.choice(["", *"pqrabcd"]), draw.choice([85, 255]))
            for _ in range(draw.randint(1, 8))
        ]
        draws = [(letter, "" if letter == parent else parent, fidelity) for letter, parent, fidelity in draws]
        records = [
            [small.record(letter, parent, fidelity=fidelity, codec=7) for letter, parent, fidelity in draws]
            for small in stores
        ]
        together, single = stores
        answer = _committed(together.executor, together.namespace.id, records[0])
        singly = [_committed(single.executor, single.namespace.id, [record]) for record in records[1]]
        assert answer.statuses == [one.statuses[0] for one in singly]
        assert answer.reasons == [one.reasons[0] for one in singly]
        assert together.resident() == single.resident()
        validate_state(together.store)


def _committed(executor: MemoryExecutor, namespace_id: int, records: list[CommittedRecord]) -> Answer:
    answer = executor.apply(Committed(SESSION, namespace_id, tuple(records), 0, separate=True))
    assert isinstance(answer, Answer)
    return answer
