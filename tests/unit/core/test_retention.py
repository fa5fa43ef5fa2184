"""Retention: what leaves last and first, for how long, within which budget; hints. With every policy."""

from __future__ import annotations

import pytest
from fakes.small_store import PAGE_BYTES, SESSION, SmallStore, key_of
from fakes.two_tiers import TwoTiers

from kvstore.core import retention as limits
from kvstore.core.block import Block
from kvstore.core.events import (
    ClearWanted,
    Displaced,
    Hinted,
    InvalidateWanted,
    LeaseReleased,
    PersistWanted,
    RetainWanted,
    SsdChanged,
    Ticked,
)
from kvstore.core.instructions import Count, Retained
from kvstore.core.invariants import validate_state
from kvstore.core.watching import Cause
from kvstore.policy.registry import POLICIES
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

STORED = (PutStatus.STORED, Reason.NONE)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def retain(store: SmallStore, letters: str, priority: int = 80, ttl_ns: int = 0, *, drop: bool = False) -> int:
    """How many are retained now, or will be when they are back."""
    keys = [key_of(letter) for letter in letters]
    answer = store.executor.apply(RetainWanted(store.namespace.id, keys, priority, ttl_ns, drop))
    validate_state(store.store)
    assert isinstance(answer, Retained)
    return answer.count + answer.waiting


def hint(store: SmallStore, letters: str, *, soon: bool, ttl_ns: int = 100) -> int:
    keys = [key_of(letter) for letter in letters]
    answer = store.executor.apply(Hinted(store.namespace.id, keys, soon, ttl_ns))
    validate_state(store.store)
    assert isinstance(answer, Count)
    return answer.count


def put_each(store: SmallStore, letters: str) -> None:
    for letter in letters:
        assert store.put(letter) == [STORED]
        validate_state(store.store)


def pass_time(store: SmallStore, to_ns: int) -> None:
    store.executor.now_ns = to_ns
    store.executor.apply(Ticked())
    validate_state(store.store)


def retained(store: SmallStore) -> str:
    """Blocks in DRAM that are retained."""
    held = [
        block for block in store.namespace.blocks.values() if (r := store.namespace.retained.get(block.key)) and r.holds
    ]
    return "".join(sorted(block.key[:1].decode() for block in held))


# ---------------------------------------------------------------- who leaves


@every_policy
def test_retained_blocks_leave_after_all_others(policy: str):
    store = SmallStore(8, 8, policy=policy)
    put_each(store, "abcdefgh")
    assert retain(store, "abc") == 3
    put_each(store, "ijklmnop")
    assert store.resident()[:3] == "abc"
    assert store.store.retention.gave_way_blocks == 0


@every_policy
def test_higher_priorities_leave_after_lower_ones_and_lower_than_normal_before_all(policy: str):
    store = SmallStore(8, 8, policy=policy)
    put_each(store, "abcdefgh")
    for letters, priority in (("ab", 90), ("cd", 70), ("ef", 10), ("g", 30)):
        assert retain(store, letters, priority) == len(letters)
    store.touch("e")
    store.touch("f")
    order = []
    before = set("abcdefgh")
    for letter in "stuvwxyz":
        # All that is put is retained above everything: the eight from before leave, one after the other.
        put_each(store, letter)
        retain(store, letter, 100)
        order += sorted(before.difference(store.resident()))
        before &= set(store.resident())
    assert sorted(order[:2]) == ["e", "f"], "although they were used last"
    assert order[2:4] == ["g", "h"]
    assert sorted(order[4:6]) == ["c", "d"]
    assert sorted(order[6:]) == ["a", "b"]
    assert store.store.retention.gave_way_blocks == 4


