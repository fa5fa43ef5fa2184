"""Which record of a block stays: the better one where there is room, and none that its namespace does not allow."""

from __future__ import annotations

import pytest
from fakes.small_store import SESSION, SmallStore, key_of

from kvstore.core.block import Record, RecordState
from kvstore.core.events import FoundCorrupt, LeaseReleased
from kvstore.core.instructions import Publish, Replace, Withdraw
from kvstore.core.invariants import validate_state
from kvstore.errors import InvariantViolation
from kvstore.format.constants import CODECS_BY_NAME
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

STORED = (PutStatus.STORED, Reason.NONE)
EXISTS = (PutStatus.EXISTS, Reason.NONE)
ALL_HELD = (PutStatus.THROTTLED, Reason.ALL_HELD)
NOT_EXACT = (PutStatus.REJECTED, Reason.NOT_EXACT)
OTHER_CODEC = (PutStatus.REJECTED, Reason.OTHER_CODEC)
BAD_PARENT = (PutStatus.REJECTED, Reason.BAD_PARENT)


def resident(small: SmallStore, letter: str, part: int = 0) -> Record:
    (block,) = small.blocks(letter)
    return block.parts[part]


def held(small: SmallStore, letter: str, part: int = 0) -> object:
    """What readers find."""
    validate_state(small.store)
    record = resident(small, letter, part)
    assert small.executor.index[small.namespace.id, key_of(letter), part] == record.slot
    return small.executor.contents[record.slot]


@pytest.mark.parametrize(
    ("first", "second", "answer", "stays"),
    [
        (85, 255, STORED, 255),
        (85, 86, STORED, 86),
        (0, 1, STORED, 1),
        (85, 85, EXISTS, 85),
        (255, 255, EXISTS, 255),
        (255, 85, EXISTS, 255),
        (86, 85, EXISTS, 86),
    ],
)
def test_better_record_replaces_a_worse_one_and_no_other(first, second, answer, stays):
    small = SmallStore()
    assert small.put("a", fidelity=first) == [STORED]
    assert small.put("a", fidelity=second) == [answer]
    assert held(small, "a") == ("a", 0, stays)
    assert resident(small, "a").fidelity == stays
    assert small.store.record_count == small.store.block_count == 1
    assert small.store.counters.replaced_records == (answer == STORED)
    assert not small.store.limbo_bytes


def test_better_record_takes_the_place_before_the_worse_one_is_withdrawn():
    small = SmallStore()
    small.put("a", fidelity=85)
    before = resident(small, "a").slot
    small.put("ab", fidelity=255)
    after, behind = resident(small, "a"), resident(small, "b")
    assert small.executor.last[:3] == [Replace(before, after), Withdraw([before]), Publish([behind])]


def test_better_record_of_a_block_with_another_parent_is_refused():
    small = SmallStore()
    small.put("ab", fidelity=85)
    assert small.commit(small.record("b", fidelity=255)) == [BAD_PARENT]
    assert held(small, "b") == ("b", 0, 85)


def test_better_record_of_one_part_leaves_the_other_parts():
    small = SmallStore(parts=2)
    small.commit(small.record("a", fidelity=85), small.record("a", part=1, fidelity=85))
    assert small.commit(small.record("a", part=1, fidelity=178)) == [STORED]
    assert (held(small, "a", 0), held(small, "a", 1)) == (("a", 0, 85), ("a", 1, 178))


def test_better_record_leaves_leases_descendants_and_order_of_eviction_as_they_were():
    small = SmallStore(capacity_pages=4)
    small.put("ab", fidelity=85)
    small.put("x", fidelity=85)
    lease = small.lease("a")
    assert small.put("a", fidelity=255) == [STORED]
    (block,) = small.blocks("a")
    assert (block.leases, small.hits("ab")) == (1, 2)
    assert small.put("yz") == [STORED, STORED]
    assert small.resident() == "axyz", "the leaf that was not used for longest left"
    small.executor.apply(LeaseReleased(SESSION, lease))
    validate_state(small.store)


