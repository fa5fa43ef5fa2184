"""Leases may hold a part of the tier: what they get and take in, and that others always find something to evict."""

from __future__ import annotations

import pytest
from fakes.small_store import SESSION, SmallStore

from kvstore.core.events import LeaseReleased, LeasesEnded, LeaseWanted
from kvstore.core.instructions import Count, Leased
from kvstore.core.invariants import validate_state
from kvstore.policy.registry import POLICIES
from kvstore.protocol.messages import PutStatus, Reason

STORED = (PutStatus.STORED, Reason.NONE)
ALL_HELD = (PutStatus.THROTTLED, Reason.ALL_HELD)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def lease(store: SmallStore, letters: str, session: int = SESSION) -> Leased:
    answer = store.executor.apply(LeaseWanted(session, store.blocks(letters), 100))
    assert isinstance(answer, Leased)
    validate_state(store.store)
    return answer


def held(store: SmallStore) -> int:
    return store.store.leases.held_bytes // 4096


def release(store: SmallStore, answer: Leased) -> None:
    assert store.executor.apply(LeaseReleased(SESSION, answer.lease)) == Count(1)
    validate_state(store.store)


@every_policy
def test_client_that_leases_everything_cannot_stop_the_puts_of_another(policy: str):
    store = SmallStore(8, 8, policy=policy, lease_pages=4)
    store.put("abcdefgh")
    for letter in "abcdefgh":
        lease(store, letter)
    assert held(store) == 4
    for letter in "stuvwxyz":
        assert store.put(letter) == [STORED]
        validate_state(store.store)
    assert store.hits("abcd") == 4, "what is leased stays"


def test_lease_is_given_for_the_leading_blocks_that_fit():
    store = SmallStore(8, 8, lease_pages=3)
    store.put("abcdef")
    assert lease(store, "abcdef").count == 3
    assert (store.store.leases.cut, store.store.leases.refused) == (1, 0)
    assert lease(store, "ab").count == 2, "what is leased already takes no more room"
    assert lease(store, "abcd").count == 3


def test_lease_is_refused_where_no_block_fits():
    store = SmallStore(8, 8, lease_pages=3)
    store.put("abc")
    store.put("xy")
    full = lease(store, "abc")
    assert lease(store, "xy") == Leased(0)
    assert store.store.leases.refused == 1
    release(store, full)
    assert lease(store, "xy").count == 2


def test_lease_takes_in_what_is_before_it():
    store = SmallStore(8, 8, lease_pages=4)
    store.put("abcdef")
    assert lease(store, "f") == Leased(0), "six blocks could not leave"
    assert lease(store, "d").count == 1
    assert held(store) == 4
    store.remove("d")
    assert held(store) == 3
    store.put("uvwxyz")
    assert store.hits("abc") == 3, "the rest of the lease holds"


def test_block_twice_in_a_lease_is_held_once():
    store = SmallStore(8, 8, lease_pages=2)
    store.put("ab")
    answer = lease(store, "abab")
    assert (answer.count, held(store)) == (4, 2)
    release(store, answer)
    assert held(store) == 0


def test_parent_that_comes_later_is_held_with_its_child_and_no_longer():
    store = SmallStore(8, 8, lease_pages=4)
    store.put("c", at="b")
    first, second = lease(store, "c"), lease(store, "c")
    store.put("a")
    assert store.put("b", at="a") == [STORED]
    validate_state(store.store)
    assert held(store) == 3
    release(store, first)
    assert held(store) == 3
    release(store, second)
    assert held(store) == 0
    assert not any(block.leases for block in store.blocks("abc"))
    store.put("rstuvwxyz"[:8])
    assert store.hits("abc") == 0


def test_parent_of_leased_blocks_is_throttled_where_leases_have_no_room():
    store = SmallStore(8, 8, lease_pages=2)
    store.put("c", at="b")
    store.put("x")
    lease(store, "c")
    other = lease(store, "x")
    assert store.put("b", at="a") == [ALL_HELD]
    release(store, other)
    assert store.put("b", at="a") == [STORED]
    assert store.put("a") == [ALL_HELD]
    validate_state(store.store)


def test_inherited_hold_ends_with_the_removal_of_the_child():
    store = SmallStore(8, 8, lease_pages=8)
    store.put("c", at="b")
    lease(store, "c")
    store.put("ab")
    assert held(store) == 3
    store.remove("c")
    validate_state(store.store)
    assert held(store) == 0
    store.remove("b")
    store.executor.apply(LeasesEnded(SESSION))
    validate_state(store.store)


def test_removed_parent_in_between_ends_what_it_inherited():
    store = SmallStore(8, 8, lease_pages=8)
    store.put("c", at="b")
    answer = lease(store, "c")
    store.put("ab")
    store.remove("b")
    validate_state(store.store)
    assert held(store) == 1
    release(store, answer)
    assert held(store) == 0


def test_leased_block_grows_only_within_what_may_be_leased():
    from kvstore.protocol.namespace import Namespace

    store = SmallStore(8, 8, lease_pages=2, namespace=Namespace(name="small", codec="kivi4"))
    store.put("a", fidelity=85)
    answer = lease(store, "a")
    assert store.put("a", fidelity=178, pages=3) == [ALL_HELD]
    assert store.put("a", fidelity=178, pages=2) == [STORED]
    assert held(store) == 2
    assert store.put("a", fidelity=255, pages=1) == [STORED]
    assert held(store) == 1
    release(store, answer)
    assert held(store) == 0


def test_branches_under_one_inherited_parent_are_counted():
    store = SmallStore(12, 8, lease_pages=8)
    leases = []
    for letter in "cde":
        store.put(letter, at="b")
        leases.append(lease(store, letter))
    store.put("ab")
    validate_state(store.store)
    assert held(store) == 5
    leases.append(lease(store, "c"))
    for answer in leases[:3]:
        release(store, answer)
    assert held(store) == 3
    release(store, leases[3])
    assert held(store) == 0