def test_of_equal_priority_the_one_that_expires_first_leaves_first():
    store = SmallStore(3, 8)
    put_each(store, "abc")
    for letter, ttl_ns in (("a", 300), ("b", 100), ("c", 200)):
        retain(store, letter, 80, ttl_ns)
    put_each(store, "x")
    assert store.resident() == "acx"
    retain(store, "x", 90)
    put_each(store, "y")
    assert store.resident() == "axy"


@every_policy
def test_put_is_never_refused_for_what_is_retained_or_leased(policy: str):
    store = SmallStore(8, 8, policy=policy, lease_pages=4)
    put_each(store, "abcdefgh")
    assert retain(store, "abcdefgh", 100) == 8
    store.lease("a")
    store.lease("b")
    for letter in "qrstuvwxyz":
        assert store.put(letter) == [STORED]
        validate_state(store.store)
    assert {"a", "b"} <= set(store.resident())


def test_chain_of_a_request_does_not_push_out_its_own_beginning_for_what_is_retained():
    store = SmallStore(4, 8)
    put_each(store, "xy")
    retain(store, "xy")
    assert store.put("abcdef", access=9) == [STORED] * 4 + [(PutStatus.REJECTED, Reason.NO_ROOM)] * 2
    assert store.resident() == "abcd"


# ---------------------------------------------------------------- what is before a block


def test_ancestors_are_retained_with_a_block():
    store = SmallStore(8, 8)
    store.put("abcd")
    assert retain(store, "c") == 1
    assert retained(store) == "abc"
    put_each(store, "stuvwxyz")
    assert store.hits("abcd") == 3


def test_ancestors_keep_what_is_more_and_a_block_gets_exactly_what_was_said_last():
    store = SmallStore(8, 8)
    store.put("abc")
    retain(store, "a", 90, 50)
    retain(store, "c", 70, 100)
    by_key = store.namespace.retained
    assert [(by_key[key_of(x)].priority, by_key[key_of(x)].expires_ns) for x in "abc"] == [
        (90, 100),
        (70, 100),
        (70, 100),
    ]
    retain(store, "abc", 60, 10)
    assert [(by_key[key_of(x)].priority, by_key[key_of(x)].expires_ns) for x in "abc"] == [(60, 10)] * 3
    retain(store, "b", 10)
    assert by_key[key_of("b")].priority == 60, "one behind it is retained"
    retain(store, "bc", 50)
    assert retained(store) == "a"


def test_normal_priority_ends_a_retention():
    store = SmallStore(4, 8)
    put_each(store, "abcd")
    retain(store, "ab")
    assert retain(store, "ab", 50) == 0
    put_each(store, "xy")
    assert store.resident() == "cdxy"


def test_parent_that_comes_later_is_retained_with_its_children():
    store = SmallStore(8, 8)
    store.put("c", at="b")
    retain(store, "c", 70, 100)
    store.put("ab")
    validate_state(store.store)
    assert retained(store) == "abc"


def test_removing_a_block_ends_the_retention_of_what_is_behind_it():
    store = SmallStore(8, 8)
    store.put("abc")
    retain(store, "c")
    store.remove("b")
    validate_state(store.store)
    assert retained(store) == "a"
    put_each(store, "stuvwxy")
    assert store.resident() == "astuvwxy"


# ---------------------------------------------------------------- time


@every_policy
def test_after_its_time_a_block_is_a_normal_one(policy: str):
    store = SmallStore(4, 8, policy=policy)
    put_each(store, "abcd")
    retain(store, "ab", 80, 100)
    pass_time(store, 99)
    assert retained(store) == "ab"
    pass_time(store, 100)
    assert (retained(store), store.store.retention.ended_blocks) == ("", 2)
    put_each(store, "wxyz")
    assert store.resident() == "wxyz"