def test_replaced_record_that_is_being_read_keeps_its_slot_until_the_read_ends():
    small = SmallStore(grant_pages=2)
    small.put("a", fidelity=85)
    slot = resident(small, "a").slot
    small.executor.pin(slot)
    assert small.put("a", fidelity=255) == [STORED]
    assert small.store.records[slot].state is RecordState.LIMBO
    assert small.executor.contents[slot] == ("a", 0, 85)
    small.executor.apply(FoundCorrupt(slot, "what is said of the old record does not concern the new one"))
    assert held(small, "a") == ("a", 0, 255)
    small.executor.unpin(slot)
    assert slot not in small.store.records


def test_several_better_records_of_one_commit_leave_the_best():
    for published in (False, True):
        small = SmallStore()
        if published:
            small.put("a", fidelity=34)
        records = [
            small.record("a", fidelity=fidelity, pages=pages) for fidelity, pages in [(85, 1), (59, 1), (178, 2)]
        ]
        assert small.commit(*records) == [STORED, EXISTS, STORED]
        assert held(small, "a") == ("a", 0, 178)
        assert small.store.counters.replaced_records == published
        assert len(small.store.records) == 1


def test_better_and_larger_record_evicts_what_was_not_used_for_longest():
    small = SmallStore(capacity_pages=4)
    small.put("xyz")
    small.put("a", fidelity=85)
    assert small.commit(small.record("a", fidelity=255, pages=2)) == [STORED]
    assert small.resident() == "axy"
    assert held(small, "a") == ("a", 0, 255)


def test_better_and_larger_record_without_room_leaves_the_leased_one():
    small = SmallStore(capacity_pages=4)
    small.put("abcd", fidelity=85)
    lease = small.lease("abcd")
    assert small.commit(small.record("b", "a", fidelity=255, pages=2)) == [ALL_HELD]
    assert small.resident() == "abcd"
    assert held(small, "b") == ("b", 0, 85)
    assert small.store.counters.replaced_records == 0
    # One that needs no more room takes the place all the same.
    assert small.put("b", at="a", fidelity=255) == [STORED]
    small.executor.apply(LeaseReleased(SESSION, lease))
    assert small.commit(small.record("c", "b", fidelity=255, pages=2)) == [STORED]
    assert held(small, "c") == ("c", 0, 255)


def test_better_records_of_one_commit_without_room_bring_back_what_was_there():
    """Also where the first of them would have fitted: it was never there."""
    small = SmallStore(capacity_pages=4, grant_pages=8)
    small.put("abcd", fidelity=85)
    small.lease("abcd")
    records = [small.record("b", "a", fidelity=178), small.record("b", "a", fidelity=255, pages=3)]
    assert small.commit(*records) == [ALL_HELD, ALL_HELD]
    assert held(small, "b") == ("b", 0, 85)
    records = [
        small.record("b", "a", fidelity=178),
        small.record("b", "a", fidelity=60),
        small.record("c", "b", fidelity=255, pages=2),
    ]
    assert small.commit(*records) == [STORED, EXISTS, ALL_HELD]
    assert (held(small, "b"), held(small, "c")) == (("b", 0, 178), ("c", 0, 85))


def test_smaller_better_record_stays_where_others_of_its_commit_have_no_room():
    """Putting the larger one back would gain nothing."""
    small = SmallStore(capacity_pages=4, grant_pages=8, parts=2)
    small.commit(small.record("a", fidelity=85, pages=2), small.record("b", "a", pages=2))
    small.lease("ab")
    other_part = small.record("b", "a", part=1, pages=2)
    assert small.commit(other_part, small.record("a", fidelity=255, pages=1)) == [ALL_HELD, STORED]
    assert held(small, "a") == ("a", 0, 255)
    assert [list(block.parts) for block in small.blocks("ab")] == [[0], [0]]