def test_expired_with_drop_is_removed_with_that_cause():
    store = SmallStore(8, 8)
    store.put("abcd")
    causes: dict[bytes, Cause] = {}

    class Watching:
        def accessed(self, *_: object) -> None: ...

        def stored(self, *_: object, **__: object) -> None: ...

        def left(self, block: Block, cause: Cause) -> None:
            causes[block.key[:1]] = cause

    store.store.watchers.append(Watching())
    assert retain(store, "bc", 50, 100, drop=True) == 2
    pass_time(store, 100)
    assert causes == {b"b": Cause.EXPIRED, b"c": Cause.EXPIRED}
    assert store.resident() == "ad"
    assert len(store.store.retention) == 0


def test_dropped_block_waits_for_its_lease_to_end():
    store = SmallStore(8, 8)
    store.put("ab")
    retain(store, "b", 50, 100, drop=True)
    lease = store.lease("b", 10**12)
    pass_time(store, 10**10)
    assert store.resident() == "ab"
    store.executor.apply(LeaseReleased(SESSION, lease))
    pass_time(store, 2 * 10**10)
    assert store.resident() == "a"


def test_retention_of_a_block_lasts_as_long_as_one_behind_it():
    store = SmallStore(8, 8)
    store.put("ab")
    retain(store, "a", 80, 100, drop=False)
    retain(store, "b", 60, 500)
    pass_time(store, 200)
    assert retained(store) == "ab"
    pass_time(store, 500)
    pass_time(store, 2 * 10**9)
    assert retained(store) == ""


# ---------------------------------------------------------------- the budget


def test_over_the_budget_the_lowest_priority_loses_its_retention():
    store = SmallStore(16, 8, retention_pages=3)
    put_each(store, "abcdef")
    assert retain(store, "abc", 60) == 3
    assert retain(store, "de", 70) == 2
    assert len(retained(store)) == 3
    assert {"d", "e"} <= set(retained(store))
    assert store.store.retention.over_budget_blocks == 2
    assert retain(store, "f", 55) == 0, "the answer says that it is not"
    assert store.put("x") == [STORED]


def test_of_a_chain_over_the_budget_the_beginning_is_retained():
    store = SmallStore(16, 8, retention_pages=3)
    store.put("abcdef")
    assert retain(store, "abcdef") == 3
    assert retained(store) == "abc"


def test_without_a_budget_nothing_is_retained_and_low_priorities_work():
    store = SmallStore(4, 8, retention_pages=0)
    put_each(store, "abcd")
    assert retain(store, "ab") == 0
    assert retain(store, "d", 10) == 1
    put_each(store, "x")
    assert store.resident() == "abcx"


def test_tenant_with_a_quota_has_that_part_of_the_budget():
    store = SmallStore(16, 8, retention_pages=8, quotas={"small": 4})
    put_each(store, "abcd")
    assert retain(store, "abcd") == 2
    other = store.join(Namespace(name="other"))
    store.namespace = other
    put_each(store, "stuvwxyz")
    assert retain(store, "stuvwxyz") == 6, "the tier's budget is of eight"
    put_each(store, "0123456789")
    validate_state(store.store)


@every_policy
def test_tenant_at_its_limit_gives_way_to_itself(policy: str):
    store = SmallStore(16, 8, policy=policy, retention_pages=16, quotas={"small": 4})
    put_each(store, "abcd")
    assert retain(store, "abcd", 100) == 4
    put_each(store, "efgh")
    assert len(store.resident()) == 4


def test_better_record_of_a_retained_block_counts_with_its_size():
    store = SmallStore(8, 8, retention_pages=3, namespace=Namespace(name="small", codec="kivi4"))
    store.put("a", fidelity=85)
    store.put("b", fidelity=85)
    assert retain(store, "ab") == 2
    store.put("a", fidelity=255, pages=2)
    validate_state(store.store)
    assert store.store.retention.held_bytes == 3 * PAGE_BYTES
    store.put("b", fidelity=255, pages=2)
    validate_state(store.store)
    assert store.store.retention.held_bytes <= 3 * PAGE_BYTES


# ---------------------------------------------------------------- ends


def test_clear_and_invalidate_forget_retentions():
    store = SmallStore(8, 8)
    store.put("abc")
    retain(store, "abc")
    store.executor.apply(ClearWanted(store.namespace.id))
    assert len(store.store.retention) == 0
    store.put("abc")
    retain(store, "abc", 80, 100, drop=True)
    store.executor.apply(InvalidateWanted(store.namespace.id, SESSION))
    validate_state(store.store)
    assert len(store.store.retention) == 0
    assert retain(store, "abc") == 0, "this generation is over"


def test_retained_block_gives_its_place_in_the_index_before_the_one_that_was_just_put_leaves():
    store = SmallStore(8, 8)
    put_each(store, "ax")
    retain(store, "a")
    (record,) = store.blocks("a")[0].parts.values()
    (own,) = store.blocks("x")[0].parts.values()
    del store.executor.index[store.namespace.id, key_of("x"), 0]
    del store.executor._entries[own.slot]
    store.executor.apply(Displaced(own.slot, [record.slot]))
    validate_state(store.store)
    assert store.resident() == "x"


def test_retain_again_and_again_takes_no_more_memory():
    store = SmallStore(8, 8)
    store.put("abcd")
    for round_ in range(2000):
        retain_keys = [key_of(letter) for letter in "abcd"]
        store.executor.apply(RetainWanted(store.namespace.id, retain_keys, 60 + round_ % 30, 10**9, False))
    validate_state(store.store)
    share = store.store.retention._shares[None]
    sizes = [len(share.order._heap), len(share.leaving._heap), len(store.store.retention._expiry)]
    assert max(sizes) <= 200, f"heaps of {sizes} entries for four blocks"


# ---------------------------------------------------------------- with a tier below


def test_retained_block_that_had_to_leave_is_retained_again_when_it_is_back():
    tiers = TwoTiers(8, 4)
    tiers.put("abcd")
    tiers.put("efgh")
    tiers.settle()
    assert retain(tiers, "abefgh", 90) == 6
    assert retain(tiers, "cd", 80) == 2
    # The reserve of what may leave at once is of two blocks: those of the lowest priority.
    tiers.executor.apply(Ticked())
    tiers.settle()
    assert tiers.retired(clean=True) == "cd"
    assert (retained(tiers), tiers.store.retention.gave_way_blocks) == ("abefgh", 2)
    assert tiers.put("x") == [STORED]
    tiers.settle()
    assert "d" not in tiers.resident()
    retain(tiers, "gh", 10)
    assert tiers.put("d", at="c") == [STORED]
    tiers.settle()
    validate_state(tiers.store)
    assert retained(tiers) == "abcdef"


def only_below() -> TwoTiers:
    """The chain "ab" is on the SSD alone, and nothing is written there any more."""
    tiers = TwoTiers(8, 4)
    tiers.put("ab")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("b")]))
    tiers.settle()
    tiers.executor.apply(SsdChanged(writable=False))
    tiers.put("qrstuvwx")
    return tiers


def test_blocks_below_are_retained_when_they_come_up():
    tiers = only_below()
    assert "a" not in tiers.resident()
    assert retain(tiers, "ab", 80) == 2
    assert (retained(tiers), tiers.store.retention.waiting_blocks) == ("", 2)
    tiers.put("ab")
    validate_state(tiers.store)
    assert retained(tiers) == "ab"


def test_drop_reaches_what_is_below():
    tiers = TwoTiers(8, 4)
    tiers.put("ab")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("b")]))
    tiers.settle()
    retain(tiers, "ab", 50, 100, drop=True)
    tiers.executor.apply(SsdChanged(writable=False))
    tiers.put("qrstuvwx")
    assert "a" not in tiers.resident()
    assert tiers.below() == "ab"
    pass_time(tiers, 100)
    assert tiers.below() == ""
    assert tiers.store.retention.dropped_blocks == 2