def test_better_records_of_more_than_there_may_be_do_not_count_twice():
    small = SmallStore(records=3)
    small.put("abc", fidelity=85)
    small.lease("abc")
    assert small.put("abc", fidelity=255) == [STORED] * 3
    assert small.put("d", at="c") == [ALL_HELD]
    assert [held(small, letter) for letter in "abc"] == [(letter, 0, 255) for letter in "abc"]


def test_block_that_leaves_with_its_better_record_leaves_whole():
    small = SmallStore(capacity_pages=4)
    small.put("a", fidelity=85)
    before = resident(small, "a").slot
    records = [small.record("a", fidelity=255, pages=2), *(small.record(letter, "") for letter in "xyz")]
    answers = small.commit(*records)
    assert (PutStatus.REJECTED, Reason.NO_ROOM) in answers
    validate_state(small.store)
    stored = {record.key for record, answer in zip(records, answers, strict=True) if answer == STORED}
    assert stored == set(small.namespace.blocks)
    if "a" not in small.resident():
        assert before not in small.store.records


# ---------------------------------------------------------------- what a namespace allows


def test_exact_namespace_refuses_what_is_lossy_or_was_computed_on_lossy_blocks():
    small = SmallStore(namespace=Namespace(name="strict", codec="lossless", fidelity="exact"))
    for codec in (1, 2, 3):
        for fidelity in (0, 85, 254):
            assert small.commit(small.record("a", codec=codec, fidelity=fidelity)) == [NOT_EXACT]
    assert small.resident() == ""
    assert small.commit(small.record("a", codec=2)) == [STORED]
    assert small.commit(small.record("a", codec=7, fidelity=85)) == [OTHER_CODEC]
    assert small.store.fidelity_of(small.blocks("a")) == 255


def test_exact_namespace_with_a_lossy_record_is_an_invalid_state():
    small = SmallStore(namespace=Namespace(name="strict", fidelity="exact"))
    small.put("a")
    resident(small, "a").fidelity = 254
    small.namespace.lossy_records = 1
    with pytest.raises(InvariantViolation, match="is exact and holds lossy records"):
        validate_state(small.store)


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        ("raw", "raw"),
        ("lossless", "raw lossless lossless-zstd"),
        ("lossless-zstd", "raw lossless lossless-zstd"),
        ("int8", "raw lossless lossless-zstd int8"),
        ("kivi4", "raw lossless lossless-zstd fp8 int8 kivi4"),
        ("turbo4", "raw lossless lossless-zstd fp8 int8 int4 kivi4 turbo4 centred4"),
        ("turbo3-2", " ".join(name for name in CODECS_BY_NAME if name != "kivi2")),
        ("kivi2", " ".join(CODECS_BY_NAME)),
    ],
)
def test_namespace_takes_records_of_its_codec_and_of_better_ones(policy, allowed):
    for name, codec in CODECS_BY_NAME.items():
        small = SmallStore(namespace=Namespace(name="some", codec=policy))
        answer = STORED if name in allowed.split() else OTHER_CODEC
        assert small.commit(small.record("a", codec=codec)) == [answer], f"{name} in a namespace of {policy}"


def test_fidelity_of_a_run_is_that_of_its_worst_record():
    small = SmallStore(parts=2)
    records = [
        small.record(letter, parent, part=part, fidelity=fidelity)
        for letter, parent, fidelities in [("a", "", (255, 255)), ("b", "a", (255, 178)), ("c", "b", (85, 255))]
        for part, fidelity in enumerate(fidelities)
    ]
    small.commit(*records)
    assert [small.store.fidelity_of(small.blocks("abc"[:length])) for length in range(4)] == [255, 255, 178, 85]
    small.commit(small.record("c", "b", fidelity=255))
    assert small.store.fidelity_of(small.blocks("abc")) == 178