def test_retentions_of_blocks_elsewhere_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "MOST_WAITING", 3)
    tiers = TwoTiers(8, 4)
    tiers.put("abcdef")
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("f")]))
    tiers.settle()
    tiers.executor.apply(SsdChanged(writable=False))
    tiers.put("qrstuvwx")
    retain(tiers, "abcdef", 80)
    assert tiers.store.retention.waiting_blocks == 3
    assert {key[:1] for key in tiers.namespace.retained} == {b"d", b"e", b"f"}


# ---------------------------------------------------------------- hints


@every_policy
def test_session_that_is_over_leaves_first_but_for_what_others_use(policy: str):
    store = SmallStore(8, 8, policy=policy)
    store.put("abcd")
    store.put("xy", at="b")
    store.touch("abcd")
    store.touch("abxy")
    assert hint(store, "abcd", soon=False) == 4
    put_each(store, "qr")
    assert store.resident() == "abcdqrxy"
    put_each(store, "st")
    assert store.hits("abxy") == 4
    assert store.hits("abcd") == 2


@every_policy
def test_session_that_was_over_and_is_used_again_stays(policy: str):
    store = SmallStore(4, 8, policy=policy)
    store.put("ab")
    store.put("xy")
    hint(store, "xy", soon=False)
    store.touch("xy")
    store.touch("xy")
    put_each(store, "q")
    assert store.hits("xy") == 2 or store.hits("ab") == 2
    assert policy != "lru" or store.hits("xy") == 2


@every_policy
def test_session_that_comes_back_soon_stays_until_its_time_is_over(policy: str):
    store = SmallStore(4, 8, policy=policy)
    store.put("ab")
    assert hint(store, "abc", soon=True, ttl_ns=100) == 2
    put_each(store, "uvwxyz")
    assert store.hits("ab") == 2
    pass_time(store, 100)
    put_each(store, "qrst")
    assert store.hits("ab") == 0


def test_hints_are_bounded_by_the_budget_and_lose_first():
    store = SmallStore(16, 8, retention_pages=3)
    store.put("abcd")
    put_each(store, "xy")
    assert hint(store, "abcd", soon=True) == 4
    assert retained(store) == "abc"
    assert retain(store, "xy", 60) == 2
    assert retained(store) == "axy"
    hint(store, "abcd", soon=False)
    assert retained(store) == "xy"


def test_hint_does_not_lower_a_retention_and_its_end_does_not_end_one():
    store = SmallStore(16, 8)
    store.put("abc")
    retain(store, "ab", 80, 1000)
    hint(store, "abc", soon=True, ttl_ns=100)
    assert [store.namespace.retained[key_of(x)].priority for x in "abc"] == [80, 80, 51]
    hint(store, "abc", soon=False)
    assert retained(store) == "ab"


def test_hint_retains_what_comes_up_from_below():
    tiers = only_below()
    assert hint(tiers, "ab", soon=True, ttl_ns=1000) == 2
    tiers.put("ab")
    assert retained(tiers) == "ab"
    hint(tiers, "ab", soon=False)
    assert retained(tiers) == ""
    assert tiers.twin.ssd.policy.next_victim() in [tiers.namespace.ssd.tree.blocks[key_of("b")]]  # type: ignore[union-attr]


def test_hint_about_a_block_of_which_memory_has_one_part_only_retains_that():
    tiers = TwoTiers(8, 4, parts=2)
    assert tiers.commit(tiers.record("a"), tiers.record("a", part=1)) == [STORED, STORED]
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of("a")]))
    tiers.settle()
    tiers.executor.apply(SsdChanged(writable=False))
    for letter in "qrst":
        tiers.commit(tiers.record(letter), tiers.record(letter, part=1))
    assert "a" not in tiers.resident()
    tiers.remove("t")
    assert tiers.commit(tiers.record("a")) == [STORED]
    assert hint(tiers, "a", soon=True) == 1
    assert retained(tiers) == "a"
